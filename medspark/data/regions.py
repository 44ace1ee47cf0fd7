"""A labelled task from whole volumes: which region of the body a cube shows.

A table says which stretch of which volume is which region; cubes are cut there and written as a
`labels.csv` task. Regions come from different scanners and protocols, so a network could name the
scanner instead of the anatomy. What gives a scanner away is therefore made alike first:

* resolution: every volume is blurred by what its own grid lacks of the coarsest grid allowed,
  put on that common coarse grid, and only then on the grid of the patches;
* padding, couch, clothes and air: all outside the largest body is -1000 HU, as is all below;
* place: a cube lies wholly inside its volume, and a given share of it is body.

What remains, and cannot be taken away: contrast agent, noise texture, dose, and which regions come
from which collection. `task_histogram` measures what the HU alone tell; what the project's own
table can and cannot show is in `benchmarks/body_region.md`.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from medspark.data.augment import smooth
from medspark.data.io import Volume, read_volume
from medspark.data.phantom import kept_locale
from medspark.data.resample import resample
from medspark.data.store import TEMPORARY, hash_text
from medspark.data.task_body import body_mask, with_skin
from medspark.data.task_tables import inside

COLUMNS = ("volume", "patient", "region", "split", "low_mm", "high_mm")
_OUTSIDE = -1000  # HU of everything that is not body
_FWHM = 2 * math.sqrt(2 * math.log(2))  # of a Gaussian, in SDs


@dataclass(frozen=True)
class RegionSettings:
    """How cubes are cut.

    Attributes:
        size: Voxels per edge of a cube.
        spacing: mm of its voxels.
        coarse: mm of the common grid that every volume passes through.
        finest: Finest voxel edge in mm of a volume that is used.
        coarsest: Coarsest; every volume is blurred to what such a grid shows.
        min_body: Share of a cube that must be body (lungs count).
        step: Voxels between the places where a cube may start.
        cubes: Cubes of each region in a split, shared out among its patients.
        seed: Choice of the places.
    """

    size: int = 32
    spacing: float = 2.0
    coarse: float = 4.0
    finest: float = 0.7
    coarsest: float = 5.0
    min_body: float = 0.6
    step: int = 4
    cubes: Mapping[str, int] | None = None
    seed: int = 0

    def wanted(self, split: str) -> int:
        """Cubes of each region in a split."""
        counts = self.cubes if self.cubes is not None else {"train": 120, "val": 36, "test": 60}
        return counts.get(split, 0)


@dataclass(frozen=True)
class Stretch:
    """A row of the table: between which heights of a volume a region lies.

    Attributes:
        volume: File or DICOM folder, relative to the corpus.
        patient: Whom it is from.
        region: Class.
        split: "train", "val" or "test".
        low_mm: Lowest height of a cube's centre above the lowest face of the volume (LPS), mm.
        high_mm: Highest.
    """

    volume: str
    patient: str
    region: str
    split: str
    low_mm: float
    high_mm: float


def read_stretches(table: Path | str) -> list[Stretch]:
    """Read a table of stretches.

    Raises:
        ValueError: For missing columns, numbers that are none, a stretch without length, a patient
            in two splits, or the same patient and region twice.
    """
    with Path(table).open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [c for c in COLUMNS if c not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"'{table}' lacks the column(s) {', '.join(missing)}")
        rows = list(reader)
    stretches: list[Stretch] = []
    splits: dict[str, str] = {}
    for line, row in enumerate(rows, start=2):
        where = f"'{table}' line {line}"
        try:
            low, high = float(row["low_mm"]), float(row["high_mm"])
        except (TypeError, ValueError):
            raise ValueError(f"{where}: low_mm and high_mm must be numbers") from None
        item = Stretch(row["volume"], row["patient"], row["region"], row["split"], low, high)
        if not (item.volume and item.patient and item.region and item.split and 0 <= low < high):
            raise ValueError(f"{where}: needs names, a split and 0 <= low_mm < high_mm")
        if splits.setdefault(item.patient, item.split) != item.split:
            raise ValueError(f"{where}: patient '{item.patient}' is in two splits")
        if any((s.patient, s.region) == (item.patient, item.region) for s in stretches):
            raise ValueError(f"{where}: '{item.region}' of '{item.patient}' comes twice")
        stretches.append(item)
    if not stretches:
        raise ValueError(f"'{table}' has no rows")
    return stretches


def even_resolution(volume: Volume, settings: RegionSettings) -> tuple[Volume, np.ndarray]:
    """A volume with the resolution, surroundings and grid that all cubes share.

    Blur: a grid of voxels of s mm is taken to show details of s mm (full width at half maximum);
    widths of blurs add in squares, so sqrt(coarsest^2 - s^2) is missing along that axis.

    Returns:
        The volume at `settings.spacing`, at least -1000 HU, and its body, bool `[z, y, x]`.

    Raises:
        ValueError: If a voxel edge is outside what is allowed, or there is no body.
    """
    for mm in volume.spacing:
        if not settings.finest - 1e-3 <= mm <= settings.coarsest + 1e-3:
            raise ValueError(
                f"voxels of {volume.spacing} mm (z, y, x); edges from {settings.finest} to "
                f"{settings.coarsest} mm can be made alike"
            )
    missing = [math.sqrt(max(0.0, settings.coarsest**2 - mm**2)) for mm in volume.spacing]
    sigma = [width / _FWHM / mm for width, mm in zip(missing, volume.spacing, strict=True)]
    blurred = smooth(torch.from_numpy(volume.hu.astype(np.float32)), sigma)
    volume = replace(volume, hu=np.rint(blurred.numpy()).astype(np.int16))
    coarse = resample(volume, (settings.coarse,) * 3)
    body = body_mask(coarse.hu)
    hu = np.maximum(np.where(with_skin(body), coarse.hu, _OUTSIDE), _OUTSIDE).astype(np.int16)
    fine = (settings.spacing,) * 3
    inside_ = resample(replace(coarse, hu=100 * body.astype(np.int16)), fine)
    return resample(replace(coarse, hu=hu), fine), inside_.hu >= 50


def places(
    body: np.ndarray, stretch: Stretch, count: int, settings: RegionSettings
) -> list[tuple[int, int, int]]:
    """First voxels (z, y, x) of `count` cubes of a stretch, drawn without replacement.

    Args:
        body: bool `[z, y, x]` at `settings.spacing`.
        stretch: The row.
        count: Cubes wanted.
        settings: How cubes are cut.

    Raises:
        ValueError: If the stretch has fewer places with enough body.
    """
    n, mm = settings.size, settings.spacing
    half = n / 2
    first = max(0, math.ceil(stretch.low_mm / mm - half))
    last = min(body.shape[0] - n, math.floor(stretch.high_mm / mm - half))
    sums = np.zeros([s + 1 for s in body.shape], np.int64)
    sums[1:, 1:, 1:] = body.cumsum(0, dtype=np.int64).cumsum(1).cumsum(2)
    for axis in range(3):
        far = sums.take(range(n, sums.shape[axis]), axis) if sums.shape[axis] > n else None
        if far is None:
            raise ValueError(f"'{stretch.volume}' is smaller than a cube of {n * mm:g} mm")
        sums = far - sums.take(range(far.shape[axis]), axis)
    starts = [range(first, last + 1, settings.step)]
    starts += [range(0, s, settings.step) for s in sums.shape[1:]]
    good = [
        (z, y, x)
        for z in starts[0]
        for y in starts[1]
        for x in starts[2]
        if sums[z, y, x] >= settings.min_body * n**3
    ]
    if len(good) < count:
        raise ValueError(
            f"'{stretch.volume}' has {len(good)} places for cubes of {stretch.region} between "
            f"{stretch.low_mm:g} and {stretch.high_mm:g} mm, {count} are wanted"
        )
    seed = int(hash_text(f"{settings.seed}/{stretch.volume}/{stretch.region}"), 16)
    drawn = np.random.default_rng(seed).permutation(len(good))[:count]
    return [good[i] for i in sorted(drawn.tolist())]


def build_regions(
    corpus: Path | str,
    stretches: Sequence[Stretch],
    out: Path | str,
    settings: RegionSettings | None = None,
) -> Path:
    """Cut the cubes of all stretches and write the task.

    The folder appears as a whole or not at all; the same input gives the same bytes. Classes are
    numbered in the order of their names. `provenance.csv` says where each cube is from; do not
    feed it to a model.

    Args:
        corpus: Folder of the volumes.
        stretches: Rows of the table.
        out: Folder of the task, not there yet.
        settings: How cubes are cut.

    Returns:
        `out`.

    Raises:
        FileExistsError: If `out` exists.
        FileNotFoundError: If a volume is missing.
        ValueError: For a path that leaves the corpus, a volume that cannot be made alike, a
            stretch without enough places, or a split that lacks a region.
    """
    settings, corpus, out = settings or RegionSettings(), Path(corpus), Path(out)
    if out.exists():
        raise FileExistsError(f"'{out}' exists: remove it, or choose another folder")
    _check_complete(stretches)
    for stretch in stretches:
        if not inside(corpus, stretch.volume).exists():
            raise FileNotFoundError(f"no volume '{stretch.volume}' in '{corpus}'")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f"{TEMPORARY}{os.getpid()}-{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        (temporary / "patches").mkdir(parents=True)
        _write(corpus, stretches, temporary, settings)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def _check_complete(stretches: Sequence[Stretch]) -> None:
    regions = sorted({s.region for s in stretches})
    for split in sorted({s.split for s in stretches}):
        missing = set(regions) - {s.region for s in stretches if s.split == split}
        if missing:
            raise ValueError(f"the split '{split}' has no {', '.join(sorted(missing))}")


def _write(
    corpus: Path, stretches: Sequence[Stretch], folder: Path, settings: RegionSettings
) -> None:
    names = sorted({s.region for s in stretches})
    counts = _shared_out(stretches, settings)
    rows: dict[Stretch, list[tuple[str, ...]]] = {}
    for file in dict.fromkeys(s.volume for s in stretches):
        try:
            volume, body = even_resolution(read_volume(inside(corpus, file)), settings)
        except ValueError as error:
            raise ValueError(f"'{file}': {error}") from error
        for stretch in (s for s in stretches if s.volume == file):
            starts = places(body, stretch, counts[stretch], settings)
            rows[stretch] = [
                _write_cube(folder, volume, body, stretch, number, start, settings)
                for number, start in enumerate(starts)
            ]
    labels, origins = [], []
    for stretch in stretches:
        for name, *origin in rows[stretch]:
            label = str(names.index(stretch.region))
            labels.append((name, stretch.patient, label, stretch.region, stretch.split))
            origins.append((name, stretch.volume, *origin))
    _write_rows(folder / "labels.csv", "file patient label label_name split", labels)
    _write_rows(folder / "provenance.csv", "file volume z_mm y_mm x_mm body", origins)
    (folder / "settings.json").write_text(json.dumps(asdict(settings), indent=1) + "\n")


def _shared_out(stretches: Sequence[Stretch], settings: RegionSettings) -> dict[Stretch, int]:
    """Cubes of each stretch: a region's cubes in a split, evenly over its patients."""
    counts = {}
    for stretch in stretches:
        like = [s for s in stretches if (s.region, s.split) == (stretch.region, stretch.split)]
        share, rest = divmod(settings.wanted(stretch.split), len(like))
        counts[stretch] = share + (like.index(stretch) < rest)
    return counts


