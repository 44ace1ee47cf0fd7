"""CT-like phantoms in HU, made from a seed: test and demo data that need no patient.

They are not anatomy lessons. They have what a masked model can learn from: an outline, organs whose
places and HU depend on each other, vessels, texture, noise, partial volume and lesions.
"""

from __future__ import annotations

import csv
import io
import locale
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medspark.data import anatomy
from medspark.data.anatomy import LESION, LIVER, LUNG, MUSCLE, SPLEEN
from medspark.data.canvas import Canvas, smooth_noise
from medspark.data.store import write_atomically

Size = tuple[int, int, int]
Spacing = tuple[float, float, float]

_HOSTS = (LIVER, LUNG, MUSCLE, SPLEEN, anatomy.FAT, anatomy.KIDNEY)
_FORMATS = (".nii.gz", ".nrrd", ".mha", "dicom")


@contextmanager
def kept_locale() -> Iterator[None]:
    """Restores the process's locale: ITK's writers leave it at "C", where text is ASCII only."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


@dataclass(frozen=True)
class Phantom:
    """A synthetic CT.

    Attributes:
        hu: int16 `[z, y, x]` in HU, axes towards S, P, L.
        labels: uint8 `[z, y, x]`, the tissue of each voxel.
        spacing: mm (z, y, x).
        label_names: Name of each label; index 0 is air.
    """

    hu: np.ndarray
    labels: np.ndarray
    spacing: Spacing
    label_names: tuple[str, ...]


def make_phantom(
    seed: int,
    size: Size = (96, 96, 96),
    spacing: Spacing = (1.5, 1.5, 1.5),
    n_lesions: int | None = None,
) -> Phantom:
    """A torso between neck and pelvis; which part is in view varies.

    The body is scaled to the field of view (`size * spacing`), so that a small volume shows whole
    anatomy. A given seed and geometry always give the same voxels on one machine.

    Args:
        seed: Person, scan and lesions.
        size: Voxels (z, y, x), at least 16 each.
        spacing: mm (z, y, x).
        n_lesions: Number of lesions of 2 to 8 voxels radius; None draws 0 to 4.

    Raises:
        ValueError: For a size below 16, a spacing or a number that is negative.
    """
    if min(size) < 16 or min(spacing) <= 0 or (n_lesions or 0) < 0 or seed < 0:
        raise ValueError(
            f"seed {seed}, size {size} (at least 16), spacing {spacing} (positive) or n_lesions "
            f"{n_lesions} out of range"
        )
    rng = np.random.default_rng([seed, 0x5EED])
    body = anatomy.Body.draw(rng)
    unit = min(size[2] * spacing[2] / 2.16, size[1] * spacing[1] / 1.75)
    centre = (float(rng.normal(0, 0.02)), float(rng.uniform(0.03, 0.09)), rng.uniform(-0.9, 0.55))
    canvas = Canvas(size, spacing, unit, centre, warp=0.025, rng=rng)
    anatomy.draw_body(canvas, body, rng)
    count = int(rng.integers(0, 5)) if n_lesions is None else n_lesions
    for _ in range(count):
        _lesion(canvas, rng)
    anatomy.add_texture(canvas, rng.uniform(8, 22), rng)
    hu = np.clip(np.rint(canvas.hu), -1024, 3071).astype(np.int16)
    return Phantom(hu, canvas.labels, spacing, anatomy.LABELS)


def _lesion(canvas: Canvas, rng: np.random.Generator) -> None:
    """A lumpy ball in a random organ, brighter or darker than it, faintly or clearly."""
    hosts = [label for label in _HOSTS if (canvas.labels == label).any()]
    host = int(rng.choice(hosts))
    places = np.flatnonzero(canvas.labels == host)
    centre = np.array(np.unravel_index(int(rng.choice(places)), canvas.size))
    radius = rng.uniform(2, min(8.0, min(canvas.size) / 8))
    low = np.maximum(centre - int(radius * 1.6) - 2, 0)
    high = np.minimum(centre + int(radius * 1.6) + 3, canvas.size)
    box = (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))
    around = np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high, strict=True)), indexing="ij")
    distance = np.sqrt(sum((g - c) ** 2 for g, c in zip(around, centre, strict=True)))
    lumps = 0.12 * radius * smooth_noise(distance.shape, max(2.0, radius), rng)
    contrast = rng.uniform(25, 60) if rng.random() < 0.5 else rng.uniform(60, 140)
    base = float(np.median(canvas.hu[canvas.labels == host]))
    solid = host in (LUNG, anatomy.FAT)
    hu = rng.uniform(10, 70) if solid else base + contrast * rng.choice([-1.0, 1.0])
    canvas.blend(box, (distance + lumps - radius) * canvas.pitch, hu, LESION)


def write_phantoms(
    folder: Path | str,
    n: int,
    seed: int,
    *,
    size: Size = (96, 96, 96),
    spacing: Spacing = (1.5, 1.5, 1.5),
    n_lesions: int | None = None,
) -> list[Path]:
    """Write `n` phantoms as .nii.gz, .nrrd, .mha and one DICOM series, in turn.

    Phantom `i` has seed `seed + i`. A `patients.csv` (columns `file`, `patient`) names a patient
    for each, for `prepare`.

    Args:
        folder: Where to write; made if absent.
        n: Number of phantoms.
        seed: Seed of the first.
        size: Voxels (z, y, x).
        spacing: mm (z, y, x).
        n_lesions: See `make_phantom`.

    Returns:
        The files, or the folder of the DICOM series.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for i in range(n):
        phantom = make_phantom(seed + i, size, spacing, n_lesions)
        # One DICOM series is enough to have it read: a file for each slice is slow to write.
        kind = "dicom" if i == 3 else _FORMATS[:3][i % 3]
        path = folder / (f"phantom_{i:04d}" + ("_dicom" if kind == "dicom" else kind))
        if kind == "dicom":
            _write_series(path, phantom, f"phantom-{seed + i}", seed + i)
        else:
            _write_image(path, phantom.hu, phantom.spacing)
        written.append(path)
    rows = [(path.name, f"phantom-{seed + i}") for i, path in enumerate(written)]
    _write_csv(folder / "patients.csv", ("file", "patient"), rows)
    return written


