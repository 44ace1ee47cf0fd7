"""Which DICOM series are CT volumes in HU, by their tags; copies of slices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medspark.data import dicom
from medspark.data.dicom import Slice
from medspark.data.headers import UnreadableVolume
from medspark.data.pixels import check_syntax, rescale_of, same_pixels

# Values of ImageType (PS3.3 C.8.2.1, C.8.15.2) and vendors' own, and what such images are.
_NO_VOLUME = {
    "a localizer (scout)": ("LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW", "SCANOGRAM"),
    "a parametric map, not HU": ("PERFUSION", "RCBF", "RCBV", "CBF", "CBV", "MTT", "TTP", "TMAX",
        "SUBTRACTION", "STD_DEVIATION", "QUANTITY", "EFF_ATOMIC_NUM", "ELECTRON_DENSITY",
        "MAT_SPECIFIC", "MAT_FRACTIONAL", "MAT_VALUE_BASED"),
    "a projection": ("PROJECTION IMAGE", "MIP", "MINIP", "VOLUME_RENDER", "MAXIMUM", "MINIMUM"),
    "a screen capture": ("SCREEN SAVE", "SCREEN_SAVE", "DOSE_INFO", "PATIENT_INFO", "PROTOCOL"),
}  # fmt: skip
_GREY = ("MONOCHROME1", "MONOCHROME2")
_SAME = {
    "modality": dicom.MODALITY,
    "rows": dicom.ROWS,
    "columns": dicom.COLUMNS,
    "pixel spacing": dicom.PIXEL_SPACING,
    "patient": dicom.PATIENT_ID,
    "rescale type": dicom.RESCALE_TYPE,
}


def check_tags(slices: Sequence[Slice]) -> list[str]:
    """Refuse what is no CT volume in HU by its tags.

    Returns:
        Warnings.

    Raises:
        UnreadableVolume: For another modality, colour, a localizer, a parametric map, a projection
            or screen capture, another unit than HU, slices that do not belong together.
    """
    first = slices[0]
    for what, tag in _SAME.items():
        if len({s.tags.get(tag, "") for s in slices}) > 1:
            raise UnreadableVolume(f"the {what} differs between slices of the series")
    modality = first.tags.get(dicom.MODALITY, "")
    if modality not in ("", "CT"):
        name = modality if modality.isalnum() and len(modality) <= 16 else "unknown"
        raise UnreadableVolume(f"modality {name}, not CT")
    grey = {s.tags.get(dicom.PHOTOMETRIC, "MONOCHROME2") for s in slices}
    if any(s.integer(dicom.SAMPLES, 1) != 1 for s in slices) or grey - {*_GREY}:
        raise UnreadableVolume("RGB or palette pixels (a colour picture), not scalar CT")
    if grey != {"MONOCHROME2"}:
        raise UnreadableVolume("MONOCHROME1, a picture to be shown inverted, not scalar CT")
    for item in slices:
        _refuse_kind(item)
        rescale_of(item)
    check_syntax(slices)
    return _unit_warnings(slices) + ([] if modality else ["no Modality tag: taken for CT"])


def _refuse_kind(item: Slice) -> None:
    values = {part.strip().upper() for part in item.tags.get(dicom.IMAGE_TYPE, "").split("\\")}
    for what, names in _NO_VOLUME.items():
        found = sorted(values & set(names))
        if found:
            raise UnreadableVolume(f"{what}: ImageType says {found[0]}")


def _unit_warnings(slices: Sequence[Slice]) -> list[str]:
    warnings = []
    unit = slices[0].tags.get(dicom.RESCALE_TYPE, "")
    if unit not in ("", "HU", "US"):
        raise UnreadableVolume(f"the values are in '{unit[:16]}' (RescaleType), not HU")
    lacking = sum(dicom.INTERCEPT not in s.tags for s in slices)
    if 0 < lacking < len(slices):
        raise UnreadableVolume(
            f"{lacking} of {len(slices)} slices lack RescaleIntercept: their HU are unknown"
        )
    if lacking:
        warnings.append("no RescaleIntercept tag: stored values taken for HU")
    if any(s.tags.get(dicom.LOSSY) == "01" for s in slices):
        warnings.append("lossy compressed: HU are approximate")
    return warnings


def drop_copies(slices: Sequence[Slice]) -> tuple[list[Slice], int]:
    """Leave out slices that repeat another's position and pixels, as double exports do.

    Returns:
        What is left, in the given order, and how many were left out.
    """
    kept: list[Slice] = []
    by_place: dict[tuple[float, ...], Slice] = {}
    for item in slices:
        place = () if item.position is None else tuple(np.round(item.position, 3).tolist())
        first = by_place.get(place) if place else None
        if first is None:
            by_place[place] = item
            kept.append(item)
        elif not same_pixels(first, item):
            return list(slices), 0  # a 4D series: to be refused as a whole
    return kept, len(slices) - len(kept)
