"""Weights of others and of ours into encoders: whose names, which values, what is said of the rest."""

import monai.networks.nets as nets
import pytest
import torch
from torch import nn

from medspark.models import create_encoder
from medspark.models.weights import init_from

from .weight_tools import below, equal, last_map, resnet, rgb, saved, scramble

RESENC = {"features_per_stage": [4, 8, 8], "strides": [1, 2, 2], "n_blocks_per_stage": [1, 2, 1]}


# Ours


def test_exported_dict(tmp_path):
    source, target = resnet(), resnet(seed=2)
    report = init_from(target, saved(tmp_path, source.state_dict(), "e.pt"))
    assert equal(source, target)
    assert report.prefix == ""
    assert len(report.loaded) == len(source.state_dict())
    assert (report.missing, report.unused, report.inflated, report.adapted) == ({}, (), (), {})
    assert report.share == 1


def test_pretraining_checkpoint_with_its_average(tmp_path):
    last, average = resnet(seed=1), resnet(seed=2)
    key = "spark.pyramid.encoder"
    content = {
        "ema_state_dict": below(f"{key}.", average.state_dict()),
        "state_dict": {
            **below(f"{key}.", last.state_dict()),
            "spark.decoder.head.weight": torch.ones(1, 1, 1, 1, 1),
        },
        "plan": {"encoder_key": key},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
    }
    path, target = saved(tmp_path, content, "last.ckpt"), resnet(seed=3)
    report = init_from(target, path)
    assert equal(target, last)
    assert report.prefix == f"state_dict.{key}."
    assert report.rivals == (f"ema_state_dict.{key}.",)
    assert "state_dict.spark.decoder.head.weight" in report.unused
    report = init_from(target, path, prefix=f"ema_state_dict.{key}")
    assert equal(target, average)
    with pytest.raises(ValueError, match="fills 0 of the 12 kernels"):
        init_from(target, path, prefix="nowhere")


def test_the_plan_decides_between_two_encoders(tmp_path):
    a, b = resnet(seed=1), resnet(seed=2)
    states = {**below("student.", a.state_dict()), **below("online.", b.state_dict())}
    target = resnet(seed=3)
    init_from(target, saved(tmp_path, {"state_dict": states}))
    assert equal(target, a)
    init_from(target, saved(tmp_path, {"state_dict": states, "plan": {"encoder_key": "online"}}))
    assert equal(target, b)


def test_classifier_checkpoint(tmp_path):
    from medspark.finetune.module import ClassifierModule

    source = resnet()
    state = ClassifierModule(source, 3).state_dict()
    target = resnet(seed=2)
    report = init_from(target, saved(tmp_path, {"state_dict": state, "epoch": 3}))
    assert equal(source, target)
    assert report.prefix == "state_dict.pyramid.encoder."
    assert {"state_dict.head.weight", "state_dict.head.bias"} <= set(report.unused)


# MedicalNet


def medicalnet(network):
    """Their form: DataParallel, a segmentation head, no more than that."""
    state = below("module.", network.state_dict())
    state["module.conv_seg.0.weight"] = torch.ones(8, 32, 2, 2, 2)
    state["module.conv_seg.0.bias"] = torch.ones(32)
    return {"state_dict": state}


def test_medicalnet_10_without_biases_of_shortcuts(tmp_path):
    theirs = resnet(bias_downsample=False)
    path, target = saved(tmp_path, medicalnet(theirs)), resnet(seed=2)
    assert target.layer2[0].downsample[0].bias.abs().min() > 0
    report = init_from(target, path)
    x = torch.randn(1, 1, 64, 64, 64)
    assert torch.equal(last_map(target, x), last_map(theirs, x))
    assert report.prefix == "state_dict.module."
    assert set(report.adapted) == {f"layer{i}.0.downsample.0.bias" for i in (2, 3, 4)}
    assert set(report.unused) == {f"state_dict.module.conv_seg.0.{k}" for k in ("weight", "bias")}
    assert report.missing == {}


def test_medicalnet_18_of_type_a(tmp_path):
    theirs = resnet("resnet18", shortcut_type="A")
    path = saved(tmp_path, medicalnet(theirs))
    same = resnet("resnet18", seed=2, shortcut_type="A")
    init_from(same, path)
    x = torch.randn(1, 1, 64, 64, 64)
    assert torch.equal(last_map(same, x), last_map(theirs, x))
    other = resnet("resnet18", seed=2)
    kept = other.layer2[0].downsample[0].weight.clone()
    report = init_from(other, path)
    assert report.share == 17 / 20
    assert torch.equal(other.layer2[0].downsample[0].weight, kept)
    assert report.missing["layer2.0.downsample.0.weight"] == "not in the file"
    assert "shortcut_type='A'" in str(report)


# The four 2D ResNets of arXiv 2308.06534, torchvision, timm


