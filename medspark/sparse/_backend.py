"""Which implementation the ops run: the compiled kernels, or the reference in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from medspark.sparse._ext import load_extension, native

Backend = Literal["native", "reference"]

_current: Backend = "native" if load_extension() else "reference"


def current_backend() -> Backend:
    """The backend in use: native wherever the extension was built."""
    return _current


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Runs the enclosed forward passes on one backend; backward passes follow their forward.

    Args:
        backend: `"native"` (compiled kernels) or `"reference"` (plain torch on dense tensors, the oracle).

    Raises:
        RuntimeError: native was asked for and is not built.
        ValueError: unknown name.
    """
    global _current
    if backend not in ("native", "reference"):
        raise ValueError(f"unknown backend {backend!r}: use 'native' or 'reference'")
    if backend == "native":
        native()
    before, _current = _current, backend
    try:
        yield
    finally:
        _current = before
