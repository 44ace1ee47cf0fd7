"""Every network of docs/networks.md: unmodified, native, and as exact as torch's own float32."""

from __future__ import annotations

import pytest

from .network_table import (
    KERNELS,
    NORMS,
    ROUNDING,
    Result,
    convolutions,
    gradient_errors,
    measure,
    relative,
    verdicts,
)
from .networks import NETWORKS

KINKS = ("relu", "leaky_relu", "max_pool2d", "max_pool3d")
WRITE = "python -m tests.sparse.network_table > docs/networks.md"


def test_table_names_these_networks() -> None:
    assert list(verdicts()) == list(NETWORKS), f"write it again: {WRITE}"


@pytest.mark.parametrize("name", NETWORKS)
def test_network_is_native_and_exact(name: str) -> None:
    result = measure(name)
    assert result.verdict == verdicts().get(name), f"write it again: {WRITE}"
    if result.missing:
        return
    own, torchs, exact = result.own, result.torchs, result.exact
    for kernel in set(KERNELS.values()):
        called = sum(own.calls[f] for f, k in KERNELS.items() if k == kernel)
        for forward in (own.forward, own.forward_evaluation):
            assert forward.get(kernel, 0) == called, f"{kernel} fell back"
    assert own.total["conv3d_weight"] == convolutions(own.calls) > 0, "a convolution fell back"
    norms = sum(own.calls[f] for f in NORMS)
    assert own.total.get("norm", 0) == own.total.get("norm_input", 0) == norms, "a norm fell back"
    _same_in_float64(result)
    for mode in ("training", "evaluation"):
        outputs = (getattr(r, mode) for r in (own, torchs, exact))
        for a, b, c in zip(*outputs, strict=True):
            assert relative(a, c) <= 2 * relative(b, c) + ROUNDING, mode
    # One ReLU near 0 that flips in float32, or one near tie of a max pool, moves all gradients before it.
    flips = 1e-2 if any(own.calls[f] for f in KINKS) else 0.0
    ours, theirs = gradient_errors(result)
    assert ours <= 3 * theirs + ROUNDING + flips


def _same_in_float64(result: Result) -> None:
    own, exact = result.own64, result.exact
    for mode in ("training", "evaluation"):
        for a, b in zip(getattr(own, mode), getattr(exact, mode), strict=True):
            assert relative(a, b) < 1e-10, mode
    assert own.gradients.keys() == exact.gradients.keys() and own.gradients
    # A bias in front of a norm has gradient 0: measured against the scale of the whole network.
    floor = 1e-3 * max(g.norm().item() for g in exact.gradients.values())
    for key, gradient in exact.gradients.items():
        assert relative(own.gradients[key], gradient, floor) < 1e-10, key
