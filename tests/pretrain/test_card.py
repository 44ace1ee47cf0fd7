"""The card says what the weights are, in numbers and lines that work as they stand."""

import json
import re

import pytest
import torch

from medspark.data.windows import Intensity
from medspark.models import create_encoder
from medspark.pretrain.card import Origin, adaptation_card, hu_scale
from medspark.pretrain.export import card_path, export_encoder, load_encoder
from medspark.pretrain.plan import make_plan

TINY = {"block_inplanes": [4, 4, 8, 16]}
RESENC = {"features_per_stage": [4, 8, 8], "strides": [1, 2, [1, 2, 2]], "n_blocks_per_stage": 1}
SPARK = [[4] * 3, [8] * 3, [16] * 3, [32] * 3]


def plan_of(name="resnet10", kwargs=TINY, strides=SPARK, **changes):
    entries = {
        "method": "spark",
        "encoder": {"name": name, "kwargs": kwargs},
        "encoder_key": "e",
        "strides": strides,
        "intensity": Intensity.named("soft_tissue").as_dict(),
        "spacing": [2.0, 1.5, 1.5],
        "crop": [64, 96, 96],
    }
    return make_plan(**{**entries, **changes})


def checkpoint(tmp_path, plan, **entries):
    encoder = create_encoder(plan["encoder"]["name"], **plan["encoder"]["kwargs"])
    state = {f"e.{k}": v for k, v in encoder.state_dict().items()}
    torch.save({"state_dict": state, "plan": plan, **entries}, tmp_path / "c.ckpt")
    return tmp_path / "c.ckpt"


def blocks(card, kind):
    return re.findall(rf"^```{kind}\n(.*?)\n```$", card, re.MULTILINE | re.DOTALL)


def rows(card):
    cells = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("|")]
    return {cell[0]: cell[1] for cell in cells if len(cell) == 2}


def test_entries(tmp_path):
    path = checkpoint(tmp_path, plan_of(), global_step=1234)
    out = tmp_path / "deep" / "encoder.pt"
    export_encoder(path, out, data_name="LIDC-IDRI", data_licence="CC BY 3.0")
    card = card_path(out).read_text("utf-8")
    found = rows(card)
    assert found["method"] == "spark"
    assert found["steps"] == "1234; weights: last step"
    assert found["network"].startswith("`monai.networks.nets.resnet.ResNet`")
    assert found["maps, total stride (z, y, x): channels"] == (
        "4x4x4: 4, 8x8x8: 4, 16x16x16: 8, 32x32x32: 16"
    )
    assert found["voxel size in mm (z, y, x)"] == "2 x 1.5 x 1.5"
    assert found["crop in voxels (z, y, x)"] == "64 x 96 x 96"
    assert found["input channels"] == "1"
    assert found["trained on"] == "LIDC-IDRI"
    assert found["licence of that data"] == "CC BY 3.0"
    options = json.loads(blocks(card, "json")[0])
    assert (options["conv1_t_stride"], options["block_inplanes"]) == (2, [4, 4, 8, 16])
    assert "not a medical device" in card
    assert str(tmp_path) not in card


def test_what_nobody_said_is_not_stated(tmp_path):
    plan = plan_of(intensity=None, spacing=None, crop=None)
    export_encoder(checkpoint(tmp_path, plan), tmp_path / "e.pt")
    card = card_path(tmp_path / "e.pt").read_text("utf-8")
    found = rows(card)
    for key in ("trained on", "licence of that data", "voxel size in mm (z, y, x)"):
        assert found[key] == "not stated"
    assert found["steps"] == "not stated; weights: last step"
    assert "Intensities: not stated." in card


@pytest.mark.parametrize("name", ["wide", "soft_tissue", "lung"])
def test_formula_is_that_of_the_data_path(name):
    intensity = Intensity.named(name)
    plan = plan_of(intensity=intensity.as_dict())
    card = adaptation_card(plan, create_encoder("resnet10", **TINY), Origin("e.pt"))
    formula = blocks(card, "python")[0]
    hus = [-3000.0, -1000.0, -163.5, 0.0, 40.0, 239.0, 3000.0]
    expected = intensity.normalise(torch.tensor(hus))
    for hu, want in zip(hus, expected.tolist(), strict=True):
        space = {"hu": hu}
        exec(formula, space)
        assert space["x"] == pytest.approx(want, abs=1e-5)
    assert f"Network input 0 is {intensity.to_hu(0.0):.10g} HU" in card


def test_plain_windows_and_nonsense():
    assert hu_scale({"window": [-1000, 1000], "mean": 0.25, "std": 0.5}) == (
        -1000,
        1000,
        -500,
        1000,
    )
    for bad in (
        {},
        {"window": [1, 2, 3], "mean": 0, "std": 1},
        {"window": [5, 5], "mean": 0, "std": 1},
        {"window": [0, 1], "mean": float("nan"), "std": 1},
        {"window": [0, 1], "mean": 0, "std": 0},
        {"window": {"low": "x", "high": 1}, "mean": 0, "std": 1},
    ):
        with pytest.raises(ValueError, match="the plan's"):
            hu_scale(bad)


