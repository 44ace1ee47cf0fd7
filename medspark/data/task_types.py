"""What a labelled task is: samples, where their voxels are, and splits by patient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from medspark.data.io import UnreadableVolume
from medspark.data.store import hash_text

_SHOWN = 3  # examples in a message


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


class Place(Protocol):
    """Where a patch is, and how it is read."""

    @property
    def path(self) -> Path:
        """The file that holds it."""

    def read(self, name: str) -> tuple[np.ndarray, tuple[float, ...]]:
        """Voxels and spacing; `name` is the sample's, for errors."""


@dataclass(frozen=True)
class Task:
    """A labelled task. Made by `medspark.data.tasks.load_task`.

    Attributes:
        name: Name of its folder or file.
        root: Its folder.
        samples: All samples, in file order.
        class_names: Name of each class, at the place of its label.
        grey: The voxels are grey values (uint8 or uint16 from 0 up), not HU.
        dims: 3 for volumes, 2 for pictures.
        warnings: What is doubtful about it, one line each.
    """

    name: str
    root: Path
    samples: list[Sample]
    class_names: list[str]
    grey: bool = False
    dims: int = 3
    warnings: list[str] = field(default_factory=list)
    places: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

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

    def read(self, sample: Sample) -> tuple[np.ndarray, tuple[float, ...]]:
        """Read a patch.

        Returns:
            int16 HU `[z, y, x]` with axes towards S, P, L; in a grey task uint8 or uint16
            `[z, y, x]` or `[y, x]` as stored. Then the spacing in mm in the same order; 1 where
            the file knows none.

        Raises:
            UnreadableVolume: If the file cannot be used.
            IndexError: If the patch leaves its volume.
        """
        place: Place = self.places[sample.id]
        try:
            return place.read(sample.id)
        except UnreadableVolume as error:
            raise UnreadableVolume(f"sample '{sample.id}': {error.reason}") from error


def class_names(where: str, samples: Sequence[Sample]) -> list[str]:
    """Name of each class. Raises ValueError for two names of a label, and for gaps."""
    names: dict[int, str] = {}
    for sample in samples:
        if names.setdefault(sample.label, sample.label_name) != sample.label_name:
            raise ValueError(
                f"{where}: label {sample.label} is named '{names[sample.label]}' and "
                f"'{sample.label_name}'"
            )
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"{where}: labels are {sorted(names)}, they must run from 0 with no gap")
    return [names[label] for label in range(len(names))]


def shared_patients(samples: Sequence[Sample]) -> dict[str, list[str]]:
    """Patients with samples in more than one split, each with its splits."""
    found: dict[str, set[str]] = {}
    for sample in samples:
        found.setdefault(sample.patient, set()).add(sample.split)
    return {patient: sorted(splits) for patient, splits in found.items() if len(splits) > 1}


def patient_warnings(samples: Sequence[Sample]) -> list[str]:
    """One line if patients are in several splits, else none."""
    shared = shared_patients(samples)
    if not shared:
        return []
    patient, splits = next(iter(shared.items()))
    return [
        f"{len(shared)} patient(s) in more than one split, such as '{patient}' in "
        f"{' and '.join(splits)}: results on these splits say nothing about other people"
    ]


def split_by_patient(task: Task, fractions: Mapping[str, float], seed: int) -> Task:
    """The same task with splits drawn anew: whole patients, classes in like shares.

    First every class gives one patient to every split, rarest class first, as far as its patients
    go; then each remaining patient, those with most samples first, goes to the split where it
    lowers chi-square between the samples of each class there and their due share most (in the
    first step: the patient is chosen so). Equal patients come in the order of a hash of seed and
    name: the order of the samples plays no part.

    Args:
        task: The task; its own splits are forgotten.
        fractions: Share of each split, such as `{"train": 0.7, "val": 0.1, "test": 0.2}`.
        seed: Choice of the split.

    Raises:
        ValueError: If the fractions are not positive or do not add up to 1, or there are fewer
            patients than splits.
    """
    if not fractions or min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError(f"fractions {dict(fractions)} must be positive and add up to 1")
    counts: dict[str, Counter[int]] = {}
    for sample in task.samples:
        counts.setdefault(sample.patient, Counter())[sample.label] += 1
    if len(counts) < len(fractions):
        raise ValueError(f"{len(counts)} patient(s) cannot fill {len(fractions)} splits")
    queue = sorted(counts, key=lambda p: (-counts[p].total(), hash_text(f"{seed}/{p}", 64)))
    table = np.array([[counts[p][c] for c in range(len(task.class_names))] for p in queue])
    names = list(fractions)
    chosen = _assign(table, np.array([fractions[n] for n in names]))
    place = {patient: names[at] for patient, at in zip(queue, chosen, strict=True)}
    samples = [replace(s, split=place[s.patient]) for s in task.samples]
    lines = [w for w in task.warnings if w not in patient_warnings(task.samples)]
    return replace(task, samples=samples, warnings=lines + _missing_classes(task, samples, names))


def _assign(table: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Split of each patient, from samples per patient and class, `[patients, classes]`."""
    chosen = np.full(len(table), -1)
    held = np.zeros((len(shares), table.shape[1]))
    due = np.maximum(shares[:, None] * table.sum(axis=0), 1e-9)

    def give(patient: int, split: int) -> None:
        chosen[patient] = split
        held[split] += table[patient]

    def give_best(free: np.ndarray, split: int) -> None:
        misfit = (held[split] + table[free] - due[split]) ** 2 / due[split]
        give(int(free[misfit.sum(axis=1).argmin()]), split)

    for label in np.argsort((table > 0).sum(axis=0), kind="stable"):
        for split in np.argsort(-shares, kind="stable").tolist():
            free = np.flatnonzero((chosen < 0) & (table[:, label] > 0))
            empty = held.sum(axis=1) == 0
            spare = empty[split] or (chosen < 0).sum() > empty.sum()  # none left without anybody
            if not held[split, label] and len(free) and spare:
                give_best(free, split)
    for split in np.flatnonzero(held.sum(axis=1) == 0).tolist():
        give_best(np.flatnonzero(chosen < 0), split)
    for patient in np.flatnonzero(chosen < 0):
        change = (table[patient] * (2 * (held - due) + table[patient]) / due).sum(axis=1)
        give(int(patient), int(change.argmin()))
    return chosen


def _missing_classes(task: Task, samples: Sequence[Sample], splits: Sequence[str]) -> list[str]:
    there = {(s.split, s.label) for s in samples}
    return [
        f"too few patients: the split '{split}' has none of class '{name}'"
        for split in splits
        for label, name in enumerate(task.class_names)
        if (split, label) not in there
    ]
