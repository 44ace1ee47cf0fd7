"""The classifier module: what trains, what does not, and what it computes."""

import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from medspark.finetune.module import ClassifierModule, lr_scale
from medspark.models.encoders import create_encoder

TINY = {"block_inplanes": [4, 4, 8, 8]}


def tiny_encoder(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_encoder("resnet10", **TINY)


def train(module: ClassifierModule, steps: int = 3) -> None:
    x = torch.randn(8, 1, 32, 32, 32, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, torch.arange(8) % 2, torch.arange(8))
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, 4))


def copies(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_linear_mode_leaves_every_encoder_tensor_alone():
    module = ClassifierModule(tiny_encoder(), 2, mode="linear", lr=0.1)
    before, head = copies(module.pyramid.encoder), module.head.weight.clone()
    train(module)
    after = module.pyramid.encoder.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert not torch.equal(head, module.head.weight)


def test_linear_mode_outlives_a_call_of_train():
    module = ClassifierModule(tiny_encoder(), 2, mode="linear", dropout=0.5).train()
    assert module.dropout.training
    assert [n for n, m in module.pyramid.named_modules() if m.training] == []
    before = copies(module.pyramid)
    module(torch.randn(2, 1, 32, 32, 32))
    after = module.pyramid.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_full_mode_moves_weights_and_statistics():
    module = ClassifierModule(tiny_encoder(), 2, mode="full", lr=0.1)
    before = copies(module.pyramid.encoder)
    train(module)
    after = module.pyramid.encoder.state_dict()
    for name in ("conv1.weight", "bn1.weight", "bn1.running_mean", "layer4.0.conv2.weight"):
        assert not torch.equal(before[name], after[name]), name


def test_features_are_the_mean_of_the_last_stage():
    encoder = tiny_encoder().eval()
    module = ClassifierModule(encoder, 3, mode="linear").eval()
    x = torch.randn(2, 1, 64, 64, 64)
    kept = []
    encoder.layer4.register_forward_hook(lambda m, args, out: kept.append(out))
    with torch.no_grad():
        logits = module(x)
    assert kept[0].shape == (2, 8, 2, 2, 2)
    expected = kept[0].mean(dim=(2, 3, 4)) @ module.head.weight.T + module.head.bias
    torch.testing.assert_close(logits, expected)


def test_encoder_may_learn_slower_and_vectors_do_not_decay():
    module = ClassifierModule(tiny_encoder(), 2, lr=1.0, encoder_lr_scale=0.1, weight_decay=0.3)
    groups = module.parameter_groups()
    options = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert options[id(module.head.weight)] == (1.0, 0.3)
    assert options[id(module.head.bias)] == (1.0, 0.0)
    assert options[id(module.pyramid.encoder.conv1.weight)] == (0.1, 0.3)
    assert options[id(module.pyramid.encoder.bn1.weight)] == (0.1, 0.0)
    assert len(options) == len(list(module.parameters()))


def test_linear_mode_trains_the_head_only():
    module = ClassifierModule(tiny_encoder(), 2, mode="linear")
    trained = [p for group in module.parameter_groups() for p in group["params"]]
    assert {id(p) for p in trained} == {id(module.head.weight), id(module.head.bias)}


def test_learning_rate_warms_up_and_follows_a_cosine():
    assert [lr_scale(step, 100) for step in (0, 1, 4)] == pytest.approx([0.2, 0.4, 1.0])
    assert lr_scale(5, 100) == pytest.approx(1.0)
    assert lr_scale(5 + 95 // 5, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi / 5)))
    assert lr_scale(100, 100) == pytest.approx(0.0)
    assert lr_scale(0, 1) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mode": "frozen"}, "linear, full"), ({"n_classes": 1}, "at least two classes")],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ClassifierModule(tiny_encoder(), **{"n_classes": 2, **options})
