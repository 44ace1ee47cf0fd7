"""Volumes brought to a chosen spacing, and cropped to the body."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from medspark.data.headers import MAX_BYTES, UnreadableVolume
from medspark.data.io import Volume

Spacing = tuple[float, float, float]
_BODY_HU = -400  # between lung and fat
_COARSE = 4.0  # mm, the grid on which the body is looked for
_TABLE = 2  # coarse voxels; what is thinner (the table, a sheet) is cut off


def resample(volume: Volume, spacing: Spacing, max_bytes: int = MAX_BYTES) -> Volume:
    """Resample linearly to another voxel size (z, y, x) in mm; the outer faces stay in place.

    Samples beyond the centres of the outer voxels take the nearest voxel's value.

    Raises:
        UnreadableVolume: If the result would need more than `max_bytes`.
    """
    import SimpleITK as sitk

    old, new = np.array(volume.spacing), np.array(spacing, dtype=float)
    size = np.maximum(1, np.rint(np.array(volume.hu.shape) * old / new)).astype(int)
    if 2 * math.prod(size.tolist()) > max_bytes:
        raise UnreadableVolume(f"resampling to {spacing} mm would give {size.tolist()} voxels")
    image = sitk.GetImageFromArray(volume.hu)
    image.SetSpacing(old[::-1].tolist())
    start = (np.array(volume.hu.shape) * old - size * new) / 2 + (new - old) / 2
    filter_ = sitk.ResampleImageFilter()
    filter_.SetSize(size[::-1].tolist())
    filter_.SetOutputSpacing(new[::-1].tolist())
    filter_.SetOutputOrigin(start[::-1].tolist())
    # No sample leaves the outer half voxel, where ITK's linear interpolation repeats the edge.
    filter_.SetInterpolator(sitk.sitkLinear)
    filter_.SetNumberOfThreads(1)
    hu = sitk.GetArrayFromImage(filter_.Execute(image))
    origin = np.array(volume.origin) + volume.direction @ start[::-1]
    sd, sh, sw = (float(s) for s in new)
    return replace(volume, hu=hu, spacing=(sd, sh, sw), origin=tuple(origin.tolist()))


def crop_to_body(volume: Volume, margin: float) -> Volume:
    """Cut off the air around the body: its bounding box and `margin` mm on every side.

    The body is the largest connected part above -400 HU after opening, so that the table does not
    count. A volume without one is left as it is.
    """
    import SimpleITK as sitk

    stride = [max(1, round(_COARSE / s)) for s in volume.spacing]
    coarse = volume.hu[tuple(slice(None, None, s) for s in stride)] > _BODY_HU
    mask = sitk.GetImageFromArray(coarse.astype(np.uint8))
    radius = [_TABLE if n > 4 * _TABLE else 0 for n in mask.GetSize()]
    parts = sitk.ConnectedComponent(sitk.BinaryMorphologicalOpening(mask, radius))
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.Execute(parts)
    if not shape.GetLabels():
        return volume
    box = shape.GetBoundingBox(max(shape.GetLabels(), key=shape.GetNumberOfPixels))
    start, stop = [], []
    for axis, (n, s, mm) in enumerate(zip(volume.hu.shape, stride, volume.spacing, strict=True)):
        low, count = box[2 - axis], box[5 - axis]
        extra = math.ceil(margin / mm)
        start.append(max(0, (low - 1) * s + 1 - extra))
        stop.append(min(n, (low + count) * s + extra))
    cut = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    shift = np.array([a * mm for a, mm in zip(start, volume.spacing, strict=True)])
    x, y, z = np.array(volume.origin) + volume.direction @ shift[::-1]
    hu = np.ascontiguousarray(volume.hu[cut])
    return replace(volume, hu=hu, origin=(float(x), float(y), float(z)))