def _write_cube(
    folder: Path,
    volume: Volume,
    body: np.ndarray,
    stretch: Stretch,
    number: int,
    start: tuple[int, int, int],
    settings: RegionSettings,
) -> tuple[str, ...]:
    """Write one cube; its file, its lowest corner in mm (z, y, x), and its share of body."""
    import SimpleITK as sitk

    slug = re.sub(r"[^A-Za-z0-9]+", "-", f"{stretch.region}_{stretch.patient}")
    name = f"patches/{slug}_{number:03d}.nii.gz"
    box = tuple(slice(at, at + settings.size) for at in start)
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.hu[box]))
    image.SetSpacing((settings.spacing,) * 3)
    with kept_locale():
        sitk.WriteImage(image, str(folder / name), useCompression=True)
    return name, *(f"{at * settings.spacing:g}" for at in start), f"{body[box].mean():.3f}"


def _write_rows(path: Path, header: str, rows: Sequence[tuple[str, ...]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header.split())
    writer.writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Build a task of regions from a table and a folder of volumes."""
    parser = argparse.ArgumentParser(
        prog="python -m medspark.data.regions",
        description="Cut cubes that show known regions of the body and write them as a labelled "
        "task. The table has the columns " + ", ".join(COLUMNS) + ".",
    )
    parser.add_argument("--corpus", required=True, help="folder of the volumes")
    parser.add_argument("--table", required=True, help="CSV of regions, volumes and splits")
    parser.add_argument("--out", required=True, help="folder of the task, not there yet")
    parser.add_argument("--size", type=int, default=32, help="voxels per edge (default 32)")
    parser.add_argument("--spacing", type=float, default=2.0, help="mm per voxel (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="choice of the cubes (default 0)")
    given = parser.parse_args(arguments)
    settings = RegionSettings(size=given.size, spacing=given.spacing, seed=given.seed)
    try:
        out = build_regions(given.corpus, read_stretches(given.table), given.out, settings)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{error}\n")
    print(f"wrote the task '{out}'")


if __name__ == "__main__":
    main()
