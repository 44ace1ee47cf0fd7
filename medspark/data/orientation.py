"""Orientation of volumes: axis letters, and turning to the canonical LPS without resampling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medspark.data.headers import UnreadableVolume

_PAIRS = ("RL", "AP", "IS")  # world axes x, y, z in LPS: negative end, positive end


def orientation_letters(direction: np.ndarray) -> str:
    """Sides (of L/R, P/A, S/I) towards which the x, y, z axes run, such as "LPS".

    Args:
        direction: `[3, 3]`, columns are the axes in the LPS frame.

    Raises:
        UnreadableVolume: If two axes run along the same line.
    """
    size = np.abs(direction).astype(float)
    letters = ["", "", ""]
    for _ in range(3):
        world, axis = np.unravel_index(int(np.argmax(size)), (3, 3))
        if size[world, axis] <= 0:
            raise UnreadableVolume("the axes of the volume are not independent")
        letters[axis] = _PAIRS[world][int(direction[world, axis] > 0)]
        size[world, :] = -1
        size[:, axis] = -1
    return "".join(letters)


def _world_axes(letters: str) -> list[int]:
    return [next(i for i, pair in enumerate(_PAIRS) if letter in pair) for letter in letters]


def to_lps(array: np.ndarray, letters: str) -> np.ndarray:
    """Turn a stored `[z, y, x]` array whose axes run towards `letters` (x, y, z) to LPS (a view).

    The result's axes (z, y, x) run towards S, P, L.
    """
    world = _world_axes(letters)
    turned = array.transpose(*(2 - world.index(axis) for axis in (2, 1, 0)))
    flips = [letters[world.index(axis)] == _PAIRS[axis][0] for axis in (2, 1, 0)]
    return turned[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]


def lps_spacing(spacing: Sequence[float], letters: str) -> tuple[float, float, float]:
    """Spacing (z, y, x) of a stored array whose axes run towards `letters`, after `to_lps`."""
    world = _world_axes(letters)
    x, y, z = (spacing[2 - world.index(axis)] for axis in range(3))
    return z, y, x


def lps_geometry(
    shape: tuple[int, ...],
    letters: str,
    spacing: np.ndarray,
    origin: np.ndarray,
    direction: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spacing, origin and direction (x, y, z as in ITK) of a stored grid, after `to_lps`.

    Args:
        shape: Size (z, y, x) of the stored array.
        letters: Its orientation.
        spacing: mm (x, y, z).
        origin: Centre of its first voxel, mm (x, y, z), LPS frame.
        direction: `[3, 3]`, columns are its axes.
    """
    world = _world_axes(letters)
    from_axis = [world.index(axis) for axis in range(3)]
    sign = np.array([1 if letters[i] == _PAIRS[a][1] else -1 for a, i in enumerate(from_axis)])
    length = np.array([(shape[2 - i] - 1) * spacing[i] for i in from_axis])
    columns = direction[:, from_axis]
    start = origin + (columns * np.where(sign < 0, length, 0)).sum(axis=1)
    return spacing[from_axis], start, columns * sign
