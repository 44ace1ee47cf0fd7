"""Learning-rate schedule and parameter groups of the official recipe."""

import pytest

from medspark.models import SparK
from medspark.pretrain.schedule import cosine, lr_factor, optim_options, parameter_groups


def test_warmup_then_cosine():
    factors = [lr_factor(s, 101, 20, 0.005, 0.001) for s in range(101)]
    assert factors[0] == 0.005
    assert factors[10] == pytest.approx((0.005 + 1) / 2)
    assert factors[20] == 1.0
    assert factors[60] == pytest.approx((1 + 0.001) / 2)
    assert factors[100] == pytest.approx(0.001)
    assert lr_factor(500, 101, 20, 0.005, 0.001) == pytest.approx(0.001)
    assert factors == sorted(factors[:21]) + sorted(factors[21:], reverse=True)
    assert lr_factor(0, 1, 0, 0.005, 0.001) == 1.0


def test_cosine_ends():
    assert [cosine(p) for p in (-1, 0, 0.5, 1, 2)] == pytest.approx([1, 1, 0.5, 0, 0])


def test_no_decay_on_norms_biases_and_tokens():
    spark = SparK.build("resnet10", encoder_kwargs={"block_inplanes": [4, 4, 4, 4]}, width=32)
    decay, rest = parameter_groups(spark, 0.04)
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.04, 0.0)
    ids = {id(p) for p in decay["params"]}
    for name, parameter in spark.named_parameters():
        assert (id(parameter) in ids) == (parameter.ndim == 5), name
    assert len(decay["params"]) + len(rest["params"]) == len(list(spark.parameters()))


def test_options():
    assert optim_options({"max_steps": 5})["betas"] == [0.9, 0.95]
    with pytest.raises(ValueError, match="unknown: momentum"):
        optim_options({"max_steps": 5, "momentum": 0.9})
    with pytest.raises(ValueError, match="max_steps is missing"):
        optim_options({})
    with pytest.raises(ValueError, match="warmup_steps 9"):
        optim_options({"max_steps": 5, "warmup_steps": 9})
