"""Read one CT volume from a file or a DICOM series: HU, int16, axes towards S, P, L.

Everything that must not reach training is refused here with a reason (`UnreadableVolume`);
what is merely odd is read and said so in `Volume.warnings`.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medspark.data import dicom
from medspark.data.headers import (
    MAX_VOXELS,
    UnreadableVolume,
    check_file,
    check_promise,
    image_suffix,
    shear_warning,
)
from medspark.data.orientation import lps_geometry, orientation_letters, to_lps

__all__ = ["AIR", "UnreadableVolume", "Volume", "read_volume"]

AIR = -1024  # lowest stored HU; scanners pad with lower values, which carry nothing
_LABEL_MAP_VALUES = 128
_quiet_lock = threading.Lock()


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
    """Voxels as stored (rescaled), with geometry in (x, y, z) order as ITK has it."""

    voxels: np.ndarray
    spacing: np.ndarray
    origin: np.ndarray
    direction: np.ndarray
    stored_type: str
    modality: str | None = None
    patient: str | None = None
    series: str | None = None
    warnings: list[str] = field(default_factory=list)


def read_volume(
    path: Path | str | Sequence[Path | str],
    *,
    patient: str | None = None,
    min_slices: int = 2,
    canonical: bool = True,
    patch: bool = False,
) -> Volume:
    """Read a CT volume, rescaled to HU, in the canonical orientation LPS.

    Array axes (z, y, x) then run towards S, P, L. Oblique volumes are turned to the nearest such
    axes, never resampled. Values below -1024 (padding) are set to -1024 and that is said.

    Args:
        path: A .nii, .nii.gz, .nrrd, .mha or .mhd file, a DICOM file, a folder with one DICOM
            series (other DICOM objects without an image are ignored), or the files of one series.
        patient: Overrides the patient id of the file.
        min_slices: Fewer slices than this are refused. The default 2 refuses single images,
            whose slice spacing is unknown; thin volumes are padded by the crops.
        canonical: False keeps the axes as stored, for indices that refer to the stored array.
        patch: True for a piece cut from a scan: it may be constant or smooth soft tissue, so
            constant volumes and label maps are not refused, nor missing air remarked on.

    Raises:
        UnreadableVolume: For RGB, vector or complex voxels, 4D data and repeated slice positions,
            NaN or infinite voxels, a modality other than CT, truncated or corrupt files, headers
            that promise too much, impossible spacing, uneven or missing slices (1 % of a step),
            too few slices, values outside int16, constant volumes and label maps.
    """
    if isinstance(path, str | Path):
        single = Path(path)
        if single.is_dir():
            raw = _read_series(_image_files(single))
        elif image_suffix(single) is None:
            raw = _read_series([single])
        else:
            raw = _read_file(single)
    else:
        raw = _read_series([Path(p) for p in path])
    if patient is not None:
        raw.patient = patient
    return _to_volume(raw, min_slices, canonical, patch)


def _image_files(folder: Path) -> list[Path]:
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and dicom.is_dicom(p)]
    files = [p for p in files if dicom.holds_image(dicom.read_tags(p))]
    if not files:
        raise UnreadableVolume("the folder holds no DICOM image")
    return files


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the C++ readers from writing to the terminal; exceptions carry what matters.

    Works on the file descriptor, as these libraries write to it directly.
    """
    with _quiet_lock, tempfile.TemporaryFile() as sink:
        before = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)


def _sitk() -> Any:
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Class names with addresses, as in "GDCMImageIO(0x5581...): ", would differ on every run.
    return re.sub(r"\w+\(0x[0-9a-f]+\): |(sitk::|ITK )ERROR: ", "", (lines or [""])[-1])


def _open(path: Path, image_io: str = "") -> Any:
    """An ITK reader that has read the header of `path`."""
    reader = _sitk().ImageFileReader()
    reader.SetFileName(str(path))
    if image_io:
        reader.SetImageIO(image_io)
    try:
        with _quiet():
            reader.ReadImageInformation()
    except RuntimeError as error:
        # ITK's text names the file with its whole path; that is the caller's to say.
        text = _last_line(error).replace(str(path), path.name)
        raise UnreadableVolume(f"unreadable header: {text}") from error
    return reader


def _pixels(reader: Any, path: Path) -> Any:
    try:
        with _quiet():
            return reader.Execute()
    except (RuntimeError, MemoryError) as error:
        text = _last_line(error).replace(str(path), path.name)
        raise UnreadableVolume(f"truncated or corrupt voxels: {text}") from error


def _check_scalar(reader: Any) -> np.dtype[Any]:
    sitk = _sitk()
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    if reader.GetNumberOfComponents() != 1 or "complex" in kind or "vector" in kind:
        raise UnreadableVolume(f"{kind} voxels (RGB, vector or complex), not scalar CT")
    return np.dtype(sitk.GetArrayViewFromImage(sitk.Image([1, 1], reader.GetPixelID())).dtype)


def _read_file(path: Path) -> _Raw:
    header = check_file(path)
    reader = _open(path)
    dtype = _check_scalar(reader)
    size, spacing = reader.GetSize(), np.array(reader.GetSpacing())
    if any(n != 1 for n in size[3:]):
        raise UnreadableVolume(f"{len(size)}D image of size {size}: one volume is needed")
    if not (np.isfinite(spacing) & (spacing > 0)).all():
        raise UnreadableVolume(f"voxel size {tuple(spacing.tolist())} mm is not positive")
    check_promise(path, size, np.dtype(header.stored_type or dtype).itemsize)
    image = _pixels(reader, path)
    while image.GetDimension() > 3:
        image = image[(slice(None),) * (image.GetDimension() - 1) + (0,)]
    if image.GetDimension() < 3:
        image = _sitk().JoinSeries(image)
    direction = np.array(image.GetDirection()).reshape(3, 3)
    return _Raw(
        voxels=_sitk().GetArrayFromImage(image),
        spacing=np.array(image.GetSpacing()),
        origin=np.array(image.GetOrigin()),
        direction=direction,
        stored_type=header.stored_type or dtype.name,
        warnings=header.warnings or shear_warning(direction),
    )


