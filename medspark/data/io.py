"""Read one CT volume from a file or a DICOM series: HU, int16, axes towards S, P, L.

Everything that must not reach training is refused here with a reason (`UnreadableVolume`);
what is merely odd is read and said so in `Volume.warnings`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medspark.data import dicom
from medspark.data.dicom_checks import check_tags, drop_copies
from medspark.data.grid import even_out, straight_axes, straighten
from medspark.data.headers import (
    AIR,
    MAX_BYTES,
    STRAIGHT,
    Header,
    UnreadableVolume,
    check_file,
    check_promise,
    image_suffix,
)
from medspark.data.itk import open_reader, read_pixels, scalar_type, sitk
from medspark.data.multiframe import frames_of
from medspark.data.nifti import nifti_voxels
from medspark.data.orientation import lps_geometry, orientation_letters, to_lps
from medspark.data.pixels import stack
from medspark.data.series import group_series, series_geometry
from medspark.data.text_headers import meta_data_file

__all__ = ["AIR", "UnreadableVolume", "Volume", "read_volume"]

_LABEL_MAP_VALUES = 128
_LEAST_PIXELS = 8


@dataclass
class Volume:
    """A CT volume in memory.

    Attributes:
        hu: int16 `[z, y, x]` in HU, at least -1024.
        spacing: Voxel size in mm, (z, y, x).
        origin: Centre of voxel (0, 0, 0) in mm, (x, y, z) in the LPS frame of DICOM and ITK.
        direction: `[3, 3]`, columns are the unit vectors of the x, y and z axes of the array.
        modality: DICOM modality, None where the format has none.
        patient: Patient id as given or as in the file, None where unknown. Identifying.
        series: SeriesInstanceUID, None where the format has none. Identifying.
        orientation: Towards which side the x, y, z axes ran in the file, such as "RAS".
        stored_type: Voxel type in the file.
        warnings: What is odd about it, one line each.
    """

    hu: np.ndarray
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: np.ndarray
    modality: str | None
    patient: str | None
    series: str | None
    orientation: str
    stored_type: str
    warnings: list[str]


@dataclass
class _Raw:
    """Voxels as stored (rescaled), with geometry in (x, y, z) order as ITK has it.

    `direction` is right-angled: `shifts` and `places` say how the slices lie otherwise (`grid`).
    """

    voxels: np.ndarray
    spacing: np.ndarray
    origin: np.ndarray
    direction: np.ndarray
    stored_type: str
    modality: str | None = None
    patient: str | None = None
    series: str | None = None
    shifts: np.ndarray | None = None
    shear: float = 0.0
    places: np.ndarray | None = None
    warnings: list[str] = field(default_factory=list)


def read_volume(
    path: Path | str | Sequence[Path | str],
    *,
    patient: str | None = None,
    min_slices: int = 2,
    canonical: bool = True,
    patch: bool = False,
    uneven: bool = False,
    max_bytes: int = MAX_BYTES,
) -> Volume:
    """Read a CT volume, rescaled to HU, in the canonical orientation LPS.

    Array axes (z, y, x) then run towards S, P, L. Oblique volumes are turned to the nearest such
    axes, never resampled. Sheared slices (gantry tilt) are moved in their plane to where they were
    scanned, so that the axes are at right angles. Values below -1024 (padding) are set to -1024
    and that is said.

    Args:
        path: A .nii, .nii.gz, .nrrd, .mha or .mhd file, a DICOM file, a folder with one DICOM
            series (other DICOM objects without an image are ignored), or the files of one series.
        patient: Overrides the patient id of the file.
        min_slices: Fewer slices than this are refused. The default 2 refuses single images,
            whose slice spacing is unknown; thin volumes are padded by the crops.
        canonical: False keeps axes and slices as stored, sheared ones too, for indices that refer
            to the stored array.
        patch: True for a piece cut from a scan: it may be constant or smooth soft tissue, so
            constant volumes and label maps are not refused, nor missing air remarked on.
        uneven: Accept a DICOM series whose steps differ up to twofold: its slices are interpolated
            to the median step.
        max_bytes: Refuse volumes that need more memory than this, before it is taken.

    Raises:
        UnreadableVolume: For RGB, vector or complex voxels, 4D data and repeated slice positions,
            NaN or infinite voxels, a modality other than CT, truncated or corrupt files, headers
            that promise too much, impossible spacing, uneven or missing slices (1 % of a step),
            too few slices, values outside int16, constant volumes and label maps.
    """
    if isinstance(path, str | Path):
        single = Path(path)
        if single.is_dir():
            raw = _read_series(_image_files(single), uneven, max_bytes)
        elif image_suffix(single) is None:
            raw = _read_series([single], uneven, max_bytes)
        else:
            raw = _read_file(single, max_bytes)
    else:
        raw = _read_series([Path(p) for p in path], uneven, max_bytes)
    if patient is not None:
        raw.patient = patient
    return _to_volume(raw, min_slices, canonical, patch, max_bytes // 2)


def _image_files(folder: Path) -> list[Path]:
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and dicom.is_dicom(p)]
    files = [p for p in files if dicom.holds_image(dicom.read_tags(p))]
    if not files:
        raise UnreadableVolume("the folder holds no DICOM image")
    return files


def _read_file(path: Path, max_bytes: int) -> _Raw:
    header = check_file(path, max_bytes)
    if header.affine is None:
        voxels, spacing, origin, direction, stored_type = _read_image(path, header, max_bytes)
    else:
        columns, origin = header.affine[:, :3], header.affine[:, 3]
        voxels, spacing = nifti_voxels(path), np.linalg.norm(columns, axis=0)
        direction, stored_type = columns / spacing, header.stored_type or ""
    straight, spacing[2], shifts, shear = straight_axes(direction, spacing[2], len(voxels))
    return _Raw(
        voxels=voxels,
        spacing=spacing,
        origin=origin,
        direction=straight,
        stored_type=stored_type,
        shifts=shifts,
        shear=shear,
    )


def _read_image(
    path: Path, header: Header, max_bytes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, str]:
    """Voxels, spacing, origin and direction as ITK has them, and the stored type."""
    reader = open_reader(path)
    dtype = scalar_type(reader)
    size, spacing = reader.GetSize(), np.array(reader.GetSpacing())
    if any(n != 1 for n in size[3:]):
        raise UnreadableVolume(f"{len(size)}D image of size {size}: one volume is needed")
    if not (np.isfinite(spacing) & (spacing > 0) & (spacing < 1e6)).all():
        raise UnreadableVolume(f"voxel size {tuple(spacing.tolist())} mm is not positive")
    held = meta_data_file(path) if image_suffix(path) == ".mhd" else path
    check_promise(held, size, np.dtype(header.stored_type or dtype).itemsize, max_bytes)
    image = read_pixels(reader, path)
    while image.GetDimension() > 3:
        image = image[(slice(None),) * (image.GetDimension() - 1) + (0,)]
    if image.GetDimension() < 3:
        image = sitk().JoinSeries(image)
    return (
        sitk().GetArrayFromImage(image),
        np.array(image.GetSpacing()),
        np.array(image.GetOrigin()),
        np.array(image.GetDirection()).reshape(3, 3),
        header.stored_type or dtype.name,
    )


def _read_series(files: Sequence[Path], uneven: bool, max_bytes: int) -> _Raw:
    slices = [item for path in files for item in _slices_of(path)]
    if not slices:
        raise UnreadableVolume("no files given")
    groups = group_series(slices)
    if len(groups) > 1:
        raise UnreadableVolume(
            f"{len(groups)} series or slice planes in one place: pass the files of one of them"
        )
    warnings = check_tags(slices)
    slices, copies = drop_copies(slices)
    if copies:
        warnings.append(f"{copies} repeated copies of slices left out")
    geometry = series_geometry(slices, uneven=uneven)
    first = slices[0].tags
    voxels, stored_type = stack(geometry.order, max_bytes)
    return _Raw(
        voxels=voxels,
        spacing=geometry.spacing,
        origin=geometry.origin,
        direction=geometry.direction,
        stored_type=stored_type,
        modality=first.get(dicom.MODALITY) or None,
        patient=first.get(dicom.PATIENT_ID) or None,
        series=first.get(dicom.SERIES_UID) or None,
        shifts=geometry.shifts if geometry.tilt > STRAIGHT else None,
        shear=geometry.tilt,
        places=geometry.places,
        warnings=warnings,
    )


def _slices_of(path: Path) -> list[dicom.Slice]:
    tags = dicom.read_tags(path)
    single = dicom.Slice.of(path, tags)
    return frames_of(path, tags) if single.integer(dicom.FRAMES, 1) > 1 else [single]


def _to_volume(raw: _Raw, min_slices: int, canonical: bool, patch: bool, max_voxels: int) -> Volume:
    if raw.voxels.shape[0] < min_slices:
        raise UnreadableVolume(f"{raw.voxels.shape[0]} slice(s), at least {min_slices} needed")
    if not patch and min(raw.voxels.shape[1:]) < _LEAST_PIXELS:
        raise UnreadableVolume(f"slices of {raw.voxels.shape[1:]} pixels are no scan")
    hu, warnings = _to_hu(raw.voxels)
    if not patch:
        warnings = _check_content(raw, hu) + warnings
    if canonical:
        hu = _on_grid(raw, hu, max_voxels)
    elif raw.shifts is not None:
        raw.warnings.append(f"sheared by {raw.shear:.1f} degrees, left as stored")
    letters = orientation_letters(raw.direction)
    skew = float(np.degrees(np.arccos(np.clip(np.abs(raw.direction).max(axis=0).min(), 0, 1))))
    if skew > 1.0:
        warnings.append(f"oblique: axes are {skew:.1f} degrees off, turned to the nearest")
    geometry = (raw.spacing, raw.origin, raw.direction)
    if canonical:
        hu, geometry = to_lps(hu, letters), lps_geometry(hu.shape, letters, *geometry)
    spacing, origin, direction = geometry
    return Volume(
        hu=np.ascontiguousarray(hu),
        spacing=(_mm(spacing[2]), _mm(spacing[1]), _mm(spacing[0])),
        origin=(float(origin[0]), float(origin[1]), float(origin[2])),
        direction=direction,
        modality=raw.modality,
        patient=raw.patient,
        series=raw.series,
        orientation=letters,
        stored_type=raw.stored_type,
        warnings=raw.warnings + warnings,
    )


def _on_grid(raw: _Raw, hu: np.ndarray, max_voxels: int) -> np.ndarray:
    """Straighten sheared and uneven slices; `raw` gets the new origin and what was done."""
    if raw.shifts is not None:
        pixel = float(raw.spacing[0]), float(raw.spacing[1])
        hu, start = straighten(hu, raw.shifts, pixel, max_voxels)
        raw.origin = raw.origin + raw.direction[:, :2] @ np.array(start)
        raw.warnings.append(
            f"gantry tilt or sheared axes: slices were off by {raw.shear:.1f} degrees, straightened"
        )
    if raw.places is not None:
        steps = np.diff(raw.places)
        hu = even_out(hu, raw.places, float(raw.spacing[2]), max_voxels)
        raw.warnings.append(
            f"uneven slices: steps of {steps.min():.2f} to {steps.max():.2f} mm interpolated to "
            f"{raw.spacing[2]:.2f} mm"
        )
    return hu


def _mm(length: float) -> float:
    # Slice steps are differences of decimal strings: 0.9999999999999929 is meant to be 1.
    return round(float(length), 6)


def _to_hu(voxels: np.ndarray) -> tuple[np.ndarray, list[str]]:
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise UnreadableVolume(f"{int((~np.isfinite(voxels)).sum())} NaN or infinite voxels")
    low, high = voxels.min(), voxels.max()
    if low < -32768 or high > 32767:
        raise UnreadableVolume(f"values {low:g} to {high:g} are no HU (int16 is enough for HU)")
    hu = np.empty(voxels.shape, np.int16)
    for plane, target in zip(voxels, hu, strict=True):  # by slices: no second copy as floats
        target[:] = np.rint(plane) if voxels.dtype.kind == "f" else plane
    below = int((hu < AIR).sum())
    if not below:
        return hu, []
    text = f"{below} voxels below {AIR} HU (padding or noise, lowest {low:g}) set to {AIR}"
    return np.maximum(hu, np.int16(AIR)), [text]


def _check_content(raw: _Raw, hu: np.ndarray) -> list[str]:
    """Refuse what is no scan by its values; warn of what may be none."""
    low, high = float(raw.voxels.min()), float(raw.voxels.max())
    if low == high:
        raise UnreadableVolume(f"constant volume: every voxel is {low:g}")
    if hu.min() == hu.max():
        raise UnreadableVolume(f"constant volume: nothing but padding, or {hu.min()} HU")
    _refuse_label_map(raw.voxels, low)
    return _range_warnings(raw.stored_type, low, high)


def _refuse_label_map(voxels: np.ndarray, low: float) -> None:
    if low < 0:
        return
    values = len(np.unique(voxels))
    if values <= _LABEL_MAP_VALUES and voxels.size >= 64 * values:
        raise UnreadableVolume(f"looks like a label map: only {values} values, none below 0")


def _range_warnings(stored_type: str, low: float, high: float) -> list[str]:
    warnings = []
    if stored_type in ("uint8", "int8"):
        warnings.append("stored in 8 bits: a windowed picture or coarse values, not exact HU")
    if low >= 0:
        warnings.append(
            f"does not look like HU: no value below 0 ({low:g} to {high:g}); a missing rescale "
            "intercept, another unit or another modality"
        )
    elif low > -500:
        warnings.append(f"does not look like HU of a body: no air ({low:g} to {high:g})")
    return warnings
