"""Learning-rate schedule and parameter groups of the official recipe."""

import pytest
import torch
from torch import nn

from medspark.models import SparK
from medspark.pretrain.lamb import Lamb
from medspark.pretrain.schedule import (
    build_optimizer,
    cosine,
    lr_factor,
    optim_options,
    parameter_groups,
    set_step,
)


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


def values(options, step, batch=1):
    """Learning rate and weight decay of the two groups."""
    o = optim_options(options)
    weight, bias = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    net = nn.Module()
    net.weight, net.bias = weight, bias
    optimizer = build_optimizer(net, o)
    set_step(optimizer, step, o, batch)
    return [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_rate_and_decay_of_each_step(name):
    """40 warm-up steps of 201: .5 % to the peak, cosine to .1 %; decay .04 to .2 on a cosine."""
    o = {"name": name, "max_steps": 201, "lr": 2.0, "warmup_steps": 40, "weight_decay_end": 0.2}
    assert values(o, 0) == [pytest.approx((0.01, 0.04)), pytest.approx((0.01, 0.0))]
    assert values(o, 40)[0][0] == 2.0
    assert values(o, 100)[0] == pytest.approx((2 * lr_factor(100, 201, 40, 0.005, 0.001), 0.12))
    assert values(o, 200) == [pytest.approx((0.002, 0.2)), pytest.approx((0.002, 0.0))]


def test_rate_grows_with_the_batch_where_asked():
    """Official SparK: 2e-4 for 256 is 3.2e-3 for 4096."""
    o = {"max_steps": 5, "lr": 2e-4, "lr_batch": 256}
    assert values(o, 0, batch=4096)[0][0] == pytest.approx(3.2e-3)
    assert values({**o, "lr_batch": None}, 0, batch=4096)[0][0] == 2e-4


def test_optimiser_by_name():
    net = nn.Linear(2, 2)
    lamb = build_optimizer(
        net, optim_options({"name": "lamb", "max_steps": 1, "gradient_clip": 5.0})
    )
    assert isinstance(lamb, Lamb) and lamb.max_grad_norm == 5.0
    adamw = build_optimizer(net, optim_options({"max_steps": 1, "betas": [0.9, 0.999]}))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["betas"] == (0.9, 0.999)
    with pytest.raises(ValueError, match="no optimiser 'sgd'; there are adamw, lamb"):
        optim_options({"max_steps": 1, "name": "sgd"})
    with pytest.raises(ValueError, match="drop_path 1"):
        optim_options({"max_steps": 1, "drop_path": 1})
