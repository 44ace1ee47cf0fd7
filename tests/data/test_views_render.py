"""Values of rendered views against arithmetic that shares no code with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from medspark.data.augment import smooth
from medspark.data.store import Record
from medspark.data.views_draw import Shot
from medspark.data.views_frame import Frame, frame_of, read_frame
from medspark.data.views_noise import normals, philox
from medspark.data.views_render import render
from medspark.data.windows import Intensity, Window

WINDOW = (-1024.0, 31000.0)
PLAIN = Intensity(Window("plain", *WINDOW), 0.0, 1.0)


class ArrayReader:
    """Boxes of one array, as VolumeReader gives them."""

    def __init__(self, hu: np.ndarray) -> None:
        self.hu = hu

    def read(self, record: Record, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        box = self.hu[tuple(slice(b, b + n) for b, n in zip(start, size, strict=True))]
        assert box.shape == tuple(size)
        return box

    def read_into(self, out: np.ndarray, record: Record, start: Sequence[int]) -> None:
        out[...] = self.read(record, start, out.shape)


def box_of(hu: np.ndarray, frame: Frame, memory: Sequence[int] | None = None) -> torch.Tensor:
    """The box of a view, in memory that holds nonsense otherwise."""
    box = torch.full((1, 1, *(memory or frame.memory)), 31111, dtype=torch.int16)
    read_frame(ArrayReader(hu), None, frame, box[0, 0].numpy())  # type: ignore[arg-type]
    return box


def look(
    hu: np.ndarray, mm: Sequence[float], shot: Shot, intensity: Intensity = PLAIN
) -> np.ndarray:
    """A view in HU."""
    frame = frame_of(shot, hu.shape, mm)
    view = render(box_of(hu, frame), [frame], [shot], intensity)
    assert view.dtype == torch.float32
    return intensity.to_hu(view)[0, 0].numpy()


def shot_at(
    centre: Sequence[float], size: Sequence[int], pitch: Sequence[float], **more: object
) -> Shot:
    edges = [n * p for n, p in zip(size, pitch, strict=True)]
    return Shot(0, tuple(size), tuple(centre), tuple(edges), window=WINDOW, **more)  # type: ignore[arg-type]


MM = (2.5, 1.0, 1.5)
SLOPE = np.array([40.0, -30.0, 20.0])  # HU per mm


@pytest.fixture
def ramp() -> np.ndarray:
    """HU that grow linearly with mm: `[24, 50, 40]`, 60 x 50 x 60 mm."""
    z, y, x = (np.arange(n) + 0.5 for n in (24, 50, 40))
    hu = 3000 + 40 * 2.5 * z[:, None, None] - 30 * 1.0 * y[None, :, None] + 20 * 1.5 * x
    assert np.array_equal(hu, np.rint(hu))
    return hu.astype(np.int16)


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(3).integers(-1000, 1000, (20, 22, 24)).astype(np.int16)


def ramp_at(points: np.ndarray) -> np.ndarray:
    return 3000 + points @ SLOPE


def voxels(size: Sequence[int], pitch: Sequence[float]) -> np.ndarray:
    """mm from the centre of a view, `[D, H, W, 3]`."""
    axes = [(np.arange(n) - (n - 1) / 2) * p for n, p in zip(size, pitch, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1)


@pytest.mark.parametrize("pitch", [(1.0, 1.0, 1.0), (2.0, 0.7, 1.3), (0.4, 1.9, 2.9)])
def test_scale_and_place_in_mm(ramp: np.ndarray, pitch: tuple[float, ...]) -> None:
    centre, size = np.array([29.3, 24.1, 31.7]), (6, 8, 10)
    view = look(ramp, MM, shot_at(centre, size, pitch))
    np.testing.assert_allclose(view, ramp_at(centre + voxels(size, pitch)), atol=0.1)


@pytest.mark.parametrize(("axis", "plane"), [(0, (1, 2)), (1, (0, 2)), (2, (0, 1))])
def test_rotation_is_in_mm(ramp: np.ndarray, axis: int, plane: tuple[int, int]) -> None:
    """Content turns from the earlier axis towards the later, with any shape of voxels."""
    centre, size, pitch = np.array([30.0, 25.0, 30.0]), (8, 8, 8), (2.0, 1.5, 1.0)
    angles = [0.0, 0.0, 0.0]
    angles[axis] = 20.0
    view = look(ramp, MM, shot_at(centre, size, pitch, angles=tuple(angles)))
    seen = voxels(size, pitch)
    a, b = seen[..., plane[0]].copy(), seen[..., plane[1]].copy()
    c, s = math.cos(math.radians(20)), math.sin(math.radians(20))
    seen[..., plane[0]], seen[..., plane[1]] = c * a + s * b, -s * a + c * b
    np.testing.assert_allclose(view, ramp_at(centre + seen), atol=0.1)


def test_quarter_turn_is_rot90(noise: np.ndarray) -> None:
    shot = shot_at((10, 10, 10), (8, 8, 8), (1, 1, 1), angles=(90.0, 0.0, 0.0))
    cut = torch.from_numpy(noise[6:14, 6:14, 6:14])
    np.testing.assert_allclose(
        look(noise, (1, 1, 1), shot), torch.rot90(cut, 1, (1, 2)), atol=0.1
    )  # fmt: skip


@pytest.mark.parametrize("axis", range(3))
def test_flip_mirrors_the_finished_view(noise: np.ndarray, axis: int) -> None:
    flips = tuple(a == axis for a in range(3))
    shot = shot_at((12, 9, 13.5), (8, 6, 10), (1.5, 1.0, 1.5), flips=flips)
    box = noise[4:12, 6:12, 4:14]
    np.testing.assert_allclose(look(noise, (1.5, 1.0, 1.5), shot), np.flip(box, axis), atol=0.1)


def test_flip_comes_after_the_turn(ramp: np.ndarray) -> None:
    shot = shot_at((30, 25, 30), (8, 8, 8), (1, 1, 1), angles=(15.0, 0.0, 0.0))
    mirrored = look(ramp, MM, replace(shot, flips=(False, False, True)))
    np.testing.assert_allclose(mirrored, np.flip(look(ramp, MM, shot), 2), atol=0.1)


def test_shift_by_whole_voxels(noise: np.ndarray) -> None:
    shot = shot_at((10.0, 11.0, 12.0), (6, 6, 6), (1, 1, 1))
    moved = replace(shot, centre=(12.0, 8.0, 15.0))
    np.testing.assert_allclose(look(noise, (1, 1, 1), shot), noise[7:13, 8:14, 9:15], atol=0.1)
    np.testing.assert_allclose(look(noise, (1, 1, 1), moved), noise[9:15, 5:11, 12:18], atol=0.1)


def test_air_begins_at_the_face(noise: np.ndarray) -> None:
    """Fine voxels beyond the last centres repeat it up to the face; then there is air."""
    shot = shot_at((0.0, 11.0, 24.0), (16, 6, 16), (0.25, 1.0, 0.25))
    view = look(noise, (1, 1, 1), shot)
    assert (view[:8] == -1024).all()
    assert (view[:, :, 8:] == -1024).all()
    np.testing.assert_allclose(view[8:10, :, 6:8], np.broadcast_to(
        noise[0, 8:14, 23][None, :, None], (2, 6, 2)), atol=0.1)  # fmt: skip
    assert (view[8:, :, :8] > -1010).all()


def test_view_larger_than_the_volume(noise: np.ndarray) -> None:
    view = look(noise, (1, 1, 1), shot_at((9.0, 11.0, 12.0), (26, 26, 26), (1, 1, 1)))
    whole = np.full((26, 26, 26), -1024)
    whole[4:24, 2:24, 1:25] = noise
    np.testing.assert_allclose(view, whole, atol=0.1)


def test_rotated_corners_see_air_outside() -> None:
    shot = shot_at((5, 10, 10), (10, 20, 20), (1, 1, 1), angles=(45.0, 0.0, 0.0))
    view = look(np.full((10, 20, 20), 50, np.int16), (1, 1, 1), shot)
    distance = np.abs(voxels((10, 20, 20), (1, 1, 1))[..., 1:])
    inside = distance.sum(-1) / math.sqrt(2) < 10
    np.testing.assert_allclose(view, np.where(inside, 50, -1024), atol=0.1)


def means_by_counting(column: np.ndarray, mm: float, start: float, width: float, k: int) -> float:
    """Mean of a piecewise constant column over a slab, from 20000 places in it."""
    places = start + width * (k + (np.arange(20000) + 0.5) / 20000)
    inside = places[(places >= 0) & (places < len(column) * mm)]
    return float(column[(inside / mm).astype(int)].mean())


@pytest.mark.parametrize(("thickness", "phase"), [(4.5, 0.0), (5.0, 0.3), (3.7, 0.8), (1.6, 0.9)])
def test_thick_slices_are_means_then_lines(
    noise: np.ndarray, thickness: float, phase: float
) -> None:
    mm, size, pitch = (1.5, 1.0, 1.0), (20, 4, 4), (1.5, 1.0, 1.0)
    centre = np.array([15.0, 11.0, 12.0])
    view = look(noise, mm, shot_at(centre, size, pitch, thickness=thickness, phase=phase))
    z = centre[0] + (np.arange(20) - 9.5) * 1.5
    start = phase * thickness - thickness
    slabs = [k for k in range(40) if start + (k + 1) * thickness > 0 and start + k * thickness < 30]
    for y in range(4):
        column = noise[:, 9 + y, 10]
        means = [means_by_counting(column, 1.5, start, thickness, k) for k in slabs]
        centres = start + (np.array(slabs) + 0.5) * thickness
        np.testing.assert_allclose(view[:, y, 0], np.interp(z, centres, means), atol=1.0)


def test_thin_slices_change_nothing(noise: np.ndarray) -> None:
    shot = shot_at((15.0, 11.0, 12.0), (6, 4, 4), (1.5, 1, 1))
    thin = replace(shot, thickness=1.5, phase=0.4)
    assert np.array_equal(look(noise, (1.5, 1, 1), thin), look(noise, (1.5, 1, 1), shot))


def test_coarse_voxels_are_means_of_what_they_cover(noise: np.ndarray) -> None:
    """Twice and three times as large: no voxel is skipped (no aliasing)."""
    view = look(noise, (1, 1, 1), shot_at((10, 12, 12), (5, 4, 8), (2, 3, 1)))
    blocks = noise[5:15, 6:18, 8:16].reshape(5, 2, 4, 3, 8).astype(float).mean((1, 3))
    np.testing.assert_allclose(view, blocks, atol=0.1)


def test_blur_in_mm(noise: np.ndarray) -> None:
    mm = (2.0, 1.0, 1.0)
    shot = shot_at((20, 11, 12), (12, 14, 16), mm)
    cut = torch.from_numpy(noise[4:16, 4:18, 4:20].astype(np.float32))
    expected = smooth(cut, (0.75, 1.5, 1.5)).numpy()
    np.testing.assert_allclose(look(noise, mm, replace(shot, blur=1.5)), expected, atol=0.2)


def test_contrast_spares_air_and_water() -> None:
    hu = np.full((4, 4, 4), -1000, np.int16)
    hu[1], hu[2], hu[3] = -100, 0, 200
    shot = shot_at((2, 2, 2), (4, 4, 4), (1, 1, 1), contrast=1.15, brightness=12.0)
    view = look(hu, (1, 1, 1), shot)
    np.testing.assert_allclose(view[:, 0, 0], [-988, -88, 12, 242], atol=0.05)


def test_values_in_the_views_own_window() -> None:
    hu = np.array([-500, -60, 0, 140, 900], np.int16).reshape(5, 1, 1)
    intensity = Intensity(Window("w", -160, 240), 0.3, 0.25)
    shot = replace(shot_at((2.5, 0.5, 0.5), (5, 1, 1), (1, 1, 1)), window=(-60.0, 190.0))
    frame = frame_of(shot, hu.shape, (1, 1, 1))
    view = render(box_of(hu, frame), [frame], [shot], intensity).flatten()
    expected = (np.array([0, 0, 0.24, 0.8, 1]) - 0.3) / 0.25
    np.testing.assert_allclose(view, expected, atol=1e-5)


def test_noise_has_its_sd_in_hu() -> None:
    flat = np.full((40, 40, 40), 60, np.int16)
    shot = shot_at((20, 20, 20), (40, 40, 40), (1, 1, 1), noise=17.0, key=(5, 9))
    view = look(flat, (1, 1, 1), shot).astype(float) - 60
    assert view.std() == pytest.approx(17, rel=0.015)  # 64000 values: 4 SDs are 1.1 %
    assert abs(view.mean()) < 0.3
    assert (view**4).mean() / 17**4 == pytest.approx(3, abs=0.12)
    for axis in range(3):  # white
        beside = (view * np.roll(view, 1, axis)).mean() / 17**2
        assert abs(beside) < 0.016
    other = look(flat, (1, 1, 1), replace(shot, key=(5, 10))).astype(float) - 60
    assert abs((view * other).mean()) / 17**2 < 0.016
    assert np.array_equal(look(flat, (1, 1, 1), shot), view + 60)


def test_philox_known_answers() -> None:
    """Vectors that Random123 publishes for philox4x32-10."""
    m = 0xFFFFFFFF
    zero, full = torch.zeros(1, dtype=torch.int64), torch.full((1,), m)
    words = [int(w) for w in philox([zero] * 4, (zero, zero))]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    words = [int(w) for w in philox([full] * 4, (full, full))]
    assert words == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_noise_does_not_know_its_batch(device: torch.device) -> None:
    both = normals([(1, 2), (3, 4)], (5, 7, 3), device)
    assert both.shape == (2, 5, 7, 3)
    assert torch.equal(both[1:], normals([(3, 4)], (5, 7, 3), device))
    assert torch.allclose(both.cpu(), normals([(1, 2), (3, 4)], (5, 7, 3), torch.device("cpu")),
                          atol=1e-4)  # fmt: skip


def test_cut_outs_are_absent(noise: np.ndarray) -> None:
    intensity = Intensity.named("wide")
    shot = replace(shot_at((10, 11, 12), (8, 8, 8), (1, 1, 1)), window=(-1000.0, 1000.0))
    boxes = (((1, 2, 3), (4, 5, 6)), ((0, 0, 0), (1, 8, 2)))
    frame = frame_of(shot, noise.shape, (1, 1, 1))
    plain = render(box_of(noise, frame), [frame], [shot], intensity)[0, 0]
    cut = render(box_of(noise, frame), [frame], [replace(shot, cutouts=boxes)], intensity)[0, 0]
    plain[1:4, 2:5, 3:6] = 0
    plain[0, :, :2] = 0
    assert torch.equal(cut, plain)


def test_a_batch_equals_its_views(noise: np.ndarray, device: torch.device) -> None:
    """Boxes of unlike size in memory for the largest, nonsense around them."""
    plain = shot_at((10, 11, 12), (8, 9, 10), (1, 1, 1))
    shots = [
        plain,
        replace(plain, angles=(10.0, -5.0, 7.0), noise=20.0, key=(1, 2), centre=(3.0, 11.0, 20.0)),
        replace(plain, edges=(18.0, 20.0, 22.0), blur=1.2, flips=(False, True, True)),
        replace(plain, thickness=3.3, phase=0.7, contrast=1.1, brightness=-9.0),
        replace(plain, centre=(19.0, 20.0, 1.0), window=(-200.0, 300.0), thickness=1.1),
        replace(plain, edges=(60.0, 60.0, 40.0), cutouts=(((0, 0, 0), (2, 3, 4)),)),
    ]
    mm = (1.0, 1.0, 1.0)
    frames = [frame_of(shot, noise.shape, mm) for shot in shots]
    memory = [max(f.memory[axis] for f in frames) + 2 for axis in range(3)]
    boxes = torch.cat([box_of(noise, frame, memory) for frame in frames]).to(device)
    intensity = Intensity.named("wide")
    batch = render(boxes, frames, shots, intensity).cpu()
    for view, shot, frame in zip(batch, shots, frames, strict=True):
        alone = render(box_of(noise, frame), [frame], [shot], intensity)[0]
        np.testing.assert_allclose(view, alone, atol=3e-3)
        assert (view - alone).abs().mean() < 1e-4


@pytest.mark.parametrize("phase", [0.0, 0.25, 0.5, 0.75])
def test_the_box_is_large_enough(noise: np.ndarray, phase: float) -> None:
    """A small view equals its part of one that sees the whole volume, slab by slab."""
    whole = shot_at((10, 11, 12), (10, 11, 12), (2, 2, 2), thickness=5.3, phase=phase)
    part = replace(whole, size=(1, 3, 2), edges=(2.0, 6.0, 4.0), centre=(11.0, 15.0, 10.0))
    expected = look(noise, (1, 1, 1), whole)[5:6, 6:9, 4:6]
    np.testing.assert_allclose(look(noise, (1, 1, 1), part), expected, atol=0.1)
