"""Layer-wise learning rates, by values."""

import pytest
from torch import nn

from medspark.finetune.layers import layer_groups, parameter_stages
from medspark.models.encoders import create_encoder
from medspark.models.pyramid import Pyramid

PLANES = {"block_inplanes": [4, 4, 8, 8]}


def rates_of(encoder: nn.Module, **options):
    """Name of every parameter -> (learning rate, weight decay)."""
    pyramid, head = Pyramid(encoder, strides=None), nn.Linear(8, 2)
    chosen = {"lr": 1.0, "encoder_lr_scale": 0.5, "layer_decay": 0.5, "weight_decay": 0.1}
    groups = layer_groups(pyramid, head, **(chosen | options))
    names = {id(p): n.removeprefix("encoder.") for n, p in pyramid.named_parameters()}
    names |= {id(p): f"head.{n}" for n, p in head.named_parameters()}
    listed = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert sorted(name for name, _ in listed) == sorted(names.values())
    return dict(listed)


def by_prefix(rates, depth: int = 1):
    found: dict[str, set[float]] = {}
    for name, (lr, _) in rates.items():
        found.setdefault(".".join(name.split(".")[:depth]), set()).add(lr)
    return found


@pytest.mark.parametrize("dims", [2, 3])
def test_resnet18(dims):
    rates = rates_of(create_encoder("resnet18", **PLANES, spatial_dims=dims))
    assert by_prefix(rates) == {
        "head": {1.0},
        "layer4": {0.25},
        "layer3": {0.125},
        "layer2": {0.0625},
        "layer1": {0.03125},
        "conv1": {0.015625},
        "bn1": {0.015625},
    }


def test_resenc():
    encoder = create_encoder(
        "resenc",
        features_per_stage=[4, 4, 8, 8],
        n_blocks_per_stage=[1, 1, 2, 1],
        strides=[1, 2, 2, 2],
    )
    rates = rates_of(encoder)
    # The stem and the first stage work at full resolution: one stage.
    assert by_prefix({n: v for n, v in rates.items() if n.startswith(("stem", "head"))}) == {
        "head": {1.0},
        "stem": {0.03125},
    }
    stages = by_prefix({n: v for n, v in rates.items() if n.startswith("stages")}, depth=2)
    assert stages == {
        "stages.3": {0.25},
        "stages.2": {0.125},
        "stages.1": {0.0625},
        "stages.0": {0.03125},
    }


def test_no_decay_on_norms_and_biases():
    rates = rates_of(create_encoder("resnet18", **PLANES))
    plain = {name for name, (_, decay) in rates.items() if decay == 0}
    assert {"head.bias", "bn1.weight", "bn1.bias", "layer4.1.bn2.weight"} <= plain
    assert {decay for name, (_, decay) in rates.items() if name not in plain} == {0.1}
    weights = {name for name in rates if name not in plain}
    assert {"head.weight", "conv1.weight", "layer2.0.downsample.0.weight"} <= weights
    assert not [name for name in weights if "bias" in name or "bn" in name]


def test_without_decay_every_stage_learns_alike():
    rates = rates_of(create_encoder("resnet18", **PLANES), layer_decay=1.0)
    assert {lr for name, (lr, _) in rates.items() if not name.startswith("head")} == {0.5}


def test_idle_classification_layer_counts_as_the_last_stage():
    encoder = create_encoder("resnet10", **PLANES, feed_forward=True, num_classes=3)
    stages = parameter_stages(Pyramid(encoder, strides=None))
    assert stages["encoder.fc.weight"] == stages["encoder.layer4.0.conv1.weight"] == 4
    assert stages["encoder.conv1.weight"] == 0


def test_linear_probe_has_a_head_only():
    pyramid, head = Pyramid(create_encoder("resnet10", **PLANES), strides=None), nn.Linear(8, 2)
    groups = layer_groups(
        pyramid,
        head,
        lr=1.0,
        encoder_lr_scale=1.0,
        layer_decay=0.5,
        weight_decay=0.1,
        head_only=True,
    )
    assert {id(p) for g in groups for p in g["params"]} == {id(head.weight), id(head.bias)}


class Repeated(nn.Module):
    """The first convolution is used again, deeper down; a scale belongs to no submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(nn.init.ones_(nn.Conv3d(1, 1, 1).weight.data.clone()))
        self.down = nn.Conv3d(1, 4, 2, stride=2)
        self.mix = nn.Conv3d(4, 4, 3, padding=1)
        self.deeper = nn.Conv3d(4, 4, 2, stride=2)

    def forward(self, x):
        return self.mix(self.deeper(self.mix(self.down(x * self.scale))))


def test_first_use_decides():
    stages = parameter_stages(Pyramid(Repeated(), strides=None))
    assert stages == {
        "encoder.scale": 0,
        "encoder.down.weight": 0,
        "encoder.down.bias": 0,
        "encoder.mix.weight": 0,
        "encoder.mix.bias": 0,
        "encoder.deeper.weight": 1,
        "encoder.deeper.bias": 1,
    }
