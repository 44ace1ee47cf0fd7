"""Whether splits of a task share people or voxels, and whether a pre-training store knows them."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medspark.data.io import read_volume
from medspark.data.pseudonyms import Pseudonyms
from medspark.data.store import Store
from medspark.data.task_images import Picture
from medspark.data.task_tables import Cube, Patch
from medspark.data.task_types import Sample, Task, shared_patients

_SHOWN = 3
_WHAT = {
    "patient": "patient(s) in more than one split",
    "file": "file(s) under two names in two splits",
    "volume": "volume(s) with the same voxels under two names, cut for two splits",
    "overlap": "pair(s) of cubes of one volume that touch or overlap across splits",
    "voxels": "pair(s) of samples with identical voxels in two splits",
    "mirrored": "pair(s) of samples in two splits that are mirror images, voxel by voxel",
}


@dataclass(frozen=True)
class Leak:
    """Something that two splits share.

    Attributes:
        kind: "patient", "file", "volume", "overlap", "voxels" or "mirrored".
        splits: The splits.
        names: The patient, or the two samples (files, volumes) that are alike.
    """

    kind: str
    splits: tuple[str, ...]
    names: tuple[str, ...]

    def __str__(self) -> str:
        """Names and splits."""
        return f"{' and '.join(self.names)} ({', '.join(self.splits)})"


def find_leaks(task: Task) -> list[Leak]:
    """What the splits of a task share. Reads every sample once.

    Found: a patient in two splits; one file under two names (links; copies give the same voxels);
    two volumes of an index with the same voxels, whatever their format; cubes of one volume in
    two splits with no voxel between them; samples with identical voxels, as they are or mirrored
    along any axes. Of many alike samples the first of each split is named. Patches of one value
    (all air) are not compared: they are alike without being from one place.

    Not found: the same person under two names; patches that were rotated, resampled, windowed
    anew or shifted by some voxels.

    Raises:
        UnreadableVolume: If a sample cannot be read.
    """
    leaks = [
        Leak("patient", tuple(splits), (patient,))
        for patient, splits in shared_patients(task.samples).items()
    ]
    leaks += _same_files(task)
    leaks += _same_volumes(task)
    overlaps = list(_overlaps(task))
    known = {frozenset(leak.names) for leak in overlaps}
    leaks += overlaps
    leaks += [leak for leak in _same_voxels(task) if frozenset(leak.names) not in known]
    return leaks


def check_leaks(task: Task, allow: bool = False) -> list[str]:
    """Refuse a task whose splits share people or voxels.

    Args:
        task: The task.
        allow: Accept it all the same.

    Returns:
        One line per kind of leak, none for a sound task.

    Raises:
        ValueError: If there is a leak and `allow` is False: what, how often, the first ones, and
            what to do.
    """
    leaks = find_leaks(task)
    counts = Counter(leak.kind for leak in leaks)
    lines = []
    for kind, count in counts.items():
        first = [str(leak) for leak in leaks if leak.kind == kind][:_SHOWN]
        more = ", ..." if count > _SHOWN else ""
        lines.append(f"{count} {_WHAT[kind]}: {', '.join(first)}{more}")
    if lines and not allow:
        raise ValueError(
            f"the splits of task '{task.name}' are not independent:\n  "
            + "\n  ".join(lines)
            + "\nSplit by patient (medspark.data.tasks.split_by_patient) and keep one copy of each "
            "sample; or set allow_leak=true and read the results as those of a leaking split."
        )
    return lines


def _across(items: Sequence[tuple[str, str]], kind: str) -> Iterator[Leak]:
    """Leaks between like things, given as (split, name): the first of each pair of splits."""
    first: dict[str, str] = {}
    for split, name in items:
        first.setdefault(split, name)
    for (split, name), (other, twin) in itertools.combinations(first.items(), 2):
        if name != twin:
            yield Leak(kind, (split, other), (name, twin))


def _same_files(task: Task) -> Iterator[Leak]:
    groups: dict[tuple[int, int], list[tuple[str, str]]] = defaultdict(list)
    for sample in task.samples:
        place = task.places[sample.id]
        if isinstance(place, Cube | Patch | Picture):
            stat = place.path.stat()
            name = place.path.name if isinstance(place, Cube) else sample.id
            groups[stat.st_dev, stat.st_ino].append((sample.split, name))
    for alike in groups.values():
        yield from _across(alike, "file")


def _same_volumes(task: Task) -> Iterator[Leak]:
    splits: dict[Path, set[str]] = {}
    for sample in task.samples:
        place = task.places[sample.id]
        if isinstance(place, Cube):
            splits.setdefault(place.path, set()).add(sample.split)
    if len(splits) < 2:
        return
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path, there in splits.items():
        hash_ = voxels_sha256(read_volume(path).hu)
        groups[hash_] += [(split, path.name) for split in sorted(there)]
    for alike in groups.values():
        if len({name for _, name in alike}) > 1:
            yield from _across(alike, "volume")


def _overlaps(task: Task) -> Iterator[Leak]:
    cubes: dict[Path, list[tuple[Sample, Cube]]] = defaultdict(list)
    for sample in task.samples:
        place = task.places[sample.id]
        if isinstance(place, Cube):
            cubes[place.path].append((sample, place))
    for group in cubes.values():
        low = np.array([cube.start for _, cube in group])
        high = low + np.array([[cube.size] for _, cube in group])
        split = np.array([sample.split for sample, _ in group])
        for at, (sample, _) in enumerate(group):
            rest = slice(at + 1, None)
            near = ((low[rest] <= high[at]) & (low[at] <= high[rest])).all(axis=1)
            for other in np.flatnonzero(near & (split[rest] != sample.split)):
                twin = group[at + 1 + int(other)][0]
                yield Leak("overlap", (sample.split, twin.split), (sample.id, twin.id))


def _same_voxels(task: Task) -> Iterator[Leak]:
    """Identical and mirrored samples: sums that mirroring keeps first, whole voxels where alike."""
    groups: dict[tuple[object, ...], list[Sample]] = defaultdict(list)
    for sample in task.samples:
        voxels, _ = task.read(sample)
        if voxels.min() != voxels.max():
            values = voxels.astype(np.int64).ravel()
            key = (voxels.dtype.str, voxels.shape, int(values.sum()), int(values @ values))
            groups[key].append(sample)
    for group in groups.values():
        if len({sample.split for sample in group}) < 2:
            continue
        mirrored: dict[bytes, list[tuple[bytes, Sample]]] = defaultdict(list)
        for sample in group:
            digests = _flip_digests(task.read(sample)[0])
            mirrored[min(digests)].append((digests[0], sample))
        for alike in mirrored.values():
            yield from _alike(alike)


def _alike(group: Sequence[tuple[bytes, Sample]]) -> Iterator[Leak]:
    """Leaks of samples that are mirror images of each other; those that are identical as such."""
    same: dict[bytes, list[tuple[str, str]]] = defaultdict(list)
    for digest, sample in group:
        same[digest].append((sample.split, sample.id))
    exact = [leak for items in same.values() for leak in _across(items, "voxels")]
    yield from exact
    known = {frozenset(leak.splits) for leak in exact}
    for leak in _across([(sample.split, sample.id) for _, sample in group], "mirrored"):
        if frozenset(leak.splits) not in known:
            yield leak


def _flip_digests(voxels: np.ndarray) -> list[bytes]:
    """Hash of the voxels in each of their 4 or 8 mirrored forms, as they are first."""
    steps = itertools.product((1, -1), repeat=voxels.ndim)
    forms = (voxels[tuple(slice(None, None, step) for step in form)] for form in steps)
    return [hashlib.sha256(form.tobytes()).digest() for form in forms]


def voxels_sha256(hu: np.ndarray) -> str:
    """Hash of a volume's size and voxels, as the manifest of a store has it."""
    return hashlib.sha256(repr(hu.shape).encode() + np.ascontiguousarray(hu).tobytes()).hexdigest()


