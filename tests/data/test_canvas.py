from __future__ import annotations

import numpy as np
import pytest

from medspark.data.canvas import Canvas, smooth_noise


def canvas(size: tuple[int, int, int] = (40, 40, 40), warp: float = 0.0) -> Canvas:
    return Canvas(size, (1.0, 1.0, 1.0), 20.0, (0.0, 0.0, 0.0), warp, np.random.default_rng(0))


def volume_of(drawn: Canvas, hu: float) -> float:
    """Volume in body units that a shape of `hu` in air takes, partial voxels included."""
    return float(((drawn.hu + 1000) / (hu + 1000)).sum()) * drawn.pitch**3


@pytest.mark.parametrize("radii", [(0.6, 0.6, 0.6), (0.8, 0.5, 0.3)])
def test_ellipsoid_volume(radii: tuple[float, float, float]) -> None:
    drawn = canvas()
    drawn.ellipsoid((0.05, 0.0, -0.1), radii, 40, 3)
    truth = 4 / 3 * np.pi * np.prod(radii)
    assert volume_of(drawn, 40) == pytest.approx(truth, rel=0.03)
    assert (drawn.labels == 3).sum() * drawn.pitch**3 == pytest.approx(truth, rel=0.03)


def test_tube_volume_and_ends() -> None:
    drawn = canvas()
    drawn.tube([(-0.5, 0, 0), (0.5, 0, 0)], 0.25, 40, 3)
    truth = np.pi * 0.25**2 * 1.0 + 4 / 3 * np.pi * 0.25**3
    assert volume_of(drawn, 40) == pytest.approx(truth, rel=0.05)
    assert drawn.hu[20, 20, 20] == 40
    assert drawn.hu[20, 20, 1] == -1000


def test_axes_and_anisotropy() -> None:
    """x is the last axis and runs up; a shape keeps its place whatever the voxel size."""
    drawn = Canvas((20, 40, 80), (2.0, 1.0, 0.5), 20.0, (0, 0, 0), 0.0, np.random.default_rng(0))
    drawn.ellipsoid((0.5, -0.3, 0.2), (0.3, 0.2, 0.25), 40, 3)
    z, y, x = np.argwhere(drawn.labels == 3).mean(axis=0)
    assert (x - 39.5) * 0.5 / 20 == pytest.approx(0.5, abs=0.02)
    assert (y - 19.5) * 1.0 / 20 == pytest.approx(-0.3, abs=0.02)
    assert (z - 9.5) * 2.0 / 20 == pytest.approx(0.2, abs=0.02)


def test_edges_are_partial() -> None:
    drawn = canvas()
    drawn.ellipsoid((0, 0, 0), (0.6, 0.6, 0.6), 40, 3)
    partial = (drawn.hu > -999) & (drawn.hu < 39)
    surface = 4 * np.pi * (0.6 / drawn.pitch) ** 2
    assert 0.5 * surface < partial.sum() < 2 * surface


def test_clip_cuts() -> None:
    drawn = canvas()
    half = np.broadcast_to(drawn.x, drawn.size)
    drawn.ellipsoid((0, 0, 0), (0.6, 0.6, 0.6), 40, 3, clip=half)
    assert volume_of(drawn, 40) == pytest.approx(2 / 3 * np.pi * 0.6**3, rel=0.05)
    assert not (drawn.labels[:, :, 21:] == 3).any()


def test_out_of_view_changes_nothing() -> None:
    drawn = canvas()
    drawn.ellipsoid((5, 0, 0), (0.3, 0.3, 0.3), 40, 3)
    drawn.tube([(0, 9, 0), (0, 10, 0)], 0.2, 40, 3)
    assert (drawn.hu == -1000).all()


def test_negative_label_paints_hu_only() -> None:
    drawn = canvas()
    drawn.ellipsoid((0, 0, 0), (0.5, 0.5, 0.5), 40, -1)
    assert (drawn.labels == 0).all()
    assert drawn.hu.max() == 40


def test_warp_bends_but_keeps_the_place() -> None:
    straight, bent = canvas(), canvas(warp=0.05)
    for drawn in (straight, bent):
        drawn.ellipsoid((0, 0, 0), (0.6, 0.6, 0.6), 40, 3)
    a, b = straight.labels == 3, bent.labels == 3
    overlap = 2 * (a & b).sum() / (a.sum() + b.sum())
    assert 0.8 < overlap < 0.995


@pytest.mark.parametrize("wave", [1.0, 3.0, 8.0])
def test_noise_statistics(wave: float) -> None:
    noise = smooth_noise((48, 40, 56), wave, np.random.default_rng(1))
    assert noise.shape == (48, 40, 56)
    assert noise.std() == pytest.approx(1, abs=0.15)
    # Neighbours correlate the more, the longer the wave.
    neighbours = np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1]
    low, high = {1.0: (0.5, 0.85), 3.0: (0.9, 0.98), 8.0: (0.98, 1.0)}[wave]
    assert low < neighbours < high


def test_noise_waves_belong_to_axes() -> None:
    noise = smooth_noise((40, 40, 40), [1.0, 4.0, 12.0], np.random.default_rng(1))
    rough = [float(np.abs(np.diff(noise, axis=axis)).mean()) for axis in range(3)]
    assert rough[0] > 2 * rough[1] > 4 * rough[2]