@pytest.mark.parametrize("target", ["encoder", "nnunet"])
def test_lines_of_python_load_the_weights(target, tmp_path, monkeypatch):
    plan = plan_of("resenc", RESENC, [[1] * 3, [2] * 3, [2, 4, 4]])
    path = checkpoint(tmp_path, plan)
    export_encoder(path, tmp_path / 'it\'s "here".pth', target=target)
    trained, _ = load_encoder(path)
    code = blocks(card_path(tmp_path / 'it\'s "here".pth').read_text("utf-8"), "python")[1]
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(code, space)
    x = torch.randn(1, 1, 8, 16, 16)
    for a, b in zip(space["encoder"](x), trained(x), strict=True):
        assert torch.equal(a, b)


def test_nnunet_plans_build_the_network_and_normalise_as_pretraining_did(tmp_path):
    import pydoc

    plan = plan_of("resenc", RESENC, [[1] * 3, [2] * 3, [2, 4, 4]])
    export_encoder(checkpoint(tmp_path, plan), tmp_path / "u.pth", target="nnunet", seed=9)
    card = card_path(tmp_path / "u.pth").read_text("utf-8")
    assert "seed 9" in card
    plans = json.loads(blocks(card, "json")[1])
    found = plans["configurations"]["3d_fullres"]
    assert (found["spacing"], found["patch_size"]) == ([2.0, 1.5, 1.5], [64, 96, 96])
    # nnU-Net's way from plans to a network: a class by its path, some options by theirs
    arch = dict(found["architecture"]["arch_kwargs"])
    for key in found["architecture"]["_kw_requires_import"]:
        arch[key] = arch[key] and pydoc.locate(arch[key])
    network = pydoc.locate(found["architecture"]["network_class_name"])(
        input_channels=1, num_classes=2, deep_supervision=True, **arch
    )
    weights = torch.load(tmp_path / "u.pth", weights_only=True)["network_weights"]
    network.load_state_dict(weights, strict=True)
    # and its CT normalisation: clip to two percentiles, minus mean, by SD
    assert found["normalization_schemes"] == ["CTNormalization"]
    numbers = plans["foreground_intensity_properties_per_channel"]["0"]
    hu = torch.linspace(-1500, 1500, 301)
    theirs = hu.clamp(numbers["percentile_00_5"], numbers["percentile_99_5"])
    theirs = (theirs - numbers["mean"]) / numbers["std"]
    torch.testing.assert_close(theirs, Intensity.named("soft_tissue").normalise(hu))


def test_nothing_that_others_wrote_is_markup(tmp_path):
    evil = "x | y\n# Title\x1b[2J <script>alert(1)</script> [a](http://b) `c` ![d](e)"
    plan = {
        **plan_of(),
        "method": evil,
        "commit": evil,
        "medspark_version": evil,
        "spacing": [evil],
    }
    path = checkpoint(tmp_path, plan)
    export_encoder(path, tmp_path / "e.pt", data_name=evil, data_licence="a" * 5000)
    card = card_path(tmp_path / "e.pt").read_text("utf-8")
    clean = card.splitlines()
    assert [line for line in clean if line.startswith("# ")] == ["# Adaptation card of e.pt"]
    assert "\x1b" not in card
    for markup in (r"(?<!\\)<", r"(?<!\\)\[a", r"(?<!\\)`c`", r"x \| y", r"!\["):
        assert not re.search(markup, card.partition("## Options")[0])
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in clean if line.startswith("|"))
    assert "a" * 301 not in card


def test_command(tmp_path, monkeypatch, capsys):
    from medspark.cli.main import main

    plan = plan_of("resenc", RESENC, [[1] * 3, [2] * 3, [2, 4, 4]])
    checkpoint(tmp_path, plan)
    monkeypatch.chdir(tmp_path)
    arguments = ["checkpoint=c.ckpt", "out=u.pth", "target=nnunet", "data_name=LIDC"]
    assert main(["export", *arguments]) == 0
    said = capsys.readouterr().out
    assert "-pretrained_weights u.pth" in said
    assert "licence of the data is not stated" in said
    assert rows((tmp_path / "u.pth.card.md").read_text("utf-8"))["trained on"] == "LIDC"
    assert "network_weights" in torch.load(tmp_path / "u.pth", weights_only=True)
    assert main(["export", *arguments, "data_licence=CC0", "target=encoder"]) == 0
    assert "not stated" not in capsys.readouterr().out
    assert "stem.convs.0.conv.weight" in torch.load(tmp_path / "u.pth", weights_only=True)


def test_strides_that_the_encoder_lacks(tmp_path):
    path = checkpoint(tmp_path, plan_of(strides=[[3, 3, 3]]))
    with pytest.raises(ValueError, match="no map of stride"):
        export_encoder(path, tmp_path / "x" / "e.pt")
    assert not (tmp_path / "x").exists()
