"""Half-precision conversions of the core against numpy's, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np


def rows(printed: str, kind: str) -> np.ndarray:
    """The numbers of all lines of a kind."""
    lines = [line.split()[1:] for line in printed.splitlines() if line.startswith(kind)]
    return np.array([[int(word, 16) for word in line] for line in lines], dtype=np.uint32)


def same_halves(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Whether bits are equal; of NaN only the sign is compared."""
    a, b = got.view(np.float16), want.view(np.float16)
    return (got == want) | (np.isnan(a) & np.isnan(b) & (np.signbit(a) == np.signbit(b)))


def test_conversions_equal_numpy(run_program: Callable[..., str]) -> None:
    printed = run_program(Path(__file__).with_name("half_host.cpp"))

    half, wide, back = rows(printed, "h").T
    assert np.array_equal(half, np.arange(65536))
    halves = half.astype(np.uint16).view(np.float16)
    number = ~np.isnan(halves)
    assert np.array_equal(wide[number], halves.astype(np.float32).view(np.uint32)[number])
    assert np.isnan(wide[~number].view(np.float32)).all()
    assert same_halves(back.astype(np.uint16), half.astype(np.uint16)).all()

    floats, narrowed = rows(printed, "f").T
    with np.errstate(over="ignore", under="ignore"):
        want = floats.view(np.float32).astype(np.float16)
    wrong = ~same_halves(narrowed.astype(np.uint16), want.view(np.uint16))
    examples = [f"{f:08x} -> {h:04x}" for f, h in rows(printed, "f")[wrong][:5]]
    assert not wrong.any(), examples
    values = dict(zip(floats.view(np.float32).tolist(), narrowed.tolist(), strict=True))
    below = float(np.nextafter(np.float32(65520), np.float32(0)))
    assert (values[65504.0], values[below], values[65520.0]) == (0x7BFF, 0x7BFF, 0x7C00)
    assert (values[2.0**-24], values[2.0**-25], values[3 * 2.0**-25]) == (1, 0, 2)
    assert len(floats) > 400_000
