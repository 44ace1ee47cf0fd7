"""Scans of a folder, one at a time, as a classifier needs them: whole, or cut into windows."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from medspark.data.body import BodyTable
from medspark.data.headers import AIR, UnreadableVolume, image_suffix
from medspark.data.io import Volume, read_volume
from medspark.data.pseudonyms import Pseudonyms, words
from medspark.data.resample import resample
from medspark.data.sources import Source, find_sources, patient_of, person_of
from medspark.data.suspects import suspicions
from medspark.data.workers import Failure, run_isolated

# A volume counts as a patch if each edge is within these factors of the training patches' edge.
WHOLE_LOW, WHOLE_HIGH = 0.8, 1.25
_NOT_HU = "does not look like HU"


@dataclass(frozen=True)
class Reading:
    """How scans are read and cut.

    Attributes:
        patch_mm: edges of a training patch in mm (z, y, x).
        size: its voxels (z, y, x), as the network gets them.
        patches: the files are pieces cut from scans: pieces without air, constant ones and single
            slices are taken.
        overlap: of neighbouring windows, share of an edge.
        min_body: least share of body (above -500 HU) in a window.
        uneven: see `medspark.data.io.read_volume`.
        max_bytes: refuse volumes that need more memory.
    """

    patch_mm: tuple[float, float, float]
    size: tuple[int, int, int]
    patches: bool = False
    overlap: float = 0.5
    min_body: float = 0.1
    uneven: bool = False
    max_bytes: int = 4 * 2**30

    def __post_init__(self) -> None:
        """Raise ValueError for an impossible value."""
        if not (0 <= self.overlap < 1 and 0 <= self.min_body <= 1):
            raise ValueError(
                f"overlap {self.overlap} must lie in [0, 1) and min_body {self.min_body} in [0, 1]"
            )

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Mm of a voxel of the network's input."""
        z, y, x = (mm / n for mm, n in zip(self.patch_mm, self.size, strict=True))
        return z, y, x


@dataclass(frozen=True)
class Scan:
    """One source, read or refused. Holds no name of a person.

    Attributes:
        id: hash of the source's name, the same as in a store.
        source: path relative to the folder, parts that name a person hashed.
        patient: hash of the patient's id; files without one count as a patient each.
        status: "ok", "refused" or "ignored" (DICOM without an image).
        reason: why it is not ok.
        warnings: what is odd about it.
        whole: it is as large as a patch: one prediction. Otherwise windows.
        starts: first voxel (z, y, x) of each window in `voxels`.
        centres: [N, 3] centre of each window in voxels (z, y, x) of the scan, turned to LPS.
        points: [N, 3] the same in mm (x, y, z), in the LPS frame of DICOM.
        file: where int16 HU `[z, y, x]` wait.
    """

    id: str
    source: str
    patient: str
    status: str = "ok"
    reason: str = ""
    warnings: tuple[str, ...] = ()
    whole: bool = False
    starts: tuple[tuple[int, int, int], ...] = ()
    centres: Any = field(default=None, repr=False)
    points: Any = field(default=None, repr=False)
    file: Path | None = None

    def voxels(self) -> np.ndarray:
        """Int16 HU, memory-mapped: the whole scan, or at the classifier's spacing."""
        assert self.file is not None
        found: np.ndarray = np.load(self.file, mmap_mode="r")
        return found


@dataclass(frozen=True)
class _Job:
    scan: Scan
    files: tuple[Path, ...]
    reading: Reading


def list_scans(
    folder: Path, names: Pseudonyms, patients: Mapping[str, str] | None = None
) -> list[tuple[Scan, Source]]:
    """What `find_sources` finds, under the names that `medspark prepare` gives it.

    Args:
        folder: searched with its subfolders.
        names: how ids and paths are hashed.
        patients: file or folder -> patient id in clear, of `read_patients`.

    Raises:
        FileNotFoundError: no such folder.
    """
    sources = find_sources(folder)
    table = patients or {}
    others = words([*(s for item in sources for s in item.secrets), *table.values()])
    listed = []
    for item in sources:
        patient = patient_of(item, table)
        secrets = [*item.secrets, *([patient] if patient else [])]
        scan = Scan(
            id=names.of(item.name),
            source=names.path(item.name, secrets, others),
            patient=names.of(person_of(item, patient), 12),
            status="refused" if item.status == "quarantined" else item.status,
            reason=item.reason,
        )
        listed.append((scan, item))
    return listed


def read_scans(
    listed: Sequence[tuple[Scan, Source]],
    reading: Reading,
    *,
    workers: int = 1,
    timeout: float | None = 600,
) -> Iterator[Scan]:
    """Reads scans one after the other; bad ones come out refused, with a reason.

    Voxels wait in a temporary folder, which is gone when the iteration ends.

    Args:
        listed: of `list_scans`.
        reading: how.
        workers: processes that read; 0 reads here, where a file that crashes the C++ reader ends
            the run.
        timeout: seconds for one scan, where workers read.
    """
    jobs: list[_Job] = []
    with tempfile.TemporaryDirectory(prefix="medspark-predict-") as folder:
        for number, (scan, item) in enumerate(listed):
            if scan.status == "ok":
                file = Path(folder) / f"{number}.npy"
                jobs.append(_Job(replace(scan, file=file), item.files, reading))
        results = (
            run_isolated(_read, jobs, workers=workers, timeout=timeout)
            if workers > 0 and jobs
            else map(_read, jobs)
        )
        waiting = iter(zip(jobs, results, strict=True))
        for scan, _ in listed:
            if scan.status != "ok":
                yield scan
                continue
            job, result = next(waiting)
            failed = isinstance(result, Failure)
            yield replace(scan, status="refused", reason=result.reason) if failed else result
            if job.scan.file is not None:
                job.scan.file.unlink(missing_ok=True)


