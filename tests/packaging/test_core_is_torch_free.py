"""The compiled core knows nothing of torch or Python; the bindings know nothing of torch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
INCLUDE = re.compile(r"^\s*#\s*include\s*[<\"]([^>\"]+)[>\"]", re.MULTILINE)
TORCH = re.compile(r"^(torch|ATen|c10|caffe2)(/|\.h)")
PYTHON = re.compile(r"^(Python\.h|pybind11/|nanobind/|structmember\.h)")


def _includes(path: Path) -> list[str]:
    return INCLUDE.findall(path.read_text())


def test_includes() -> None:
    suffixes = {".h", ".cpp", ".inl", ".cu", ".cuh"}
    sources = [path for path in CSRC.rglob("*") if path.suffix in suffixes]
    assert sources
    offenders = [
        f"{path.relative_to(CSRC)} includes {name}"
        for path in sources
        for name in _includes(path)
        if TORCH.match(name) or (PYTHON.match(name) and path.parent.name != "bindings")
    ]
    assert not offenders, "\n".join(offenders)


def test_pattern_finds_includes(tmp_path: Path) -> None:
    source = tmp_path / "a.cpp"
    source.write_text(
        '#include <torch/extension.h>\n #  include "ATen/ATen.h"\n#include <Python.h>'
    )
    found = _includes(source)
    assert [bool(TORCH.match(name)) for name in found] == [True, True, False]
    assert PYTHON.match(found[2])


def test_binary_links_nothing_of_torch() -> None:
    from medspark.sparse._ext import load_extension

    extension = load_extension()
    if extension is None or extension.__file__ is None:
        pytest.skip("medspark._C was not built")
    binary = Path(extension.__file__).read_bytes()
    assert not [name for name in (b"libtorch", b"libc10", b"libcudart.so") if name in binary]
