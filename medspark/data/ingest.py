"""`medspark prepare`: find CT volumes in a folder, check them, put them into a store.

Nothing that identifies a person goes into the store: patient ids and series UIDs are hashed, paths
are relative to the source folder. Every source ends as a row of the manifest, with its reason where
it is not used.
"""

from __future__ import annotations

import csv
import fnmatch
import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from time import monotonic

import numpy as np

from medspark.data.headers import MAX_VOXELS, UnreadableVolume, image_suffix
from medspark.data.io import Volume, read_volume
from medspark.data.sources import Source, find_sources
from medspark.data.store import TEMPORARY, Record, Store, hash_text, write_array

__all__ = ["PrepareReport", "Source", "find_sources", "prepare", "resample"]

READER_VERSION = 1  # raise it when the same file would give other voxels: volumes are then redone
_MANIFEST_SECONDS = 2.0
Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did.

    Attributes:
        ok: Volumes of this source folder that are in the store and usable.
        quarantined: Sources that were refused.
        skipped: Sources that were left out: excluded, duplicates, DICOM without an image.
        reused: Sources that were not read again as they had not changed.
        rows: The manifest row of every source found, in the order of the source folder.
    """

    ok: int
    quarantined: int
    skipped: int
    reused: int
    rows: list[Record]


def prepare(
    source: Path | str,
    store: Path | str,
    *,
    spacing: Spacing | None = None,
    patients_csv: Path | str | None = None,
    exclude_patients: Collection[str] = (),
    exclude_files: Collection[str] = (),
    workers: int = 1,
    progress: bool = True,
) -> PrepareReport:
    """Put every CT volume under `source` into the store, and a row for every source found.

    Idempotent: unchanged sources are not read again. May be killed at any moment and run again.
    A volume whose voxels are in the store already becomes a "duplicate" row without an array.

    Args:
        source: Folder to search.
        store: Folder of the store; made if absent.
        spacing: Resample to this voxel size in mm (z, y, x), linearly; None keeps each volume's.
        patients_csv: Table with columns `file` (relative to `source`; a folder stands for all
            below it) and `patient`. It overrides the ids of the files.
        exclude_patients: Patient ids (in clear) whose volumes stay out, or are taken out.
        exclude_files: Glob patterns on source names that stay out; `*` also matches "/".
        workers: Processes that read and compress.
        progress: Show a progress bar.

    Raises:
        FileNotFoundError: If the source folder or the table is missing.
        ValueError: For an impossible spacing, or a table without its columns.
    """
    if spacing is not None and not all(np.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing {spacing} mm must be three positive numbers (z, y, x)")
    source, target = Path(source), Store.create(store)
    for leftover in [*target.path.glob(f"{TEMPORARY}*"), *target.path.glob(f"*/{TEMPORARY}*")]:
        leftover.unlink()
    patients = _read_patients(Path(patients_csv)) if patients_csv is not None else {}
    sources = find_sources(source)
    known = {record.id: record for record in target.all_records}
    done: list[Record] = []
    jobs = []
    for item in sources:
        patient = _patient_of(item, patients)
        job = _Job(item, target.path, spacing, patient)
        reason = _excluded(item, patient, exclude_patients, exclude_files)
        if item.status != "ok":
            done.append(job.record())
        elif reason:
            done.append(replace(job.record(), status="excluded", reason=reason))
        else:
            jobs.append(job)
    _take_out(done, known, target)
    reused = _settled(jobs, known, target)
    target.put([*done, *reused])
    kept = {record.id for record in reused}
    done += _run([job for job in jobs if job.source.id not in kept], target, workers, progress)
    return _report(sources, [*done, *reused], len(reused))


def _take_out(done: Sequence[Record], known: dict[str, Record], store: Store) -> None:
    """Remove what an earlier run stored and this one leaves out."""
    for record in done:
        store.volume_path(record.id).unlink(missing_ok=True)
        known.pop(record.id, None)


def _report(sources: Sequence[Source], done: Sequence[Record], reused: int) -> PrepareReport:
    by_id = {record.id: record for record in done}
    rows = [by_id[item.id] for item in sources]
    count = Counter(row.status for row in rows)
    skipped = count["excluded"] + count["duplicate"] + count["ignored"]
    return PrepareReport(count["ok"], count["quarantined"], skipped, reused, rows)


def _settled(jobs: Sequence[_Job], known: dict[str, Record], store: Store) -> list[Record]:
    """Rows of an earlier run that still hold: same files, same settings, array in place."""
    settled, duplicates, stale = [], [], set()
    for job in jobs:
        record = known.get(job.source.id)
        if record is None or record.fingerprint != job.record().fingerprint:
            stale.add(job.source.id)
        elif record.status == "duplicate":
            duplicates.append(record)
        elif record.status == "quarantined" or store.volume_path(record.id).is_file():
            settled.append(record)
        else:
            stale.add(record.id)
    # A duplicate is settled as long as the volume that it repeats stays.
    kept = {r.voxels_sha256 for r in known.values() if r.status == "ok" and r.id not in stale}
    return settled + [record for record in duplicates if record.voxels_sha256 in kept]


def _read_patients(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise FileNotFoundError(f"no table of patients '{path}'")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if not {"file", "patient"} <= set(reader.fieldnames or ()):
            raise ValueError(f"'{path}' needs the columns file and patient")
        return {row["file"].strip("/"): row["patient"] for row in reader if row["patient"]}


def _patient_of(item: Source, patients: dict[str, str]) -> str | None:
    name = item.name.split("#")[0]
    for candidate in (item.name, name, *(p.as_posix() for p in Path(name).parents)):
        if candidate in patients:
            return patients[candidate]
    return item.patient


def _excluded(
    item: Source, patient: str | None, patients: Collection[str], patterns: Collection[str]
) -> str:
    if patient is not None and patient in patients:
        return "patient excluded"
    pattern = next((p for p in patterns if fnmatch.fnmatchcase(item.name, p)), None)
    return f"file excluded by '{pattern}'" if pattern else ""


@dataclass(frozen=True)
class _Job:
    """One source to convert; small enough to send to a worker process."""

    source: Source
    store: Path
    spacing: Spacing | None
    patient: str | None

    @property
    def temporary(self) -> Path:
        return self.store / "volumes" / f"{TEMPORARY}{self.source.id}.b2nd"

    def record(self) -> Record:
        """The row before anything was read."""
        item = self.source
        anonymous = self.patient is None
        parts = [READER_VERSION, self.spacing, self.patient]
        for path in item.files:
            stat = path.stat()
            parts += [path.name, stat.st_size, stat.st_mtime_ns]
        return Record(
            id=item.id,
            source=item.name,
            patient=hash_text(f"file:{item.name}" if anonymous else f"patient:{self.patient}", 12),
            series=hash_text(item.series, 12) if item.series else "",
            status=item.status,
            reason=item.reason,
            fingerprint=hash_text(repr(parts)),
        )


def _convert(job: _Job) -> Record:
    """Read, resample, compress under a temporary name. Never raises for a bad volume."""
    record = job.record()
    files = job.source.files
    try:
        single = len(files) == 1 and image_suffix(files[0]) is not None
        volume = read_volume(files[0] if single else files)
        # Before resampling: a copy whose header rounds the spacing differently is a copy still.
        digest = hashlib.sha256(repr(volume.hu.shape).encode() + volume.hu.tobytes())
        if job.spacing is not None:
            volume = resample(volume, job.spacing)
    except UnreadableVolume as error:
        return replace(record, status="quarantined", reason=error.reason)
    write_array(job.temporary, volume.hu)
    warnings = list(volume.warnings)
    if job.patient is None:
        warnings.append("no patient id: counted as a patient of its own")
    d, h, w = volume.hu.shape
    return replace(
        record,
        size=(d, h, w),
        spacing=volume.spacing,
        orientation=volume.orientation,
        hu_min=int(volume.hu.min()),
        hu_max=int(volume.hu.max()),
        voxels_sha256=digest.hexdigest(),
        warnings=tuple(warnings),
    )


def resample(volume: Volume, spacing: Spacing) -> Volume:
    """Resample linearly to another voxel size (z, y, x) in mm; the outer faces stay in place.

    Samples beyond the centres of the outer voxels take the nearest voxel's value.

    Raises:
        UnreadableVolume: If the result would have fewer than 1 or more than 2^31 voxels.
    """
    import SimpleITK as sitk

    old, new = np.array(volume.spacing), np.array(spacing, dtype=float)
    size = np.maximum(1, np.rint(np.array(volume.hu.shape) * old / new)).astype(int)
    if np.prod(size, dtype=object) > MAX_VOXELS:
        raise UnreadableVolume(f"resampling to {spacing} mm would give {size.tolist()} voxels")
    image = sitk.GetImageFromArray(volume.hu)
    image.SetSpacing(old[::-1].tolist())
    start = (np.array(volume.hu.shape) * old - size * new) / 2 + (new - old) / 2
    filter_ = sitk.ResampleImageFilter()
    filter_.SetSize(size[::-1].tolist())
    filter_.SetOutputSpacing(new[::-1].tolist())
    filter_.SetOutputOrigin(start[::-1].tolist())
    # No sample leaves the outer half voxel, where ITK's linear interpolation repeats the edge.
    filter_.SetInterpolator(sitk.sitkLinear)
    filter_.SetNumberOfThreads(1)
    hu = sitk.GetArrayFromImage(filter_.Execute(image))
    origin = np.array(volume.origin) + volume.direction @ start[::-1]
    sd, sh, sw = (float(s) for s in new)
    return replace(volume, hu=hu, spacing=(sd, sh, sw), origin=tuple(origin.tolist()))


def _run(jobs: Sequence[_Job], store: Store, workers: int, progress: bool) -> list[Record]:
    """Convert all jobs; commit in the order of the source folder, so duplicates are definite."""
    redone = {job.source.id for job in jobs}
    seen = {r.voxels_sha256: r for r in store.records if r.id not in redone}
    fresh: list[Record] = []
    finished: list[Record] = []
    last = monotonic()
    for record in _progress(_results(jobs, workers), len(jobs), progress):
        finished.append(_commit(record, store, seen))
        fresh.append(finished[-1])
        if monotonic() - last > _MANIFEST_SECONDS:
            store.put(fresh)
            fresh, last = [], monotonic()
    store.put(fresh)
    return finished


def _commit(record: Record, store: Store, seen: dict[str, Record]) -> Record:
    temporary = _Job(Source((), record.source), store.path, None, None).temporary
    final = store.volume_path(record.id)
    first = seen.get(record.voxels_sha256) if record.status == "ok" else None
    if first is not None and first.id != record.id:
        reason = f"same voxels as {first.source}"
        record = replace(record, status="duplicate", reason=reason)
    if record.status == "ok":
        os.replace(temporary, final)
        seen[record.voxels_sha256] = record
    else:
        temporary.unlink(missing_ok=True)
        final.unlink(missing_ok=True)
    return record


def _results(jobs: Sequence[_Job], workers: int) -> Iterator[Record]:
    if workers <= 1 or len(jobs) <= 1:
        yield from map(_convert, jobs)
        return
    # spawn: the parent may hold threads (torch, ITK) that do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        window: list[Future[Record]] = []
        for job in jobs:
            window.append(pool.submit(_convert, job))
            if len(window) >= 4 * workers:
                yield window.pop(0).result()
        for future in window:
            yield future.result()


def _progress(records: Iterator[Record], total: int, show: bool) -> Iterable[Record]:
    if not show:
        return records
    from rich.progress import track

    # On stdout: while a volume is read, stderr belongs to the readers and is thrown away.
    return track(records, total=total, description="prepare", transient=False)
