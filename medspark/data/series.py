"""DICOM slices put together: which belong to one volume, in what order, on what grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from medspark.data.dicom import FRAMES, PIXEL_SPACING, SERIES_UID, Slice, numbers
from medspark.data.headers import UnreadableVolume


def group_series(slices: Iterable[Slice]) -> list[list[Slice]]:
    """Group by SeriesInstanceUID and slice orientation; a localizer does not join its series.

    The order of files is kept inside a group, groups come in order of their first file.
    """
    groups: list[list[Slice]] = []
    by_uid: dict[str, list[list[Slice]]] = {}
    for item in slices:
        same_uid = by_uid.setdefault(_series_key(item), [])
        for group in same_uid:
            if _same_plane(group[0], item):
                group.append(item)
                break
        else:
            same_uid.append([item])
            groups.append(same_uid[-1])
    return groups


def _series_key(item: Slice) -> str:
    if item.tags.get(FRAMES, "1") not in ("", "1"):
        return str(item.path)  # a multi-frame object is a volume of its own
    return item.tags.get(SERIES_UID) or str(item.path.parent)


def _same_plane(a: Slice, b: Slice) -> bool:
    if a.axes is None or b.axes is None:
        return a.axes is b.axes
    return bool(np.allclose(a.axes, b.axes, atol=1e-2))


@dataclass(frozen=True)
class Geometry:
    """Grid of a sorted series.

    Attributes:
        order: Slices sorted along the slice normal.
        spacing: Step along (x, y, z) in mm; z is the distance of slice planes.
        origin: Centre of the first voxel in mm (LPS).
        direction: Columns are unit vectors of the array axes (i, j, k), `[3, 3]`.
        shifts: mm by which each slice lies off the normal through the first one, along (i, j),
            `[slices, 2]`: zero but for a tilted gantry.
        tilt: Angle in degrees between the line of slice origins and the slice normal.
        places: mm of each slice along the normal from the first one; None where steps are even.
    """

    order: list[Slice]
    spacing: np.ndarray
    origin: np.ndarray
    direction: np.ndarray
    shifts: np.ndarray
    tilt: float
    places: np.ndarray | None


def series_geometry(
    slices: list[Slice], *, tolerance: float = 0.01, uneven: bool = False
) -> Geometry:
    """Sort a series by position along its normal and check that the steps are even.

    Args:
        slices: At least two slices of one series, or one (its thickness is then unknown: 1 mm).
        tolerance: Largest allowed deviation of a step, as a fraction of the median step.
        uneven: Accept steps that differ, up to twice the median; `places` then says where the
            slices lie.

    Raises:
        UnreadableVolume: For missing positions, repeated positions, uneven or missing slices.
    """
    first = slices[0]
    pixel = numbers(first.tags, PIXEL_SPACING, 2)
    if first.axes is None or pixel is None or any(s.position is None for s in slices):
        raise UnreadableVolume("ImagePositionPatient, ImageOrientationPatient or PixelSpacing lack")
    if (pixel <= 0).any():
        raise UnreadableVolume(f"PixelSpacing is {pixel.tolist()}, it must be positive")
    normal = np.cross(first.axes[0], first.axes[1])
    normal /= np.linalg.norm(normal)
    positions = np.array([s.position for s in slices])
    order = np.argsort(positions @ normal, kind="stable")
    offsets = positions[order] - positions[order[0]]
    along = offsets @ normal
    step, even = _step(along, tolerance, uneven)
    shifts = offsets @ first.axes.T
    across = float(np.linalg.norm(shifts[-1]))
    return Geometry(
        order=[slices[i] for i in order],
        spacing=np.array([pixel[1], pixel[0], step]),
        origin=positions[order[0]],
        direction=np.stack([first.axes[0], first.axes[1], normal], axis=1),
        shifts=shifts,
        tilt=float(np.degrees(np.arctan2(across, along[-1]))) if len(along) > 1 else 0.0,
        places=None if even else along,
    )


def _step(along: np.ndarray, tolerance: float, uneven: bool) -> tuple[float, bool]:
    """Distance of slices in mm, and whether it is the same everywhere."""
    if len(along) == 1:
        return 1.0, True
    steps = np.diff(along)
    if (steps < 1e-3).any():
        raise UnreadableVolume(_repeats(along))
    step = float(np.median(steps))
    worst = int(np.argmax(np.abs(steps - step)))
    if abs(steps[worst] - step) <= tolerance * step:
        return float(along[-1] / (len(along) - 1)), True
    if uneven and steps.max() <= 2 * step * (1 - tolerance):
        return step, False
    ratio = steps[worst] / step
    missing = round(ratio) >= 2 and abs(ratio - round(ratio)) <= tolerance * 2
    what = f"{round(ratio) - 1} slice(s) missing" if missing else "uneven slice spacing"
    hint = (
        "" if missing or steps.max() > 2 * step * (1 - tolerance) else " (uneven=true interpolates)"
    )
    raise UnreadableVolume(
        f"{what}: step {steps[worst]:.3f} mm after slice {worst + 1}, usual step {step:.3f} mm"
        + hint
    )


def _repeats(along: np.ndarray) -> str:
    times = set(Counter(np.round(along, 2).tolist()).values())
    places = len(along) // min(times)
    if len(times) == 1 and places > 1:
        return (
            f"4D series: {min(times)} images at each of {places} positions (phases or time "
            "points): send each phase as a series of its own"
        )
    repeated = int((np.diff(along) < 1e-3).sum())
    return (
        f"{repeated} of {len(along)} slices repeat a position with other pixels: two "
        "reconstructions in one series, or part of a 4D series"
    )