def _read(job: _Job) -> Scan:
    """Reads, resamples, finds windows. Never raises for a bad volume."""
    reading, files = job.reading, job.files
    single = len(files) == 1 and image_suffix(files[0]) is not None
    try:
        volume = read_volume(
            files[0] if single else files,
            min_slices=1 if reading.patches else 2,
            patch=reading.patches,
            uneven=reading.uneven,
            max_bytes=reading.max_bytes,
        )
        if not reading.patches:
            _refuse_doubtful(volume)
        return _placed(job.scan, volume, reading)
    except UnreadableVolume as error:
        reason = error.reason
    except OSError as error:
        reason = f"cannot be read: {error.strerror or type(error).__name__}"
    return replace(job.scan, status="refused", reason=reason, file=None)


def _refuse_doubtful(volume: Volume) -> None:
    doubts = [w for w in volume.warnings if w.startswith(_NOT_HU)] + suspicions(volume.hu)
    if doubts:
        raise UnreadableVolume("; ".join(doubts) + " (patches=true takes it all the same)")


def _placed(scan: Scan, volume: Volume, reading: Reading) -> Scan:
    warnings = list(volume.warnings)
    edges = np.array(volume.hu.shape) * volume.spacing / reading.patch_mm
    whole = bool((edges >= WHOLE_LOW).all() and (edges <= WHOLE_HIGH).all())
    grid, hu, pad, starts = volume, volume.hu, np.zeros(3), [(0, 0, 0)]
    size = volume.hu.shape
    if not whole:
        size = reading.size
        grid = resample(volume, reading.spacing, reading.max_bytes)
        hu, pad = _filled(grid.hu, size)
        if pad.any():
            warnings.append("thinner than a training patch: filled up with air")
        starts = window_starts(hu, size, reading.overlap, reading.min_body)
        if not starts:
            raise UnreadableVolume(
                f"no window of {_mm(reading.patch_mm)} holds {reading.min_body:.0%} body (above "
                "-500 HU)" + ("; the scan is thinner than a window" if pad.any() else "")
            )
    middle = np.array(starts) + (np.array(size) - 1) / 2 - pad
    points = _to_mm(middle, grid)
    assert scan.file is not None
    np.save(scan.file, hu)
    return replace(
        scan,
        warnings=tuple(warnings),
        whole=whole,
        starts=tuple(starts),
        centres=_to_voxels(points, volume),
        points=points,
    )


def _mm(edges: Sequence[float]) -> str:
    return " x ".join(f"{mm:.0f}" for mm in edges) + " mm"


def _filled(hu: np.ndarray, size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The volume with air on both sides of each axis that is shorter than a window."""
    lacks = np.maximum(0, np.array(size) - hu.shape)
    before = lacks // 2
    if not lacks.any():
        return hu, before
    margins = list(zip(before, lacks - before, strict=True))
    return np.pad(hu, margins, constant_values=AIR), before


def window_starts(
    hu: np.ndarray, size: Sequence[int], overlap: float, min_body: float
) -> list[tuple[int, int, int]]:
    """First voxels (z, y, x) of the windows that cover the body of a volume.

    Steps are (1 - overlap) of a window, rounded; the last window of each axis ends with the
    volume, so that nothing is left out.

    Args:
        hu: `[z, y, x]`, no axis shorter than a window.
        size: voxels of a window.
        overlap: in [0, 1).
        min_body: windows with a smaller share of voxels above -500 HU are left out.
    """
    axes = []
    for n, w in zip(hu.shape, size, strict=True):
        step = max(1, round(w * (1 - overlap)))
        axes.append(sorted({*range(0, n - w, step), n - w}))
    table = BodyTable.count(hu.shape, lambda start, stop: hu[start:stop])
    least = min_body * float(np.prod(size))
    return [(z, y, x) for z, y, x in product(*axes) if table.voxels_in((z, y, x), size) >= least]


def _to_mm(places: np.ndarray, volume: Volume) -> np.ndarray:
    """Voxels (z, y, x) `[N, 3]` to mm (x, y, z) in the LPS frame."""
    steps = places * volume.spacing
    return np.asarray(volume.origin) + steps[:, ::-1] @ np.asarray(volume.direction).T


def _to_voxels(points: np.ndarray, volume: Volume) -> np.ndarray:
    """Inverse of `_to_mm`; the direction has right angles."""
    steps = (points - np.asarray(volume.origin)) @ np.asarray(volume.direction)
    return np.asarray(steps[:, ::-1] / volume.spacing)
