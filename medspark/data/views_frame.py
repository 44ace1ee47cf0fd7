"""Which voxels a view needs, and where in them each of its own voxels lies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from medspark.data.augment import rotation
from medspark.data.reader import VolumeReader
from medspark.data.store import Record
from medspark.data.views_draw import Shot, triple
from medspark.data.views_policy import Triple, ViewPolicy

_SLACK = 1e-6


@dataclass(frozen=True)
class Frame:
    """A box of stored voxels for one view, inside the volume. Axes (z, y, x).

    Attributes:
        low: First voxel in the volume.
        extent: Voxels.
        volume: mm from face to face of the volume.
        spacing: mm of a stored voxel.
        slabs: mm over which an axis is averaged before it is sampled, 0 for none: simulated slices
            along z, and whole voxels where the view's are at least twice as large (aliasing).
        starts: mm where a slab begins, in the volume.
    """

    low: tuple[int, int, int]
    extent: tuple[int, int, int]
    volume: Triple
    spacing: Triple
    slabs: Triple
    starts: Triple

    @property
    def memory(self) -> tuple[int, int, int]:
        """Least voxels to render in: averaging may cut n voxels into n + 1 slabs."""
        z, y, x = (n + (width > 0) for n, width in zip(self.extent, self.slabs, strict=True))
        return z, y, x


def turn(shot: Shot) -> np.ndarray:
    """`[3, 3]`, mm from the centre of a view to mm from the same point of the volume."""
    return rotation(np.radians(shot.angles), 3).T


def frame_of(
    shot: Shot, size: Sequence[int], spacing: Sequence[float], *, flat: bool = False
) -> Frame:
    """The box of voxels that a view is made of.

    Args:
        shot: The view.
        size: Voxels (z, y, x) of the volume.
        spacing: mm (z, y, x) of the volume.
        flat: Whether the view is a single slice, which has no extent along z.
    """
    mm, centre, edges = np.array(spacing, float), np.array(shot.centre), np.array(shot.edges)
    whole = np.floor(shot.pitch / mm + _SLACK)
    slabs = np.where(whole >= 2, whole * mm, 0.0)
    phase = centre - edges / 2  # slabs are the view's own voxels where these are whole
    if flat:
        edges[0], slabs[0] = 0.0, 0.0
    if shot.thickness > max(mm[0], slabs[0]):
        slabs[0], phase[0] = shot.thickness, shot.phase * shot.thickness
    half = np.abs(turn(shot)) @ edges / 2 + 1.5 * slabs
    low = np.floor((centre - half) / mm - 0.5 - _SLACK)
    stop = np.ceil((centre + half) / mm - 0.5 + _SLACK) + 1
    low = np.clip(low, 0, np.array(size) - 1)
    extent = np.clip(stop, low + 1, size) - low
    width = np.where(slabs > 0, slabs, 1.0)
    starts = np.floor((low * mm - phase) / width) * width + phase
    return Frame(_whole(low), _whole(extent), triple(size * mm), triple(mm), triple(slabs),
                 triple(starts))  # fmt: skip


def _whole(values: np.ndarray) -> tuple[int, int, int]:
    z, y, x = (int(v) for v in values)
    return z, y, x


def greatest_extent(
    policy: ViewPolicy, spacings: Sequence[Sequence[float]], view: int
) -> tuple[int, int, int]:
    """Voxels that hold every box of view number `view`, for memory that is used again."""
    local = view >= policy.n_global
    edges = policy.edges((policy.local_edge_mm if local else policy.edge_mm)[1], local=local)
    edges[policy.free] *= policy.aspect
    edges[: policy.free.start] = 0.0
    # sin and cos of an angle up to a right one are at most those of the limit, or 1.
    angle = np.radians(np.minimum(policy.rotate, 90.0))
    reach = np.eye(3)
    for limit, (a, b) in zip(angle, ((1, 2), (0, 2), (0, 1)), strict=True):
        plane = np.eye(3)
        plane[a, b] = plane[b, a] = math.sin(limit)
        reach = reach @ plane
    half = reach.T @ edges / 2
    thick = policy.thickness_mm[1] if policy.thickness_share else 0.0
    pitch = edges / policy.size_of(view)
    most = np.zeros(3)
    for spacing in spacings:
        mm = np.array(spacing, float)
        slabs = pitch + np.array([thick, 0.0, 0.0])
        most = np.maximum(most, 2 * (half + 1.5 * slabs) / mm + 5)
    z, y, x = np.ceil(most).astype(int).tolist()
    return z, y, x


def read_frame(reader: VolumeReader, record: Record, frame: Frame, out: np.ndarray) -> None:
    """Fill the first corner of int16 `out` with a frame, and close it; the rest stays as it is.

    Raises:
        ValueError: If `out` is smaller than the frame.
        DamagedVolume: If the volume cannot be read.
    """
    if any(n < e for n, e in zip(out.shape, frame.memory, strict=True)):
        raise ValueError(f"memory of {out.shape} voxels is too small for {frame.memory}")
    if out.shape == frame.extent and out.flags.c_contiguous:
        reader.read_into(out, record, frame.low)
        return
    z, y, x = frame.extent
    out[:z, :y, :x] = reader.read(record, frame.low, frame.extent)
    close(out, frame.extent)


def close(box: np.ndarray | Tensor, extent: Sequence[int]) -> None:
    """Repeat the last layer of the first corner, so that half a voxel beyond it means the same.

    On the near side, and where the memory ends with the box, the sampling itself does that.

    Args:
        box: `[Z, Y, X]`.
        extent: Voxels of the corner.
    """
    for axis, n in enumerate(extent):
        if n < box.shape[axis]:
            layers = box if axis == 0 else box.swapaxes(0, axis)
            layers[n] = layers[n - 1]


def slab_matrix(frame: Frame, axis: int) -> np.ndarray:
    """Means over slabs: float32 `[slabs, voxels]`, whose rows weigh voxels by their share.

    A slab that the box holds in part is the mean of that part: the volume ends there, or no view
    reaches it.
    """
    width, start, mm = frame.slabs[axis], frame.starts[axis], frame.spacing[axis]
    faces = (frame.low[axis] + np.arange(frame.extent[axis] + 1)) * mm
    count = math.ceil((faces[-1] - start) / width - _SLACK)
    first = start + width * np.arange(count)[:, None]
    share = np.minimum(first + width, faces[1:]) - np.maximum(first, faces[:-1])
    share = np.clip(share, 0, None)
    return (share / np.maximum(share.sum(1, keepdims=True), _SLACK)).astype(np.float32)


def sampling(shot: Shot, frame: Frame, shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """From places in the view to places in the (averaged) box, each -1 to 1 from face to face.

    Args:
        shot: The view.
        frame: Its box.
        shape: Voxels of the memory in whose first corner the box lies.

    Returns:
        `[3, 3]` and `[3]`, float64: box = matrix @ view + offset.
    """
    slabs, spacing = np.array(frame.slabs), np.array(frame.spacing)
    step = np.where(slabs > 0, slabs, spacing)
    origin = np.where(slabs > 0, frame.starts, np.array(frame.low) * spacing)
    scale = 2 / (step * np.array(shape))
    return _turned(shot) * scale[:, None], (np.array(shot.centre) - origin) * scale - 1


def _turned(shot: Shot) -> np.ndarray:
    """From places in the view, -1 to 1, to mm from its centre."""
    return turn(shot) * (np.where(shot.flips, -1.0, 1.0) * np.array(shot.edges) / 2)[None, :]


def leaves(shot: Shot, frame: Frame) -> bool:
    """Whether a part of the view lies outside the volume."""
    half = np.abs(turn(shot)) @ shot.edges / 2
    low, high = np.array(shot.centre) - half, np.array(shot.centre) + half
    return bool((low < -_SLACK).any() or (high > np.array(frame.volume) + _SLACK).any())


def in_volume(shot: Shot, frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """From places in the view to places in the volume; as `sampling`."""
    scale = 2 / np.array(frame.volume)
    return _turned(shot) * scale[:, None], np.array(shot.centre) * scale - 1
