"""Encoders by name are the public libraries' own networks."""

import json
import sys

import monai.networks.nets as nets
import pytest
import torch

from medspark.models import create_encoder, encoder_from_spec, encoder_names, encoder_spec
from medspark.models.encoders import encoder_options

TINY = {"block_inplanes": [4, 4, 8, 8]}


@pytest.mark.parametrize("name", ["resnet10", "resnet18", "resnet34", "resnet50", "resnet101"])
def test_resnets_have_the_keys_and_shapes_of_monai(name):
    with torch.device("meta"):
        ours = create_encoder(name)
        theirs = getattr(nets, name)(
            n_input_channels=1, conv1_t_stride=2, spatial_dims=3, feed_forward=False
        )
    assert type(ours) is nets.ResNet
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }


def test_same_weights_give_the_same_logits_as_monai():
    ours = create_encoder("resnet10", feed_forward=True, num_classes=3).eval()
    theirs = nets.resnet10(n_input_channels=1, conv1_t_stride=2, num_classes=3).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(1, 1, 32, 32, 32)
    assert torch.equal(ours(x), theirs(x))


def test_images_have_the_same_network_in_2d():
    ours = create_encoder("resnet18", spatial_dims=2, n_input_channels=3, **TINY).eval()
    theirs = nets.ResNet(
        "basic", [2, 2, 2, 2], [4, 4, 8, 8], spatial_dims=2, n_input_channels=3,
        conv1_t_stride=2, feed_forward=False,
    ).eval()  # fmt: skip
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(x), theirs(x))
    assert ours(x).std() > 0


def test_options_of_a_spec_are_complete():
    spec = encoder_spec("resnet18", spatial_dims=2)
    options = encoder_options(spec)
    assert (options["spatial_dims"], options["conv1_t_stride"]) == (2, 2)
    again = create_encoder("resnet18", **options)
    assert str(again) == str(encoder_from_spec(spec))


def test_resenc_is_the_encoder_of_nnunet():
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    features = [4, 4, 8]
    ours = create_encoder(
        "resenc", features_per_stage=features, strides=[1, 2, 2], n_blocks_per_stage=[1, 1, 1]
    )
    theirs = ResidualEncoderUNet(
        1, 3, features, torch.nn.Conv3d, 3, [1, 2, 2], 1, 2, 1, conv_bias=True,
        norm_op=torch.nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip
    theirs.encoder.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(1, 1, 8, 8, 8)
    for a, b in zip(ours(x), theirs.encoder(x), strict=True):
        assert torch.equal(a, b)


def test_missing_package_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "dynamic_network_architectures", None)
    monkeypatch.setitem(sys.modules, "dynamic_network_architectures.building_blocks", None)
    with pytest.raises(ImportError, match="pip install --no-deps dynamic-network-architectures"):
        create_encoder("resenc")


def test_spec_survives_json():
    spec = encoder_spec("resnet10", **TINY, norm=["group", {"num_groups": 2}])
    again = encoder_from_spec(json.loads(json.dumps(spec)))
    assert again.conv1.weight.shape == (4, 1, 7, 7, 7)
    assert isinstance(again.bn1, torch.nn.GroupNorm)
    assert again.bn1.num_groups == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "os.system", "kwargs": {}}, "unknown encoder 'os.system'"),
        ({"name": "resnet18", "kwargs": {"pretrained": True}}, "has no option pretrained"),
        ({"name": "resnet18", "kwargs": {"block_inplanes": print}}, "not a number"),
        ({"name": "resnet18", "kwargs": {"norm": ["batch", {"x": [print]}]}}, "not a number"),
        ({"name": "resnet18", "kwargs": {"block_inplanes": [4]}}, "does not accept"),
        ({"name": "resnet18", "kwargs": {"act": "no_such"}}, "does not accept"),
        ({"name": "resnet18", "kwargs": [1]}, "an encoder spec is"),
        ({"name": "resnet18", "call": "x"}, "an encoder spec is"),
        ("resnet18", "an encoder spec is"),
    ],
)
def test_hostile_or_wrong_specs_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        encoder_from_spec(spec)


def test_names():
    assert set(encoder_names()) == {
        "resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resenc",
    }  # fmt: skip
