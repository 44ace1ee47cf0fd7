"""Which voxels of a volume are body: tissue in one piece, and the air that it encloses."""

from __future__ import annotations

import numpy as np

_TISSUE = -400  # HU, between lung and fat
_OPENING = 2  # voxels of about 4 mm: a couch sheet is thinner


def _tissue(hu: np.ndarray) -> np.ndarray:
    """The largest connected part denser than lung, after opening, bool `[z, y, x]`."""
    import SimpleITK as sitk

    mask = sitk.GetImageFromArray((hu > _TISSUE).astype(np.uint8))
    radius = [_OPENING if n > 4 * _OPENING else 0 for n in mask.GetSize()]
    # Beyond the faces the body goes on: without this the opening would shave a cut-off body.
    margin = [2 * _OPENING] * 3
    padded = sitk.ZeroFluxNeumannPad(mask, margin, margin)
    opened = sitk.Crop(sitk.BinaryMorphologicalOpening(padded, radius), margin, margin)
    parts = sitk.GetArrayFromImage(sitk.ConnectedComponent(opened))
    counts = np.bincount(parts.ravel())
    if len(counts) < 2:
        raise ValueError("no body in the volume: nothing is denser than lung")
    tissue: np.ndarray = parts == 1 + int(counts[1:].argmax())
    return tissue


def body_mask(hu: np.ndarray) -> np.ndarray:
    """Tissue, and what has tissue on three of its four sides in the axial plane (lungs, bowel gas).

    Three, because a volume may be cut off through a lung; the gap between two legs has two.

    Args:
        hu: `[z, y, x]`, voxels of about 4 mm.

    Returns:
        bool `[z, y, x]`.

    Raises:
        ValueError: If nothing is denser than lung.
    """
    tissue = _tissue(hu)
    sides = np.zeros(hu.shape, np.uint8)
    for axis in (1, 2):
        sides += np.logical_or.accumulate(tissue, axis)
        sides += np.flip(np.logical_or.accumulate(np.flip(tissue, axis), axis), axis)
    return tissue | (sides >= 3)


def with_skin(body: np.ndarray) -> np.ndarray:
    """The body and one voxel around it, where its surface fades out."""
    wide = body.copy()
    for axis in range(3):
        low, high = [slice(None)] * 3, [slice(None)] * 3
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        before = wide.copy()
        wide[tuple(low)] |= before[tuple(high)]
        wide[tuple(high)] |= before[tuple(low)]
    return wide
