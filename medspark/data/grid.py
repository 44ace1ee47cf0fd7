"""Volumes put on a rectangular, even grid: gantry tilt, sheared affines, uneven slices."""

from __future__ import annotations

import numpy as np

from medspark.data.headers import AIR, STRAIGHT, UnreadableVolume, shear_angle

MAX_SHEAR = 45.0  # degrees; no gantry tilts further than 30


def straight_axes(
    direction: np.ndarray, step: float, slices: int
) -> tuple[np.ndarray, float, np.ndarray | None, float]:
    """Split sheared axes into right-angled ones and a shift of each slice.

    Args:
        direction: `[3, 3]`, columns are unit vectors of the axes i, j, k.
        step: mm from slice to slice along k.
        slices: Number of slices.

    Returns:
        Right-angled direction (i, j and their normal), mm between slice planes, the shift of each
        slice along (i, j) in mm `[slices, 2]` (None if the axes are straight), and the shear in
        degrees.

    Raises:
        UnreadableVolume: If the axes within a slice are not at right angles, or the slices are
            sheared by more than 45 degrees.
    """
    angle = shear_angle(direction)
    if angle <= STRAIGHT:
        return direction, step, None, angle
    i, j, k = direction.T
    inside = float(np.degrees(np.arcsin(min(1.0, abs(i @ j)))))
    if inside > STRAIGHT:
        raise UnreadableVolume(
            f"rows and columns of a slice miss a right angle by {inside:.1f} degrees"
        )
    if angle > MAX_SHEAR:
        raise UnreadableVolume(f"slices are sheared by {angle:.1f} degrees: a broken header")
    normal = np.cross(i, j)
    normal *= np.sign(normal @ k) / np.linalg.norm(normal)
    shifts = np.arange(slices)[:, None] * step * np.array([k @ i, k @ j])
    return np.stack([i, j, normal], axis=1), step * float(k @ normal), shifts, angle


def straighten(
    hu: np.ndarray, shifts: np.ndarray, pixel: tuple[float, float], max_voxels: int
) -> tuple[np.ndarray, tuple[float, float]]:
    """Move each slice in its plane to where it was scanned; the grid grows so nothing is cut off.

    Linear between pixels; what no slice covers is air.

    Args:
        hu: int16 `[z, y, x]`.
        shifts: mm of each slice along (x, y), `[z, 2]`.
        pixel: mm between pixels along (x, y).
        max_voxels: Refuse a result with more.

    Returns:
        The volume, and the mm along (x, y) from the old first pixel to the new one.

    Raises:
        UnreadableVolume: If the result would be too large.
    """
    moved = shifts / np.array(pixel)
    low, high = np.floor(moved.min(axis=0)), np.ceil(moved.max(axis=0))
    grown = (high - low).astype(int)
    shape = (len(hu), hu.shape[1] + int(grown[1]), hu.shape[2] + int(grown[0]))
    if shape[0] * shape[1] * shape[2] > max_voxels:
        raise UnreadableVolume(f"straightened it would have {shape} voxels, over the limit")
    out = np.full(shape, AIR, np.int16)
    for plane, target, (x, y) in zip(hu, out, moved - low, strict=True):
        column, row = int(x), int(y)
        part = _between(_between(plane.astype(np.float32), y - row, 0), x - column, 1)
        h, w = part.shape
        target[row : row + h, column : column + w] = np.rint(part)
    return out, (float(low[0] * pixel[0]), float(low[1] * pixel[1]))


def _between(plane: np.ndarray, fraction: float, axis: int) -> np.ndarray:
    """Shift by less than a pixel along an axis; one line longer unless the shift is zero."""
    if fraction < 1e-3:
        return plane
    # Beyond the edge its value is repeated: mixing it with air would draw a false contour.
    before = np.concatenate([plane, plane.take([-1], axis)], axis)
    after = np.concatenate([plane.take([0], axis), plane], axis)
    return (1 - fraction) * before + fraction * after


def even_out(hu: np.ndarray, places: np.ndarray, step: float, max_voxels: int) -> np.ndarray:
    """Interpolate linearly from uneven slice places to even ones.

    Args:
        hu: int16 `[z, y, x]`.
        places: mm of each slice from the first, increasing.
        step: mm between slices of the result, which starts at the first slice.
        max_voxels: Refuse a result with more.

    Raises:
        UnreadableVolume: If the result would be too large.
    """
    count = int(places[-1] / step + 1e-6) + 1
    if count * hu.shape[1] * hu.shape[2] > max_voxels:
        raise UnreadableVolume(f"with even steps it would have {count} slices, over the limit")
    wanted = np.arange(count) * step
    below = np.clip(np.searchsorted(places, wanted, side="right") - 1, 0, len(places) - 2)
    share = (wanted - places[below]) / (places[below + 1] - places[below])
    out = np.empty((count, *hu.shape[1:]), np.int16)
    for z, (at, part) in enumerate(zip(below, share, strict=True)):
        out[z] = np.rint((1 - part) * hu[at] + part * hu[at + 1])
    return out