@dataclass(frozen=True)
class StoreOverlap:
    """What a pre-training store holds of a task's evaluation splits.

    Attributes:
        patients: Patients of the task whose pseudonym is in the store.
        samples: Samples whose file or volume is in the store, voxel by voxel.
        notes: What this comparison could not see.
    """

    patients: list[str]
    samples: list[str]
    notes: list[str]

    def __bool__(self) -> bool:
        """Whether anything was found."""
        return bool(self.patients or self.samples)


def overlap_with_store(
    task: Task,
    store: Store,
    *,
    names: Pseudonyms | None = None,
    splits: Sequence[str] = ("val", "test"),
) -> StoreOverlap:
    """Which evaluation data of a task were there in pre-training.

    Patients are found where the task names them as the archive did (or its table of patients)
    and `names` has the key that the store was prepared with. Files and volumes are found by the
    hash that the store keeps of every source before cropping and resampling: the volumes of an
    index, and patches that were ingested as files. Neither finds a patch that was cut from a
    stored volume when the task does not name its patient likewise; `notes` says so.

    Args:
        task: The task.
        store: The store.
        names: Pseudonyms of the store; None for those without a key.
        splits: Splits that must be new to a network.

    Raises:
        UnreadableVolume: If a file cannot be read.
    """
    names = names or Pseudonyms()
    chosen = [s for s in task.samples if s.split in splits]
    people = {r.patient for r in store.records}
    hashes = {r.voxels_sha256 for r in store.records}
    patients = sorted({s.patient for s in chosen if names.of(f"patient:{s.patient}", 12) in people})
    found = _known_volumes(task, chosen, hashes)
    return StoreOverlap(patients, found, _notes(task, chosen, names))


def _known_volumes(task: Task, chosen: Sequence[Sample], hashes: set[str]) -> list[str]:
    by_path: dict[Path, bool] = {}
    found = []
    for sample in chosen:
        place = task.places[sample.id]
        if not isinstance(place, Cube | Patch):
            continue
        if place.path not in by_path:
            hu = read_volume(place.path, min_slices=1, patch=isinstance(place, Patch)).hu
            by_path[place.path] = voxels_sha256(hu) in hashes
        if by_path[place.path]:
            found.append(sample.id)
    return found


def _notes(task: Task, chosen: Sequence[Sample], names: Pseudonyms) -> list[str]:
    places: Mapping[str, object] = task.places
    notes = [
        "patients match only under the names that the archive had"
        + (
            ""
            if names.key
            else "; no key of pseudonyms was given: a store with one matches nothing"
        )
    ]
    if any(isinstance(places[s.id], Patch) for s in chosen):
        notes.append("patches that were cut from stored volumes are not recognised by their voxels")
    if task.grey:
        notes.append("grey arrays and pictures cannot be compared with HU: ask where they are from")
    cubes = [(s, places[s.id]) for s in chosen]
    if any(isinstance(p, Cube) and p.path.as_posix().endswith(s.patient) for s, p in cubes):
        notes.append("some volumes have no patient in the index: they match by voxels alone")
    return notes