WRAPPED = {
    "SparK, SwAV": lambda q, k: {"module": below("model.", q)},
    "MoCo": lambda q, k: {
        "state_dict": {**below("encoder_k.", k), **below("encoder_q.", q), "queue": torch.ones(9)}
    },
    "BYOL": lambda q, k: {
        "state_dict": {
            **below("target_network.encoder.", k),
            **below("online_network.encoder.", q),
            "online_network.projector.model.0.weight": torch.ones(4, 8),
        }
    },
    "torchvision": lambda q, k: {**q, "fc.weight": torch.ones(5, 8), "fc.bias": torch.ones(5)},
    "compiled": lambda q, k: {"model": below("_orig_mod.backbone.", q)},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_released_2d_weights_on_grey_images(kind, tmp_path):
    query, key = rgb(seed=1), rgb(seed=2)
    path = saved(tmp_path, WRAPPED[kind](query.state_dict(), key.state_dict()))
    target = resnet(seed=3, spatial_dims=2).double()
    report = init_from(target, path)
    x = torch.randn(2, 1, 64, 64, dtype=torch.float64)
    expected = last_map(query.double(), x.repeat(1, 3, 1, 1))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(last_map(target, x), expected, rtol=0, atol=1e-12)
    assert report.adapted == {"conv1.weight": "3 input channels summed into 1"}
    assert report.missing == {}
    assert all(("fc." in n) or ("projector" in n) or ("queue" in n) or ("_k" in n)
               or ("target" in n) for n in report.unused)  # fmt: skip


def test_children_of_a_sequential_carry_numbers(tmp_path):
    source = resnet()
    cut = nn.Sequential(*[m for m in source.children() if m is not None])
    assert "4.0.conv1.weight" in cut.state_dict()
    target = resnet(seed=2)
    report = init_from(
        target, saved(tmp_path, {"state_dict": below("backbone.", cut.state_dict())})
    )
    assert equal(source, target)
    assert report.prefix == "state_dict.backbone."


def test_layers_that_were_compiled_one_by_one(tmp_path):
    source, target = resnet(), resnet(seed=2)
    state = {k.replace("layer2.", "layer2._orig_mod."): v for k, v in source.state_dict().items()}
    report = init_from(target, saved(tmp_path, {"model": state}))
    assert equal(source, target)
    assert report.unused == ()


def test_shortcuts_by_another_name(tmp_path):
    source, target = resnet(), resnet(seed=2)
    state = {k.replace("downsample", "shortcut"): v for k, v in source.state_dict().items()}
    report = init_from(target, saved(tmp_path, state))
    assert equal(source, target)
    assert report.unused == ()


# nnU-Net, nnssl, VoCo


def unet():
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    return scramble(
        ResidualEncoderUNet(
            1, 3, [4, 8, 8], nn.Conv3d, 3, [1, 2, 2], [1, 2, 1], 2, 1, conv_bias=True,
            norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
        )
    )  # fmt: skip


def resenc(seed=2):
    return scramble(create_encoder("resenc", **RESENC), seed)


@pytest.mark.parametrize(
    ("wrapper", "before"),
    [("network_weights", ""), ("state_dict", "module."), ("state_dict", "backbone.")],
)
def test_residual_encoder_of_a_unet(wrapper, before, tmp_path):
    network, target = unet(), resenc()
    content = {wrapper: below(before, network.state_dict())}
    report = init_from(target, saved(tmp_path, content))
    assert equal(target, network.encoder)
    assert report.prefix == f"{wrapper}.{before}encoder."
    assert report.rivals == ()  # the decoder's alias of the encoder holds the same values
    assert all(".decoder." in name for name in report.unused)
    x = torch.randn(1, 1, 16, 16, 16)
    for a, b in zip(target(x), network.encoder(x), strict=True):
        assert torch.equal(a, b)


def test_of_two_copies_of_a_convolution_the_trained_one_counts(tmp_path):
    network, target = unet(), resenc()
    state = {k: v.clone() for k, v in network.encoder.state_dict().items()}
    first = [k for k in state if k.endswith(".conv.weight")]
    for key in first:
        state[key].fill_(7.0)  # never trained: nnssl's sparse layers leave it behind
    # whatever the order of the file
    for order in (list(state), list(reversed(state))):
        report = init_from(target, saved(tmp_path, {k: state[k] for k in order}))
        assert equal(target, network.encoder)
    assert len(report.adapted) == len(first)
    assert "differs from stem.convs.0.conv.weight" in str(report)


def test_transformer_of_voco(tmp_path):
    def swin(seed):
        return scramble(nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12), seed)

    source, target = swin(1), swin(2)
    content = {"state_dict": below("module.", source.state_dict())}
    report = init_from(target.swinViT, saved(tmp_path, content))
    assert report.prefix == "state_dict.module.swinViT."
    assert equal(target.swinViT, source.swinViT)
    assert not equal(target, source)


def test_summary_can_be_read(tmp_path):
    target = resnet(seed=2)
    text = str(init_from(target, saved(tmp_path, medicalnet(resnet(bias_downsample=False)))))
    assert text.splitlines() == [
        "100% of the kernels of this ResNet come from file.pth, below 'state_dict.module.'",
        f"  loaded:   {len(target.state_dict()) - 3} tensors",
        "  inflated: none",
        "  adapted:  3: layer2.0.downsample.0.bias (not in the file, set to 0), "
        "layer3.0.downsample.0.bias (not in the file, set to 0), "
        "layer4.0.downsample.0.bias (not in the file, set to 0)",
        "  missing:  none",
        "  unused:   2: state_dict.module.conv_seg.0.weight, state_dict.module.conv_seg.0.bias",
    ]