def _write_csv(path: Path, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def _write_image(path: Path, hu: np.ndarray, spacing: Spacing) -> None:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(hu)
    image.SetSpacing(spacing[::-1])
    with kept_locale():
        sitk.WriteImage(image, str(path), useCompression=True)


def _write_series(folder: Path, phantom: Phantom, patient: str, seed: int) -> None:
    """Write CT slices with stored values 0.. and an intercept of -1024, as scanners do."""
    import SimpleITK as sitk

    folder.mkdir(parents=True, exist_ok=True)
    root = f"1.2.826.0.1.3680043.8.498.{seed + 1}"
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    dz, dy, dx = phantom.spacing
    for z, plane in enumerate(phantom.hu):
        image = sitk.GetImageFromArray(plane[None])
        image.SetSpacing((dx, dy, dz))
        image.SetOrigin((0.0, 0.0, z * dz))
        for tag, value in {
            "0008|0008": "ORIGINAL\\PRIMARY\\AXIAL",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{root}.1.{z + 1}",
            "0008|0020": "20000101",  # else the writer puts the time of writing
            "0008|0030": "000000",
            "0008|0060": "CT",
            "0010|0020": patient,
            "0020|000d": f"{root}.2",
            "0020|000e": f"{root}.3",
            "0020|0013": str(z + 1),
            "0020|0032": f"0\\0\\{z * dz:g}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0052": f"{root}.4",
            "0028|1052": "-1024",
            "0028|1053": "1",
        }.items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{z:04d}.dcm"))
        with kept_locale():
            writer.Execute(image)


def write_phantom_task(
    folder: Path | str,
    *,
    n_patients: int = 20,
    patches_per_patient: int = 8,
    size: int = 32,
    seed: int = 0,
    spacing: Spacing = (1.5, 1.5, 1.5),
) -> Path:
    """Write a lesion-or-normal task in the labels.csv format of `medspark.data.tasks`.

    Half of each patient's patches hold the centre of a lesion (label 1), the others show no lesion
    voxel; both are at least half body. Split by patient: about 60 % train, 20 % val, 20 % test.

    Args:
        folder: Where to write; made if absent.
        n_patients: At least 3.
        patches_per_patient: Even, at least 2.
        size: Edge of the cubic patches in voxels.
        seed: Patient `i` is the phantom of seed `seed + i`.
        spacing: mm (z, y, x).

    Returns:
        The folder.

    Raises:
        ValueError: For fewer than 3 patients or an odd number of patches.
    """
    if n_patients < 3 or patches_per_patient < 2 or patches_per_patient % 2:
        raise ValueError("at least 3 patients and an even number of patches per patient are needed")
    folder = Path(folder)
    (folder / "patches").mkdir(parents=True, exist_ok=True)
    held = max(1, round(0.2 * n_patients))
    rows: list[tuple[Any, ...]] = []
    for i in range(n_patients):
        split = "test" if i < held else "val" if i < 2 * held else "train"
        edge = max(96, 2 * size)
        phantom = make_phantom(seed + i, (edge, edge, edge), spacing, n_lesions=12)
        rng = np.random.default_rng([seed + i, 0x7A5C])
        for number in range(patches_per_patient):
            label = number % 2
            patch = _draw_patch(phantom, size, label, rng)
            name = f"patches/phantom_{i:03d}_{number:02d}.nii.gz"
            _write_image(folder / name, patch, spacing)
            rows.append((name, f"phantom-{seed + i}", label, ("normal", "lesion")[label], split))
    _write_csv(folder / "labels.csv", ("file", "patient", "label", "label_name", "split"), rows)
    return folder


def _draw_patch(phantom: Phantom, size: int, label: int, rng: np.random.Generator) -> np.ndarray:
    """A cube about a lesion (moved by up to a quarter of its edge), or one without any."""
    shape = np.array(phantom.hu.shape)
    lesion = np.argwhere(phantom.labels == LESION)
    best, best_score = phantom.hu[:size, :size, :size], -1.0
    for _ in range(200):
        if label:
            shift = rng.integers(-size // 4, size // 4 + 1, 3)
            start = lesion[rng.integers(len(lesion))] - size // 2 + shift
        else:
            start = rng.integers(0, shape - size + 1)
        start = np.clip(start, 0, shape - size)
        box = tuple(slice(s, s + size) for s in start)
        hurt = int((phantom.labels[box] == LESION).sum())
        body = float((phantom.hu[box] > -500).mean())
        fits = hurt >= 0.005 * size**3 if label else hurt == 0
        if fits and body >= 0.5:
            return phantom.hu[box]
        score = body + fits
        if score > best_score:
            best, best_score = phantom.hu[box], score
    return best
