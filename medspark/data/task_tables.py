"""Tasks from a table: one file per sample (`labels.csv`), or cubes of volumes (`index.csv`)."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from medspark.data.io import Volume, read_volume
from medspark.data.orientation import lps_spacing, to_lps
from medspark.data.task_images import Picture, is_picture
from medspark.data.task_types import Sample, Task, class_names, patient_warnings

_LABELS = ("file", "patient", "label", "label_name", "split")
_INDEX = ("id", "volume", "i", "j", "k", "patch_size_vox", "label", "label_name", "split")


@dataclass(frozen=True)
class Patch:
    """A file that is one patch of CT."""

    path: Path

    def read(self, name: str) -> tuple[np.ndarray, tuple[float, ...]]:
        """int16 HU `[z, y, x]` in LPS and spacing."""
        volume = read_volume(self.path, min_slices=1, patch=True)
        return volume.hu, volume.spacing


@dataclass(frozen=True)
class Cube:
    """A cube of a volume: first voxel (z, y, x) of the stored array, and voxels per edge."""

    path: Path
    start: tuple[int, int, int]
    size: int

    def read(self, name: str) -> tuple[np.ndarray, tuple[float, ...]]:
        """int16 HU `[z, y, x]` in LPS and spacing. IndexError if it leaves the volume."""
        volume = _stored(self.path)
        box = tuple(slice(at, at + self.size) for at in self.start)
        if any(s.start < 0 or s.stop > n for s, n in zip(box, volume.hu.shape, strict=True)):
            raise IndexError(
                f"sample '{name}': voxels {self.start} + {self.size} (z, y, x) leave the "
                f"volume of {volume.hu.shape} voxels"
            )
        patch = np.ascontiguousarray(to_lps(volume.hu[box], volume.orientation))
        return patch, lps_spacing(volume.spacing, volume.orientation)


@lru_cache(maxsize=2)
def _stored(path: Path) -> Volume:
    return read_volume(path, canonical=False)


def load_table(table: Path, need_split: bool) -> Task:
    """Load a labels.csv or an index.csv; see `medspark.data.tasks`.

    Args:
        table: The file.
        need_split: Whether its column `split` has to be there and filled.

    Raises:
        FileNotFoundError: If a file that it names is missing.
        ValueError: For anything wrong in it.
    """
    root = table.parent
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        indexed = _check_columns(table, reader.fieldnames or (), need_split)
        rows = list(reader)
    if not rows:
        raise ValueError(f"'{table}' has no samples")
    samples: list[Sample] = []
    places: dict[str, Patch | Cube | Picture] = {}
    for line, row in enumerate(rows, start=2):
        try:
            sample, place = (_index_row if indexed else _labels_row)(root, row, need_split)
        except ValueError as error:
            raise ValueError(f"'{table}' line {line}: {error}") from error
        if sample.id in places:
            raise ValueError(f"'{table}' line {line}: sample '{sample.id}' comes twice")
        samples.append(sample)
        places[sample.id] = place
    _check_files(table, places)
    flat = [isinstance(place, Picture) for place in places.values()]
    if any(flat) and not all(flat):
        raise ValueError(
            f"'{table}' names {sum(flat)} pictures among volumes: make two tasks of it"
        )
    return Task(
        name=root.resolve().name,
        root=root,
        samples=samples,
        class_names=class_names(f"'{table}'", samples),
        grey=all(flat),
        dims=2 if all(flat) else 3,
        warnings=patient_warnings(samples),
        places=places,
    )


def _check_columns(table: Path, names: Sequence[str], need_split: bool) -> bool:
    """Whether it is an index. Raises ValueError for missing columns."""
    indexed = "volume" in names
    missing = [c for c in (_INDEX if indexed else _LABELS) if c not in names]
    if missing == ["split"]:
        if not need_split:
            return indexed
        raise ValueError(
            f"'{table}' lacks the column split, which says train, val or test of every sample: "
            "add it, the same for all samples of a patient, or have it drawn by patient with "
            "load_task(path, fractions={'train': 0.7, 'val': 0.1, 'test': 0.2}, seed=0)"
        )
    if missing:
        raise ValueError(f"'{table}' lacks the column(s) {', '.join(missing)}")
    return indexed


def _labels_row(
    root: Path, row: dict[str, str], need_split: bool
) -> tuple[Sample, Patch | Picture]:
    path = inside(root, row["file"] or "")
    place = Picture(path) if is_picture(path) else Patch(path)
    return _sample(row["file"], row["patient"], row, need_split), place


def _index_row(root: Path, row: dict[str, str], need_split: bool) -> tuple[Sample, Cube]:
    size = _integer(row, "patch_size_vox", 1)
    k, j, i = (_integer(row, axis, 0) - size // 2 for axis in "kji")
    place = Cube(inside(root.resolve().parent.parent, row["volume"]), (k, j, i), size)
    return _sample(row["id"], row.get("patient") or row["volume"], row, need_split), place


def _sample(name: str, patient: str, row: dict[str, str], need_split: bool) -> Sample:
    split = row.get("split") or ""
    if not name or not patient or (need_split and not split):
        raise ValueError("empty name, patient or split")
    return Sample(name, patient, _integer(row, "label", 0), row["label_name"], split)


def _integer(row: dict[str, str], column: str, lowest: int) -> int:
    try:
        value = int(row[column])
    except (TypeError, ValueError):
        raise ValueError(f"{column} '{row[column]}' is no whole number") from None
    if value < lowest:
        raise ValueError(f"{column} {value} is below {lowest}")
    return value


def inside(root: Path, name: str) -> Path:
    """The file `name` of a folder. Raises ValueError if it leaves it, by a link too."""
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ValueError(f"path '{name}' leaves the folder '{root.resolve().name}'")
    return path


def _check_files(table: Path, places: Mapping[str, Patch | Cube | Picture]) -> None:
    missing = sorted({p.path.name for p in places.values() if not p.path.exists()})
    if missing:
        raise FileNotFoundError(
            f"'{table}' names {len(missing)} file(s) that are missing, such as {missing[0]}"
        )