def _read_series(files: Sequence[Path]) -> _Raw:
    slices = [dicom.Slice.read(path) for path in files]
    if not slices:
        raise UnreadableVolume("no files given")
    groups = dicom.group_series(slices)
    if len(groups) > 1:
        raise UnreadableVolume(
            f"{len(groups)} series or slice planes in one place: pass the files of one of them"
        )
    warnings = _check_tags(slices)
    geometry = dicom.series_geometry(slices)
    if geometry.tilt > 0.5:
        warnings.append(
            f"gantry tilt: slices are sheared by {geometry.tilt:.1f} degrees, not corrected"
        )
    first = slices[0].tags
    voxels, stored_type = _stack(geometry.order)
    return _Raw(
        voxels=voxels,
        spacing=geometry.spacing,
        origin=geometry.origin,
        direction=geometry.direction,
        stored_type=stored_type,
        modality=first.get(dicom.MODALITY) or None,
        patient=first.get(dicom.PATIENT_ID) or None,
        series=first.get(dicom.SERIES_UID) or None,
        warnings=warnings,
    )


def _check_tags(slices: Sequence[dicom.Slice]) -> list[str]:
    first = slices[0].tags
    for what, tag in (
        ("modality", dicom.MODALITY),
        ("rows", dicom.ROWS),
        ("columns", dicom.COLUMNS),
        ("pixel spacing", dicom.PIXEL_SPACING),
        ("patient", dicom.PATIENT_ID),
    ):
        if len({s.tags.get(tag, "") for s in slices}) > 1:
            raise UnreadableVolume(f"the {what} differs between slices of the series")
    modality = first.get(dicom.MODALITY, "")
    if modality not in ("", "CT"):
        raise UnreadableVolume(f"modality {modality}, not CT")
    if any(int(s.tags.get(dicom.SAMPLES) or 1) != 1 for s in slices):
        raise UnreadableVolume("RGB pixels (a colour picture), not scalar CT")
    if any(int(s.tags.get(dicom.FRAMES) or 1) != 1 for s in slices):
        raise UnreadableVolume(
            "multi-frame DICOM (enhanced or secondary capture) is not supported: convert it to "
            "NIfTI with a converter that knows its functional groups"
        )
    if "LOCALIZER" in first.get(dicom.IMAGE_TYPE, ""):
        raise UnreadableVolume("a localizer (scout) image, not a volume")
    return [] if modality else ["no Modality tag: taken for CT"]


def _stack(slices: Sequence[dicom.Slice]) -> tuple[np.ndarray, str]:
    """Voxels `[z, y, x]` of sorted slices, each rescaled by its own slope and intercept."""
    shape = tuple(int(slices[0].tags.get(tag) or 0) for tag in (dicom.ROWS, dicom.COLUMNS))
    voxels, stored_type = np.empty(0), ""
    for index, item in enumerate(slices):
        _check_slice_promise(item, shape, len(slices))
        reader = _open(item.path, "GDCMImageIO")
        dtype = _check_scalar(reader)
        pixels = np.squeeze(_sitk().GetArrayFromImage(_pixels(reader, item.path)))
        if pixels.shape != shape:
            raise UnreadableVolume(f"slice {index + 1} is {pixels.shape}, the header says {shape}")
        if index == 0:
            voxels, stored_type = np.empty((len(slices), *shape), pixels.dtype), dtype.name
        elif np.result_type(voxels, pixels) != voxels.dtype:
            voxels = voxels.astype(np.result_type(voxels, pixels))
        voxels[index] = pixels
    return voxels, stored_type


def _check_slice_promise(item: dicom.Slice, shape: tuple[int, ...], count: int) -> None:
    check_promise(item.path, shape, 1)
    voxels = shape[0] * shape[1] * count
    if voxels > MAX_VOXELS:
        raise UnreadableVolume(f"the series has {voxels} voxels, the limit is {MAX_VOXELS}")
    need = shape[0] * shape[1] * int(item.tags.get(dicom.BITS_ALLOCATED) or 16) // 8
    plain = item.tags.get(dicom.TRANSFER_SYNTAX) in dicom.UNCOMPRESSED
    if plain and item.path.stat().st_size < need:
        raise UnreadableVolume(f"truncated slice {item.path.name}: {need} bytes of pixels promised")


def _to_volume(raw: _Raw, min_slices: int, canonical: bool, patch: bool) -> Volume:
    if raw.voxels.shape[0] < min_slices:
        raise UnreadableVolume(f"{raw.voxels.shape[0]} slice(s), at least {min_slices} needed")
    hu, warnings = _to_hu(raw.voxels)
    if not patch:
        warnings = _check_content(raw, hu) + warnings
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


def _mm(length: float) -> float:
    # Slice steps are differences of decimal strings: 0.9999999999999929 is meant to be 1.
    return round(float(length), 6)


def _to_hu(voxels: np.ndarray) -> tuple[np.ndarray, list[str]]:
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise UnreadableVolume(f"{int((~np.isfinite(voxels)).sum())} NaN or infinite voxels")
    low, high = voxels.min(), voxels.max()
    if low < -32768 or high > 32767:
        raise UnreadableVolume(f"values {low:g} to {high:g} are no HU (int16 is enough for HU)")
    if voxels.dtype.kind == "f":
        voxels = np.rint(voxels)
    hu = voxels.astype(np.int16)
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
