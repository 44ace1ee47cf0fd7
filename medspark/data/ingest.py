"""`medspark prepare`: find CT volumes in a folder, check them, put them into a store.

Nothing that identifies a person goes into the store: patient ids and series UIDs are hashed, paths
are relative to the source folder. Every source ends as a row of the manifest, with its reason where
it is not used.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic

import numpy as np

from medspark.data.body import write_table
from medspark.data.headers import MAX_BYTES, UnreadableVolume, image_suffix
from medspark.data.io import read_volume
from medspark.data.pseudonyms import Pseudonyms, words
from medspark.data.resample import Spacing, crop_to_body, resample
from medspark.data.sources import (
    Source,
    find_sources,
    patient_of,
    person_of,
    read_patients,
)
from medspark.data.store import TEMPORARY, Record, Store, write_array, write_atomically
from medspark.data.suspects import suspicions
from medspark.data.workers import Failure, run_isolated

__all__ = ["PrepareReport", "Source", "find_sources", "prepare", "resample"]

READER_VERSION = 2  # raise it when the same file would give other voxels: volumes are then redone
_MANIFEST_SHARE = 10  # of the time goes at most one part into writing the manifest
_NOT_HU = "does not look like HU"


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


@dataclass(frozen=True)
class Options:
    """How volumes are read and stored; volumes are redone when one of these changes.

    Attributes:
        spacing: Resample to this voxel size in mm (z, y, x), linearly; None keeps each volume's.
        body_margin: Crop to the body and so many mm around it; None keeps the whole volume.
        uneven: Interpolate series with uneven slice steps (up to twofold) instead of refusing them.
        max_gib: Refuse volumes whose voxels need more memory.
    """

    spacing: Spacing | None = None
    body_margin: float | None = None
    uneven: bool = False
    max_gib: float = MAX_BYTES / 2**30

    def __post_init__(self) -> None:
        if self.spacing is not None and not all(np.isfinite(s) and s > 0 for s in self.spacing):
            raise ValueError(f"spacing {self.spacing} mm must be three positive numbers (z, y, x)")
        if self.body_margin is not None and not 0 <= self.body_margin < 1000:
            raise ValueError(f"body_margin is {self.body_margin} mm, it must be 0 or more")
        if not 0 < self.max_gib < 1024:
            raise ValueError(f"max_gib is {self.max_gib}, it must be positive")

    @property
    def max_bytes(self) -> int:
        """The limit in bytes."""
        return int(self.max_gib * 2**30)


def prepare(
    source: Path | str,
    store: Path | str,
    *,
    spacing: Spacing | None = None,
    body_margin: float | None = None,
    uneven: bool = False,
    patients_csv: Path | str | None = None,
    salt_file: Path | str | None = None,
    hide_paths: bool = False,
    key_table: Path | str | None = None,
    exclude_patients: Collection[str] = (),
    exclude_files: Collection[str] = (),
    accept_files: Collection[str] = (),
    max_gib: float = MAX_BYTES / 2**30,
    timeout: float | None = 600,
    verify: bool = False,
    workers: int = 0,
    progress: bool = True,
) -> PrepareReport:
    """Put every CT volume under `source` into the store, and a row for every source found.

    Idempotent: unchanged sources are not read again. May be killed at any moment and run again.
    A volume whose voxels are in the store already becomes a "duplicate" row without an array.
    What does not look like HU, a montage and a stitched stack are quarantined.

    Args:
        source: Folder to search.
        store: Folder of the store; made if absent.
        spacing: See `Options`.
        body_margin: See `Options`.
        uneven: See `Options`.
        patients_csv: Table with columns `file` (relative to `source`; a folder stands for all
            below it) and `patient`. It overrides the ids of the files.
        salt_file: File with a secret of 16 characters or more, with which patient ids and series
            UIDs are hashed. Without it whoever has a list of the ids can find them again.
        hide_paths: Hash every part of a source's path in the manifest; otherwise only parts that
            hold the patient's id or name.
        key_table: File outside the store for a table of id, source and patient in clear.
        exclude_patients: Patient ids (in clear) whose volumes stay out, or are taken out.
        exclude_files: Glob patterns on source names that stay out; `*` also matches "/".
        accept_files: Glob patterns on source names that are stored although they look odd.
        max_gib: See `Options`.
        timeout: Seconds for one volume, where worker processes read.
        verify: Read the store's arrays and make those anew that are not what was written.
        workers: Processes that read and compress. 0 reads in this process, where a file that
            crashes the C++ reader ends the run; with 1 or more it is quarantined.
        progress: Show a progress bar.

    Raises:
        FileNotFoundError: If the source folder or a table is missing.
        BlockingIOError: If another run is writing to the store.
        ValueError: For an impossible setting, or a table without its columns.
    """
    options = Options(spacing, body_margin, uneven, max_gib)
    names = Pseudonyms.from_file(salt_file, hide_paths)
    source, target = Path(source), Store.create(store)
    if key_table is not None and Path(key_table).resolve().is_relative_to(target.path.resolve()):
        raise ValueError(f"key_table '{key_table}' lies in the store: it must not travel with it")
    with target.lock():
        target.sweep()
        patients = read_patients(Path(patients_csv)) if patients_csv is not None else {}
        sources = find_sources(source)
        done, jobs = [], []
        token = os.urandom(4).hex()
        known = [secret for item in sources for secret in item.secrets]
        others = words([*known, *patients.values()])
        for item in sources:
            patient = patient_of(item, patients)
            shown = names.path(item.name, [*item.secrets, *([patient] if patient else [])], others)
            accepted = _matches(item.name, accept_files) is not None
            job = _Job(item, target.path, options, names, shown, patient, token, accepted)
            reason = _excluded(item, patient, exclude_patients, exclude_files)
            if item.status != "ok":
                done.append(job.record())
            elif reason:
                done.append(replace(job.record(), status="excluded", reason=reason))
            else:
                jobs.append(job)
        if key_table is not None:
            _write_key_table(Path(key_table), [*jobs], names)
        left_out = {record.id for record in done}
        earlier = {r.id: r for r in target.all_records if r.id not in left_out}
        reused = _settled(jobs, earlier, target, verify)
        kept = {record.id for record in reused}
        fresh = [job for job in jobs if job.id not in kept]
        # Rows go before arrays: a row in the manifest always has its array, whatever happens.
        target.put([*done, *reused], without={job.id for job in fresh})
        target.sweep()
        done += _run(fresh, target, workers, timeout, progress)
        target.sweep()
    return _report([names.of(item.name) for item in sources], [*done, *reused], len(reused))


def _write_key_table(path: Path, jobs: Sequence[_Job], names: Pseudonyms) -> None:
    rows = [f"{job.id},{_quoted(job.source.name)},{_quoted(job.patient or '')}" for job in jobs]
    write_atomically(path, "\n".join(["id,source,patient", *rows, ""]), mode=0o600)


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _report(ids: Sequence[str], done: Sequence[Record], reused: int) -> PrepareReport:
    by_id = {record.id: record for record in done}
    rows = [by_id[one] for one in ids]
    count = Counter(row.status for row in rows)
    skipped = count["excluded"] + count["duplicate"] + count["ignored"]
    return PrepareReport(count["ok"], count["quarantined"], skipped, reused, rows)


def _settled(
    jobs: Sequence[_Job], known: dict[str, Record], store: Store, verify: bool
) -> list[Record]:
    """Rows of an earlier run that still hold: same files, same settings, array in place."""

    def usable(record: Record) -> bool:
        return store.intact(record) if verify else store.volume_path(record.id).is_file()

    settled, duplicates, stale = [], [], set()
    for job in jobs:
        record = known.get(job.id)
        if record is None or record.fingerprint != job.record().fingerprint:
            stale.add(job.id)
        elif record.status == "duplicate":
            duplicates.append(record)
        elif record.status == "quarantined" or usable(record):
            settled.append(record)
        else:
            stale.add(record.id)
    # A duplicate is settled as long as the volume that it repeats stays.
    kept = {r.voxels_sha256 for r in known.values() if r.status == "ok" and r.id not in stale}
    return settled + [record for record in duplicates if record.voxels_sha256 in kept]


def _excluded(
    item: Source, patient: str | None, patients: Collection[str], patterns: Collection[str]
) -> str:
    if patient is not None and patient in patients:
        return "patient excluded"
    pattern = _matches(item.name, patterns)
    return f"file excluded by '{pattern}'" if pattern else ""


def _matches(name: str, patterns: Collection[str]) -> str | None:
    return next((p for p in patterns if fnmatch.fnmatchcase(name, p)), None)


@dataclass(frozen=True)
class _Job:
    """One source to convert; small enough to send to a worker process."""

    source: Source
    store: Path
    options: Options
    names: Pseudonyms = field(repr=False)
    shown: str
    patient: str | None
    token: str  # of this run: a worker that outlives a killed run writes under another name
    accepted: bool = False

    @property
    def id(self) -> str:
        """Name of the volume in the store."""
        return self.names.of(self.source.name)

    @property
    def temporary(self) -> Path:
        return self.store / "volumes" / f"{TEMPORARY}{self.token}-{self.id}.b2nd"

    def record(self) -> Record:
        """The row before anything was read."""
        item, names = self.source, self.names
        patient = names.of(person_of(item, self.patient), 12)
        parts = [READER_VERSION, self.options, self.accepted, patient, self.shown]
        for path in item.files:
            stat = path.stat()
            parts += [names.of(path.name), stat.st_size, stat.st_mtime_ns]
        return Record(
            id=self.id,
            source=self.shown,
            patient=patient,
            series=names.of(item.series, 12) if item.series else "",
            status=item.status,
            reason=item.reason,
            fingerprint=names.of(repr(parts)),
        )


def _convert(job: _Job) -> Record:
    """Read, resample, compress under a temporary name. Never raises for a bad volume."""
    record = job.record()
    options, files = job.options, job.source.files
    try:
        single = len(files) == 1 and image_suffix(files[0]) is not None
        volume = read_volume(
            files[0] if single else files, uneven=options.uneven, max_bytes=options.max_bytes
        )
        doubts = [w for w in volume.warnings if w.startswith(_NOT_HU)] + suspicions(volume.hu)
        # Before resampling: a copy whose header rounds the spacing differently is a copy still.
        voxels = hashlib.sha256(repr(volume.hu.shape).encode() + volume.hu.tobytes())
        if options.body_margin is not None:
            volume = crop_to_body(volume, options.body_margin)
        if options.spacing is not None:
            volume = resample(volume, options.spacing, options.max_bytes)
    except UnreadableVolume as error:
        return replace(record, status="quarantined", reason=error.reason)
    except OSError as error:
        reason = f"cannot be read: {error.strerror or type(error).__name__}"
        return replace(record, status="quarantined", reason=reason)
    warnings = list(dict.fromkeys([*volume.warnings, *doubts]))
    if job.patient is None:
        warnings.append("no patient id: counted as a patient of its own")
    d, h, w = volume.hu.shape
    record = replace(
        record,
        size=(d, h, w),
        spacing=volume.spacing,
        orientation=volume.orientation,
        hu_min=int(volume.hu.min()),
        hu_max=int(volume.hu.max()),
        voxels_sha256=voxels.hexdigest(),
        warnings=tuple(warnings),
    )
    if doubts and not job.accepted:
        reason = "; ".join(doubts) + " (accept_files stores it all the same)"
        return replace(record, status="quarantined", reason=reason)
    digest = write_array(job.temporary, volume.hu)
    write_table(job.temporary, job.id, volume.hu)
    return replace(record, array_sha256=digest)


def _run(
    jobs: Sequence[_Job], store: Store, workers: int, timeout: float | None, progress: bool
) -> list[Record]:
    """Convert all jobs; commit in the order of the source folder, so duplicates are definite."""
    seen = {r.voxels_sha256: r for r in store.records}
    fresh: list[Record] = []
    finished: list[Record] = []
    due = monotonic()
    results = _results(jobs, workers, timeout)
    for job, record in zip(jobs, _progress(results, len(jobs), progress), strict=True):
        finished.append(_commit(job, record, store, seen))
        fresh.append(finished[-1])
        if (start := monotonic()) > due:
            store.put(fresh)
            fresh, due = [], monotonic() + _MANIFEST_SHARE * (monotonic() - start)
    store.put(fresh)
    return finished


def _commit(job: _Job, record: Record, store: Store, seen: dict[str, Record]) -> Record:
    first = seen.get(record.voxels_sha256) if record.status == "ok" else None
    if first is not None and first.id != record.id:
        reason = f"same voxels as {first.source}"
        record = replace(record, status="duplicate", reason=reason)
    if record.status == "ok":
        os.replace(job.temporary, store.volume_path(record.id))
        seen[record.voxels_sha256] = record
    else:
        job.temporary.unlink(missing_ok=True)
    return record


def _results(jobs: Sequence[_Job], workers: int, timeout: float | None) -> Iterator[Record]:
    if workers < 1 or not jobs:
        yield from map(_convert, jobs)
        return
    for job, result in zip(
        jobs, run_isolated(_convert, jobs, workers=workers, timeout=timeout), strict=True
    ):
        if isinstance(result, Failure):
            result = replace(job.record(), status="quarantined", reason=result.reason)
        yield result


def _progress(records: Iterator[Record], total: int, show: bool) -> Iterable[Record]:
    if not show:
        return records
    from rich.progress import track

    # On stdout: while a volume is read, stderr belongs to the readers and is thrown away.
    return track(records, total=total, description="prepare", transient=False)
