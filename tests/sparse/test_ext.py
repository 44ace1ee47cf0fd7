"""The extension: built, missing, or built and broken; and the choice of the backend."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from medspark.sparse import BlockMask, BlockSparseTensor, current_backend, launches, use_backend
from medspark.sparse import _ext as ext


@pytest.fixture
def forget() -> Iterator[None]:
    """Lets the loader look again, before the test and after it."""
    ext.load_extension.cache_clear()
    yield
    ext.load_extension.cache_clear()


@pytest.mark.usefixtures("forget")
def test_a_broken_extension_is_an_error_with_its_cause(monkeypatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol: _Z3foov")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(
        ImportError, match=r"cannot be loaded: undefined symbol.*pip install"
    ) as error:
        ext.load_extension()
    assert "undefined symbol" in str(error.value.__cause__)


@pytest.mark.usefixtures("forget")
def test_a_missing_extension_is_pure_torch_and_says_so(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ext.load_extension() is None
    assert "pure torch" in ext.extension_status()
    assert ext.launches() == {}
    with pytest.raises(RuntimeError, match="not built"), use_backend("native"):
        pass


def test_without_the_extension_the_reference_is_the_default() -> None:
    script = (
        "import importlib.util as u; f = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'medspark._C' else f(n, *a)\n"
        "import torch, medspark.sparse as s\n"
        "x = s.BlockSparseTensor.from_dense(torch.ones(1, 1, 4, 4, 4), "
        "s.BlockMask.random(1, (2, 2, 2), 0.5))\n"
        "y = torch.nn.Conv3d(1, 2, 3, padding=1)(x)\n"
        "print(s.current_backend(), type(y).__name__)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["reference", "BlockSparseTensor"]


def test_backend_is_restored_and_counted() -> None:
    mask = BlockMask(torch.ones(1, 2, 2, 2, dtype=torch.bool))
    x = torch.randn(1, 1, 4, 4, 4)
    assert current_backend() == "native"
    before = launches()

    def interrupted() -> None:
        with use_backend("reference"):
            BlockSparseTensor.from_dense(x, mask)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert launches() == before, "the reference must not launch kernels"
    assert current_backend() == "native"
    BlockSparseTensor.from_dense(x, mask)
    assert launches()["gather"] == before.get("gather", 0) + 1
    with pytest.raises(ValueError, match="unknown backend"), use_backend("fast"):  # type: ignore[arg-type]
        pass


def test_importing_the_engine_imports_no_compiler() -> None:
    """It would cost a second, and needs packages that a machine for kernels may not have."""
    code = "import sys, medspark.sparse; print('torch._dynamo' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "False"
