"""Drawing soft-edged shapes in HU into a volume: what the phantoms are made with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Point = tuple[float, float, float]
Box = tuple[slice, slice, slice]


class Canvas:
    """A HU volume, its labels, and the (slightly warped) body coordinates of every voxel.

    Coordinates are body units: x towards L, y towards P, z towards S, one unit is half the width
    of the body. A shape is a signed distance (negative inside); a voxel that its surface crosses
    gets a share of both tissues, which is the partial-volume effect.

    Args:
        size: Voxels (z, y, x).
        spacing: mm (z, y, x).
        unit: mm in a body unit.
        centre: Body coordinates (x, y, z) of the middle of the volume.
        warp: Amplitude of the smooth random warp, body units.
        rng: Source of the warp.
    """

    def __init__(
        self,
        size: Sequence[int],
        spacing: Sequence[float],
        unit: float,
        centre: Point,
        warp: float,
        rng: np.random.Generator,
    ) -> None:
        self.size = tuple(size)
        self.step = np.array(spacing) / unit  # body units per voxel, (z, y, x)
        self.pitch = float(np.cbrt(np.prod(self.step)))
        self.hu = np.full(self.size, -1000, np.float32)
        self.labels = np.zeros(self.size, np.uint8)
        self._axes = [
            (c + (np.arange(n) - (n - 1) / 2) * s).astype(np.float32)
            for n, s, c in zip(self.size, self.step, centre[::-1], strict=True)
        ]
        self._reach = 3 * warp + 2 * float(self.step.max())
        grids = np.meshgrid(*self._axes, indexing="ij", sparse=True)
        waves = (0.5 / self.step).tolist()  # the warp's wave length: half a body unit
        self.z, self.y, self.x = (g + warp * smooth_noise(self.size, waves, rng) for g in grids)

    def box(self, low: Point, high: Point) -> Box | None:
        """Voxels that may lie between two corners (x, y, z), or None if none does."""
        slices = []
        for axis, a, b in zip(self._axes, low[::-1], high[::-1], strict=True):
            start, stop = np.searchsorted(axis, (a - self._reach, b + self._reach))
            if start >= stop:
                return None
            slices.append(slice(int(start), int(stop)))
        return slices[0], slices[1], slices[2]

    def blend(self, box: Box, distance: np.ndarray, hu: float, label: int) -> None:
        """Draw a shape, given its signed distance at the voxels of a box."""
        share = np.clip(0.5 - distance / self.pitch, 0, 1)
        region = self.hu[box]
        region += share * (hu - region)
        if label >= 0:
            self.labels[box][share > 0.5] = label

    def ellipsoid(
        self,
        centre: Point,
        radii: Point,
        hu: float,
        label: int,
        *,
        clip: np.ndarray | None = None,
    ) -> None:
        """Draw an ellipsoid, cut where the signed distance `clip` (whole volume) is positive."""
        low = (centre[0] - radii[0], centre[1] - radii[1], centre[2] - radii[2])
        high = (centre[0] + radii[0], centre[1] + radii[1], centre[2] + radii[2])
        box = self.box(low, high)
        if box is None:
            return
        distance = self.ellipsoid_distance(box, centre, radii)
        if clip is not None:
            distance = np.maximum(distance, clip[box])
        self.blend(box, distance, hu, label)

    def ellipsoid_distance(self, box: Box, centre: Point, radii: Point) -> np.ndarray:
        """First-order signed distance to an ellipsoid: f / |grad f| of the implicit form."""
        scaled = [
            (c[box] - m) / r
            for c, m, r in zip((self.x, self.y, self.z), centre, radii, strict=True)
        ]
        norm = np.sqrt(sum(s * s for s in scaled))
        slope = np.sqrt(sum((s / r) ** 2 for s, r in zip(scaled, radii, strict=True)))
        return norm * (norm - 1) / np.maximum(slope, 1e-6)

    def tube(
        self,
        points: Sequence[Point],
        radius: float | Sequence[float],
        hu: float,
        label: int,
        *,
        clip: np.ndarray | None = None,
    ) -> None:
        """Draw round-ended segments along a polyline; one radius, or one for each point."""
        radii = [radius] * len(points) if isinstance(radius, float | int) else list(radius)
        for a, b, ra, rb in zip(points, points[1:], radii, radii[1:], strict=False):
            self._segment(np.array(a), np.array(b), (float(ra), float(rb)), hu, label, clip)

    def _segment(
        self,
        a: np.ndarray,
        b: np.ndarray,
        radii: tuple[float, float],
        hu: float,
        label: int,
        clip: np.ndarray | None,
    ) -> None:
        thick = max(radii)
        low, high = np.minimum(a, b) - thick, np.maximum(a, b) + thick
        box = self.box((low[0], low[1], low[2]), (high[0], high[1], high[2]))
        if box is None:
            return
        axis = b - a
        rel = [c[box] - float(m) for c, m in zip((self.x, self.y, self.z), a, strict=True)]
        along = sum(r * float(d) for r, d in zip(rel, axis, strict=True))
        along = np.clip(along / max(float(axis @ axis), 1e-9), 0, 1)
        square = sum((r - along * float(d)) ** 2 for r, d in zip(rel, axis, strict=True))
        distance = np.sqrt(square) - (radii[0] + along * (radii[1] - radii[0]))
        if clip is not None:
            distance = np.maximum(distance, clip[box])
        self.blend(box, distance, hu, label)


def smooth_noise(
    size: Sequence[int], wave: Sequence[float] | float, rng: np.random.Generator
) -> np.ndarray:
    """Correlated Gaussian noise of SD about 1: a coarse random grid under a cubic B-spline.

    Args:
        size: Voxels (z, y, x).
        wave: Distance of grid points in voxels, one or one for each axis.
        rng: Source of the grid.
    """
    waves = np.broadcast_to(np.asarray(wave, dtype=float), (3,))
    weights = [_spline(n, max(float(w), 1.0)) for n, w in zip(size, waves, strict=True)]
    field = rng.standard_normal([w.shape[1] for w in weights], dtype=np.float32)
    for w in weights:
        # Each turn contracts the first axis and appends the fine one: three turns restore order.
        field = np.tensordot(field, w, axes=(0, 1))
    return np.ascontiguousarray(field)


def _spline(n: int, wave: float) -> np.ndarray:
    """Weights `[n, grid]` of cubic B-splines on a grid of pitch `wave`, rows of unit norm."""
    grid = int(np.ceil(n / wave)) + 4
    distance = np.abs(np.arange(n)[:, None] / wave - (np.arange(grid) - 1.5)[None])
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = np.clip(2 - distance, 0, None) ** 3 / 6
    weights = np.where(distance < 1, near, far)
    return (weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32)
