"""Sheared and uneven stacks against the scene they were sampled from."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medspark.data.grid import even_out, straight_axes, straighten
from medspark.data.headers import UnreadableVolume
from medspark.data.io import Volume, read_volume

Writer = Callable[..., Path]
SeriesWriter = Callable[..., list[Path]]


def scene(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """HU at points of the world (LPS, mm); smooth, so that linear interpolation is near it."""
    return 300 * np.sin(x / 12) + 250 * np.cos(y / 14) + 200 * np.sin(z / 17 + y / 40) - 100


def world(volume: Volume) -> np.ndarray:
    """Where every voxel lies, `[3, z, y, x]`."""
    z, y, x = np.meshgrid(*map(np.arange, volume.hu.shape), indexing="ij")
    index = np.stack([x, y, z]) * np.array(volume.spacing[::-1])[:, None, None, None]
    turned = np.einsum("ij,jzyx->izyx", volume.direction, index)
    return turned + np.array(volume.origin)[:, None, None, None]


def _near(empty: np.ndarray) -> np.ndarray:
    """Inner voxels with an empty one beside them: the edge pixel is repeated there."""
    rows = empty[:, :-2, 1:-1] | empty[:, 2:, 1:-1]
    return rows | empty[:, 1:-1, :-2] | empty[:, 1:-1, 2:]


def check_scene(volume: Volume, least: float, edge: bool = True) -> None:
    """Every voxel that a slice covers shows the scene where it says it lies."""
    covered = volume.hu != -1024
    empty = np.pad(volume.hu == -1024, ((0, 0), (1, 1), (1, 1)), constant_values=edge)
    covered &= ~_near(empty)
    assert covered.mean() > least
    expected = scene(*world(volume))
    assert np.abs(volume.hu - expected)[covered].max() < 8
    np.testing.assert_allclose(volume.direction.T @ volume.direction, np.eye(3), atol=1e-9)


@pytest.mark.parametrize("tilt", [-25.0, 4.0, 18.5])
def test_gantry_tilt(tmp_path: Path, write_series: SeriesWriter, tilt: float) -> None:
    lean = 3 * np.tan(np.radians(tilt))
    shape = np.empty((14, 30, 26))
    z, y, x = np.meshgrid(*map(np.arange, shape.shape), indexing="ij")
    hu = scene(10 + x, 20 + 2 * y + lean * z, 30 + 3 * z)
    write_series(tmp_path, np.rint(hu).astype(np.int16), step=(0.0, lean, 3.0))
    volume = read_volume(tmp_path)
    text = f"slices were off by {abs(tilt):.1f} degrees, straightened"
    assert any(text in w for w in volume.warnings)
    assert volume.spacing == (3.0, 2.0, 1.0)
    grown = int(np.ceil(13 * abs(lean) / 2))
    assert volume.hu.shape == (14, 30 + grown, 26)
    check_scene(volume, 0.8 * 26 / (30 + grown))
    as_stored = read_volume(tmp_path, canonical=False)
    np.testing.assert_allclose(as_stored.hu, hu, atol=0.51)
    assert any("left as stored" in w for w in as_stored.warnings)


@pytest.mark.parametrize(("flip", "scaled"), [(1, False), (-1, False), (1, True)])
def test_sheared_nifti(tmp_path: Path, write_image: Writer, flip: int, scaled: bool) -> None:
    """The sform is used, not ITK's squared version of it."""
    # Columns are the steps along i, j, k in RAS mm: k leans 15 degrees towards j.
    axes = np.array([[-1.1, 0, 0.3], [0, -1.9, -0.8 * flip], [0, 0, 2.9 * flip]])
    start = np.array([40.0, 30.0, -20.0])
    z, y, x = np.meshgrid(np.arange(12), np.arange(28), np.arange(32), indexing="ij")
    point = np.einsum("ij,jzyx->izyx", axes, np.stack([x, y, z])) + start[:, None, None, None]
    hu = scene(-point[0], -point[1], point[2])
    path = write_image(tmp_path / "a.nii", np.rint(hu).astype(np.int16))
    data = bytearray(path.read_bytes())
    struct.pack_into("<2h", data, 252, 0, 2)
    if scaled:  # stored as half the value plus 50
        stored = np.rint((hu + 100) / 2).astype("<i2")
        data[352:] = stored.tobytes()
        struct.pack_into("<2f", data, 112, 2.0, -100.0)
    struct.pack_into("<12f", data, 280, *np.column_stack([axes, start]).ravel())
    path.write_bytes(data)
    volume = read_volume(path)
    assert any("straightened" in w for w in volume.warnings)
    check_scene(volume, 0.5)
    np.testing.assert_allclose(volume.spacing, (2.9, 1.9, 1.1), atol=1e-5)


