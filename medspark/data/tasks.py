"""Labelled classification tasks on CT patches.

Two layouts are read:

* `labels.csv` with `file, patient, label, label_name, split`: one image file per sample, inside
  the task's folder. A patient must not be in two splits.
* `index.csv` with `id, volume, i, j, k, patch_size_vox, label, label_name, split`: cubes cut from
  whole volumes. `volume` is relative to the folder two levels above the task (`data` for
  `data/tasks/my_task`) and must stay below it. `i, j, k` are indices into the array as stored,
  x first (the convention of nibabel); the cube runs from `centre - size // 2`, `size` voxels.
  The patient is the column `patient` if there is one, else the volume.

Both give patches in the orientation of the store (LPS): an index refers to the stored array, the
patch that was cut there is then turned like everything else.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from medspark.data.io import UnreadableVolume, Volume, read_volume
from medspark.data.orientation import lps_spacing, to_lps
from medspark.data.windows import Intensity

_LABELS = ("file", "patient", "label", "label_name", "split")
_INDEX = ("id", "volume", "i", "j", "k", "patch_size_vox", "label", "label_name", "split")
_JITTER_SCALE, _JITTER_SHIFT = 0.1, 0.1  # in units of the standardised values


@dataclass(frozen=True)
class Sample:
    """One labelled patch.

    Attributes:
        id: Name, unique in the task.
        patient: Whom it is from; the unit of splits and statistics.
        label: Class, from 0.
        label_name: Name of the class.
        split: Such as "train", "val" or "test".
    """

    id: str
    patient: str
    label: int
    label_name: str
    split: str


@dataclass(frozen=True)
class _Place:
    """Where a patch is: a whole file, or a box (start and size in z, y, x) of the stored array."""

    path: Path
    start: tuple[int, int, int] | None = None
    size: int = 0


@dataclass(frozen=True)
class Task:
    """A labelled task. Made by `load_task`.

    Attributes:
        name: Name of its folder.
        root: Its folder.
        samples: All samples, in file order.
        class_names: Name of each class, at the place of its label.
    """

    name: str
    root: Path
    samples: list[Sample]
    class_names: list[str]
    _places: Mapping[str, _Place] = field(repr=False, compare=False)

    def split(self, name: str) -> list[Sample]:
        """The samples of one split.

        Raises:
            ValueError: If there is no such split.
        """
        chosen = [s for s in self.samples if s.split == name]
        if not chosen:
            known = ", ".join(sorted({s.split for s in self.samples}))
            raise ValueError(f"task '{self.name}' has no split '{name}', only {known}")
        return chosen

    def read(self, sample: Sample) -> tuple[np.ndarray, tuple[float, float, float]]:
        """Read a patch.

        Returns:
            int16 HU `[z, y, x]` with axes towards S, P, L, and the spacing in mm (z, y, x).

        Raises:
            UnreadableVolume: If the file cannot be used.
            IndexError: If the patch leaves its volume.
        """
        place = self._places[sample.id]
        try:
            if place.start is None:
                volume = read_volume(place.path, min_slices=1, patch=True)
                return volume.hu, volume.spacing
            volume = _stored(place.path)
        except UnreadableVolume as error:
            raise UnreadableVolume(f"sample '{sample.id}': {error.reason}") from error
        box = tuple(slice(at, at + place.size) for at in place.start)
        if any(s.start < 0 or s.stop > n for s, n in zip(box, volume.hu.shape, strict=True)):
            raise IndexError(
                f"sample '{sample.id}': voxels {place.start} + {place.size} (z, y, x) leave the "
                f"volume of {volume.hu.shape} voxels"
            )
        patch = np.ascontiguousarray(to_lps(volume.hu[box], volume.orientation))
        return patch, lps_spacing(volume.spacing, volume.orientation)


@lru_cache(maxsize=2)
def _stored(path: Path) -> Volume:
    return read_volume(path, canonical=False)


def load_task(path: Path | str) -> Task:
    """Load a task from its folder (with a labels.csv or an index.csv) or from that file.

    Raises:
        FileNotFoundError: If there is no table, or a file that it names is missing.
        ValueError: For missing columns, a label that is no class number, classes with two names, a
            sample that comes twice, a path that leaves the allowed folder, and in labels.csv a
            patient in two splits.
    """
    path = Path(path)
    table = path
    if path.is_dir():
        table = next((path / n for n in ("labels.csv", "index.csv") if (path / n).is_file()), path)
    if not table.is_file():
        raise FileNotFoundError(f"no labels.csv or index.csv in '{path}'")
    root = table.parent
    with table.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        names = list(reader.fieldnames or ())
        indexed = "volume" in names
        missing = [c for c in (_INDEX if indexed else _LABELS) if c not in names]
        if missing:
            raise ValueError(f"'{table}' lacks the column(s) {', '.join(missing)}")
        rows = list(reader)
    if not rows:
        raise ValueError(f"'{table}' has no samples")
    samples, places = [], {}
    for line, row in enumerate(rows, start=2):
        try:
            sample, place = (_index_row if indexed else _labels_row)(root, row)
        except ValueError as error:
            raise ValueError(f"'{table}' line {line}: {error}") from error
        if sample.id in places:
            raise ValueError(f"'{table}' line {line}: sample '{sample.id}' comes twice")
        samples.append(sample)
        places[sample.id] = place
    _check_files(table, places)
    if not indexed:
        _check_patients(table, samples)
    return Task(root.resolve().name, root, samples, _class_names(table, samples), places)


def _labels_row(root: Path, row: dict[str, str]) -> tuple[Sample, _Place]:
    place = _Place(_inside(root, row["file"]))
    return _sample(row["file"], row["patient"], row), place


def _index_row(root: Path, row: dict[str, str]) -> tuple[Sample, _Place]:
    size = _integer(row, "patch_size_vox", 1)
    k, j, i = (_integer(row, axis, 0) - size // 2 for axis in "kji")
    place = _Place(_inside(root.resolve().parent.parent, row["volume"]), (k, j, i), size)
    return _sample(row["id"], row.get("patient") or row["volume"], row), place


def _sample(name: str, patient: str, row: dict[str, str]) -> Sample:
    if not name or not patient or not row["split"]:
        raise ValueError("empty name, patient or split")
    return Sample(name, patient, _integer(row, "label", 0), row["label_name"], row["split"])


def _integer(row: dict[str, str], column: str, lowest: int) -> int:
    try:
        value = int(row[column])
    except (TypeError, ValueError):
        raise ValueError(f"{column} '{row[column]}' is no whole number") from None
    if value < lowest:
        raise ValueError(f"{column} {value} is below {lowest}")
    return value


def _inside(root: Path, name: str) -> Path:
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ValueError(f"path '{name}' leaves the folder '{root.resolve().name}'")
    return path


def _check_files(table: Path, places: Mapping[str, _Place]) -> None:
    missing = sorted({p.path.name for p in places.values() if not p.path.exists()})
    if missing:
        raise FileNotFoundError(
            f"'{table}' names {len(missing)} file(s) that are missing, such as {missing[0]}"
        )


def _check_patients(table: Path, samples: list[Sample]) -> None:
    first: dict[str, str] = {}
    for sample in samples:
        if first.setdefault(sample.patient, sample.split) != sample.split:
            raise ValueError(
                f"'{table}': patient '{sample.patient}' is in the splits "
                f"'{first[sample.patient]}' and '{sample.split}'; split by patient"
            )


def _class_names(table: Path, samples: list[Sample]) -> list[str]:
    names: dict[int, str] = {}
    for sample in samples:
        if names.setdefault(sample.label, sample.label_name) != sample.label_name:
            raise ValueError(
                f"'{table}': label {sample.label} is named '{names[sample.label]}' and "
                f"'{sample.label_name}'"
            )
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"'{table}': labels are {sorted(names)}, they must run from 0 with no gap")
    return [names[label] for label in range(len(names))]


class TaskDataset(Dataset[tuple[torch.Tensor, int, int]]):
    """The patches of one split, ready for a network.

    A patch of another size than `size` is resampled trilinearly as a whole (voxel centres aligned
    to faces), so that it shows the same tissue and no invented air; its voxel size changes
    with it. A patch of the right size is not touched.

    Args:
        task: The task.
        split: Name of the split.
        intensity: Window and standardisation; the pre-trained checkpoint's.
        size: Voxels (d, h, w), None keeps each patch's.
        augment: Mirror each axis with probability 1/2, then scale by 0.9 to 1.1 and shift by -0.1 to 0.1
            (standardised units, uniform).
        seed: Seed of the augmentation, a function of (seed, epoch, index) alone.
    """

    def __init__(
        self,
        task: Task,
        split: str,
        intensity: Intensity,
        size: tuple[int, int, int] | None,
        *,
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        if size is not None and (len(size) != 3 or min(size) < 1):
            raise ValueError(f"size {size} must be three positive numbers (d, h, w)")
        self.task, self.samples = task, task.split(split)
        self.intensity, self.size, self.augment, self.seed = intensity, size, augment, seed
        # Shared memory: worker processes that outlive an epoch see the change too.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose augmentation is drawn."""
        self._epoch[0] = epoch

    def __len__(self) -> int:
        """Samples in the split."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        """Patch float32 `[1, D, H, W]`, its label and its index in the split."""
        sample = self.samples[index]
        x = self.intensity.normalise(torch.from_numpy(self.task.read(sample)[0].copy()))
        if self.size is not None and tuple(x.shape) != tuple(self.size):
            x = torch.nn.functional.interpolate(
                x[None, None], size=self.size, mode="trilinear", align_corners=False
            )[0, 0]
        if self.augment:
            x = self._augmented(x, index)
        return x[None].contiguous(), sample.label, index

    def _augmented(self, x: torch.Tensor, index: int) -> torch.Tensor:
        rng = np.random.default_rng([self.seed, int(self._epoch[0]), index])
        x = x.flip([axis for axis in range(3) if rng.random() < 0.5])
        scale, shift = rng.uniform(-1, 1, size=2) * (_JITTER_SCALE, _JITTER_SHIFT)
        return x * float(1 + scale) + float(shift)
