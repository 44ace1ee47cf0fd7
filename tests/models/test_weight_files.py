"""Files of weights that do not fit, are damaged or hostile: refused, and the encoder stays as it was."""

import os
import sys
import types
import zipfile

import pytest
import torch
from torch import nn

from medspark.models import create_encoder
from medspark.models.weights import init_from

from .weight_tools import TINY, below, equal, resnet, saved


def test_another_network_is_refused_and_leaves_the_encoder_alone(tmp_path):
    target, untouched = resnet("resnet18"), resnet("resnet18")
    path = saved(tmp_path, {"state_dict": below("module.", resnet().state_dict())})
    with pytest.raises(ValueError, match="12 of the 20 kernels") as caught:
        init_from(target, path)
    message = str(caught.value)
    assert "below 'state_dict.module.'" in message
    assert "layer1.1.conv1.weight: not in the file" in message
    assert equal(target, untouched)
    wide = resnet("resnet18", block_inplanes=[6, 6, 8, 8])
    with pytest.raises(ValueError, match=r"conv1.weight: the file has \(4, 1, 7, 7, 7\)"):
        init_from(wide, saved(tmp_path, target.state_dict()))
    with pytest.raises(ValueError, match="fills 0 of the 20 kernels"):
        init_from(target, saved(tmp_path, {"epoch": 3}))


def test_one_wrong_shape_is_reported_with_both(tmp_path):
    source, target = resnet("resnet18"), resnet("resnet18", seed=2)
    state = {**source.state_dict(), "layer2.1.conv1.weight": torch.ones(4, 4, 5, 5, 5)}
    kept = target.layer2[1].conv1.weight.clone()
    report = init_from(target, saved(tmp_path, state))
    assert report.missing == {
        "layer2.1.conv1.weight": "the file has (4, 4, 5, 5, 5), the network (4, 4, 3, 3, 3)"
    }
    assert report.unused == ("layer2.1.conv1.weight",)
    assert torch.equal(target.layer2[1].conv1.weight, kept)
    assert report.share == 19 / 20
    assert "1: layer2.1.conv1.weight (the file has (4, 4, 5, 5, 5)" in str(report)


def test_only_the_stem_may_sum_its_channels(tmp_path):
    narrow = {"block_inplanes": [1, 4, 8, 8]}  # inner kernels with one input channel as well
    state = resnet("resnet18", **narrow).state_dict()
    state["layer1.0.conv1.weight"] = torch.ones(1, 3, 3, 3, 3)
    report = init_from(resnet("resnet18", seed=2, **narrow), saved(tmp_path, state))
    assert set(report.missing) == {"layer1.0.conv1.weight"}
    state["conv1.weight"] = torch.ones(1, 9, 7, 7, 7)  # nine channels are no colours
    report = init_from(resnet("resnet18", seed=2, **narrow), saved(tmp_path, state))
    assert set(report.missing) == {"layer1.0.conv1.weight", "conv1.weight"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bn1.weight", torch.full((4,), float("nan")), "bn1.weight holds NaN"),
        ("layer4.0.conv2.weight", torch.full((8, 8, 3, 3, 3), float("inf")), "infinite"),
        ("conv1.weight", torch.full((4, 1, 7, 7, 7), 1e300, dtype=torch.float64), "infinite"),
        ("bn1.running_var", torch.full((4,), -1.0), "negative variances"),
    ],
)
def test_values_that_poison_a_network(key, value, message, tmp_path):
    target, untouched = resnet(seed=2), resnet(seed=2)
    with pytest.raises(ValueError, match=message):
        init_from(target, saved(tmp_path, {**resnet().state_dict(), key: value}))
    assert equal(target, untouched)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile_ran",)


def test_hostile_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = resnet()
    huge = torch.zeros(1).expand(1 << 20, 1 << 20, 1 << 10)  # 4 bytes that claim 4 PiB
    state = target.state_dict()
    cycle = {"state_dict": state}
    cycle["itself"] = cycle
    bad = {
        "pickle": ({"state_dict": Hostile()}, "cannot be read"),
        "list": ([1, 2], "holds a list"),
        "tensor": (torch.ones(3), "holds a Tensor"),
        "huge": ({key: huge for key in state}, r"file has \(1048576, 1048576, 1024\)"),
        "int8": ({k: v.to(torch.int8) for k, v in state.items()}, "the file has torch.int8"),
        "sparse": ({k: v.to_sparse() for k, v in state.items()}, "sparse, quantised"),
        "dots": ({"." * 200_000: torch.ones(1)}, "fills 0"),
        "twins": ({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, "two tensors named 'a.b'"),
    }
    for name, (content, message) in bad.items():
        with pytest.raises(ValueError, match=message):
            init_from(target, saved(tmp_path, content, name))
    assert not (tmp_path / "hostile_ran").exists()
    for name, data in {"empty": b"", "text": b"hello", "json": b'{"a": 1}'}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="cannot be read"):
            init_from(target, tmp_path / name)
    with pytest.raises(FileNotFoundError):
        init_from(target, tmp_path / "absent")
    report = init_from(resnet(seed=2), saved(tmp_path, cycle, "cycle"))
    assert report.share == 1


def test_compressed_archives_are_refused(tmp_path):
    path = saved(tmp_path, {"conv1.weight": torch.zeros(1_000_000)})
    with (
        zipfile.ZipFile(path) as old,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for item in old.infolist():
            new.writestr(item.filename, old.read(item))
    assert (tmp_path / "bomb.pth").stat().st_size < 10_000
    with pytest.raises(ValueError, match="is compressed"):
        init_from(resnet(), tmp_path / "bomb.pth")


def test_arguments(tmp_path):
    path = saved(tmp_path, resnet().state_dict())
    with pytest.raises(ValueError, match="centre, mean"):
        init_from(resnet(), path, inflate="median")
    with torch.device("meta"):
        empty = create_encoder("resnet10", **TINY)
    with pytest.raises(ValueError, match="meta device"):
        init_from(empty, path)
    with pytest.raises(ValueError, match="no weights to fill"):
        init_from(nn.BatchNorm3d(3), path)


def test_safetensors_by_content(tmp_path, monkeypatch):
    source, target = resnet(), resnet(seed=2)
    header = b'{"conv1.weight": {}}'
    path = tmp_path / "model.pth"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        init_from(target, path)
    # The package itself is no dependency: here its one function that is called.
    package, module = types.ModuleType("safetensors"), types.ModuleType("safetensors.torch")
    module.load_file = lambda file, device: source.state_dict()
    monkeypatch.setitem(sys.modules, "safetensors", package)
    monkeypatch.setitem(sys.modules, "safetensors.torch", module)
    init_from(target, path)
    assert equal(source, target)


def test_names_of_a_file_cannot_steer_a_terminal(tmp_path):
    state = {**resnet().state_dict(), "\x1b[2J": torch.ones(1)}
    text = str(init_from(resnet(seed=2), saved(tmp_path, state)))
    assert "\x1b" not in text
    assert r"\x1b[2J" in text
