"""Planted bad series are found, sound ones are left alone (the whole corpus: test_ingest)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medspark.data.io import read_volume
from medspark.data.suspects import suspicions

SeriesWriter = Callable[..., list[Path]]


def body(n: int, size: int, seed: int) -> np.ndarray:
    """A body of ellipses that drift and change along z, with noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    hu = np.full((n, size, size), -1000.0)
    parts = rng.uniform(-0.5, 0.5, (9, 2))
    drift = rng.uniform(-1.0, 1.0, (9, 4))
    for z in range(n):
        t = z / n
        hu[z][(x / 0.85) ** 2 + (y / (0.6 + 0.15 * np.sin(5 * t))) ** 2 < 1] = 40
        for (cy, cx), (dy, dx, wide, value) in zip(parts, drift, strict=True):
            r = 0.18 + 0.1 * np.sin(4 * t + 6 * wide)
            inside = (x - cx - 0.6 * dx * t) ** 2 + (y - cy - 0.6 * dy * t) ** 2 < r**2
            hu[z][inside] = 700 * value
    return np.rint(hu + rng.normal(0, 15, hu.shape)).clip(-1024, 3000).astype(np.int16)


def sheets(hu: np.ndarray, rows: int, columns: int, gutter: int) -> np.ndarray:
    """Slices pasted onto sheets of panels."""
    per, (h, w) = rows * columns, hu.shape[1:]
    out = np.full((len(hu) // per, rows * (h + gutter), columns * (w + gutter)), -1024, np.int16)
    for i, plane in enumerate(hu[: len(out) * per]):
        sheet, place = divmod(i, per)
        top, left = place // columns * (h + gutter), place % columns * (w + gutter)
        out[sheet, top : top + h, left : left + w] = plane
    return out


@pytest.mark.parametrize("seed", range(6))
def test_sound_bodies(seed: int) -> None:
    assert suspicions(body(40, 64, seed)) == []


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("rows", "columns", "gutter"),
    [(2, 2, 0), (3, 3, 0), (4, 5, 2), (1, 3, 0), (6, 4, 0), (3, 2, 4)],
)
def test_montages(seed: int, rows: int, columns: int, gutter: int) -> None:
    found = suspicions(sheets(body(96, 48, seed), rows, columns, gutter))
    assert found
    assert found[0].startswith("montage: slices look like")


@pytest.mark.parametrize("seed", range(4))
def test_two_bodies_in_one_stack(seed: int) -> None:
    a, b = body(30, 64, seed), body(24, 64, seed + 50)
    b = np.maximum(b - 150, -1024)  # another kernel, another place
    found = suspicions(np.concatenate([a, np.roll(b, 6, axis=2)]))
    assert any(f.startswith("stitched: slices 30 and 31 differ") for f in found), found


@pytest.mark.parametrize("seed", range(4))
def test_two_phases_in_one_stack(seed: int) -> None:
    a = body(24, 64, seed)
    late = np.where(a > 100, a + 80, a)
    noise = np.random.default_rng(seed).normal(0, 15, a.shape)
    found = suspicions(np.concatenate([a, (late + noise).astype(np.int16)]))
    assert any(f.startswith("stitched: slices repeat after 24") for f in found), found


def test_stitched_real_bodies(real_data: Path) -> None:
    """Two patients put on one grid, and one patient twice."""
    a = read_volume(real_data / "ct/chest_lidc0314.nii.gz").hu[:, 20:148, 40:168]
    b = read_volume(real_data / "ct/abdomen_totalseg_example.nii.gz").hu[:, :96, :96]
    b = np.pad(b, ((0, 0), (16, 16), (16, 16)), constant_values=-1000)
    found = suspicions(np.concatenate([a, b]))
    assert [f for f in found if f.startswith("stitched: slices 110 and 111")], found
    twice = suspicions(np.concatenate([a, np.minimum(a + 15, 400)]))
    assert [f for f in twice if f.startswith("stitched: slices repeat after 110")], twice
    assert suspicions(sheets(a, 3, 4, 0))[0].startswith("montage: slices look like 3 x 4 panels")


def test_body_that_hardly_changes() -> None:
    """A leg is like itself at any distance; that is no repetition."""
    one = body(1, 64, 3)[0].astype(float)
    noise = np.random.default_rng(0).normal(0, 10, (40, 64, 64))
    assert suspicions(np.rint(one + noise).clip(-1024).astype(np.int16)) == []


def test_few_slices_and_flat_ones() -> None:
    assert suspicions(np.full((2, 5, 5), -1000, np.int16)) == []
    assert suspicions(np.full((30, 40, 40), 7, np.int16)) == []
    assert suspicions(body(3, 32, 0)) == []