def test_broken_axes() -> None:
    lean = np.tan(np.radians(50))
    steep = np.array([[1, 0, 0], [0, 1, lean], [0, 0, 1]]) / [1, 1, np.hypot(1, lean)]
    with pytest.raises(UnreadableVolume, match="sheared by 50"):
        straight_axes(steep, 1.0, 5)
    flat = np.array([[1, 0.5, 0], [0, np.sqrt(0.75), 0], [0, 0, 1]])
    with pytest.raises(UnreadableVolume, match="miss a right angle by 30"):
        straight_axes(flat, 1.0, 5)
    direction, step, shifts, angle = straight_axes(np.diag([1.0, -1, 1]), 2.0, 5)
    assert (step, shifts, angle) == (2.0, None, 0.0)
    np.testing.assert_array_equal(direction, np.diag([1.0, -1, 1]))


def test_whole_pixels_are_exact() -> None:
    hu = np.random.default_rng(0).integers(-1000, 1000, (3, 4, 5)).astype(np.int16)
    shifts = np.array([[0.0, 0.0], [2.0, -1.5], [4.0, -3.0]])
    out, start = straighten(hu, shifts, (2.0, 1.5), 10**6)
    assert out.shape == (3, 6, 7)
    assert start == (0.0, -3.0)
    for z in range(3):
        row, column = 2 - z, z
        np.testing.assert_array_equal(out[z, row : row + 4, column : column + 5], hu[z])
    assert (out == -1024).sum() == out.size - hu.size
    with pytest.raises(UnreadableVolume, match="over the limit"):
        straighten(hu, shifts * 1000, (2.0, 1.5), 10**4)


def test_even_out() -> None:
    places = np.array([0.0, 2.0, 4.0, 5.0, 9.0])
    hu = (places * 100).astype(np.int16)[:, None, None] + np.zeros((1, 2, 2), np.int16)
    out = even_out(hu, places, 2.0, 10**6)
    np.testing.assert_array_equal(out[:, 0, 1], [0, 200, 400, 600, 800])
    with pytest.raises(UnreadableVolume, match="over the limit"):
        even_out(hu, places, 1e-6, 10**6)


def test_uneven_series(tmp_path: Path, write_series: SeriesWriter) -> None:
    """Refused unless asked for; then each voxel shows the scene where it lies."""
    z = np.array([0, 3, 6, 10, 13, 15.5, 18.5])
    at = np.meshgrid(30 + z, 20 + 2 * np.arange(20), 10 + np.arange(24), indexing="ij")
    hu = np.rint(scene(*at[::-1])).astype(np.int16)
    for i, place in enumerate(z):
        (path,) = write_series(tmp_path / "x", hu[i : i + 1],
                               **{"0020|0032": f"10\\20\\{30 + place:g}"})  # fmt: skip
        path.rename(tmp_path / f"{i}.dcm")
    with pytest.raises(UnreadableVolume, match=r"uneven slice spacing: step 4.000 mm"):
        read_volume(tmp_path)
    volume = read_volume(tmp_path, uneven=True)
    assert volume.hu.shape == (7, 20, 24)
    assert any("steps of 2.50 to 4.00 mm interpolated to 3.00" in w for w in volume.warnings)
    check_scene(volume, 1 - 1e-9, edge=False)


def test_missing_slice_is_never_filled(
    tmp_path: Path, write_series: SeriesWriter, hu: np.ndarray
) -> None:
    write_series(tmp_path, hu)[5].unlink()
    with pytest.raises(UnreadableVolume, match="missing"):
        read_volume(tmp_path, uneven=True)
