"""The volume store: one chunked, compressed int16 HU array per volume, and a manifest.

    store/
      store.json            what this folder is
      manifest.csv          one row per source, good or bad, rewritten as a whole
      volumes/<id>.b2nd     blosc2 array [z, y, x], chunks of 64^3, blocks of 32^3
      body/<id>-*.npy       counts of body voxels, made with the array or when first asked for

A crop reads only the chunks it touches. Arrays and manifest are written to a temporary name and
renamed, so that a reader never meets a half-written file.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = {"format": "medspark-store", "version": 2}
TEMPORARY = ".writing-"
LOCK = ".lock"
_CHUNK, _BLOCK = 64, 32
_SPACING_TOLERANCE = 1e-3  # of a voxel; headers round to three or four decimals


@dataclass(frozen=True)
class Record:
    """One row of the manifest.

    Attributes:
        id: Name of the array in the store, from the source's name.
        source: Path relative to the source folder; a DICOM series is its folder, followed by
            "#" and a hash where the folder holds several.
        patient: Hash of the patient id; files without one count as a patient each.
        series: Hash of the SeriesInstanceUID, empty where the format has none.
        size: Voxels (z, y, x).
        spacing: mm (z, y, x).
        orientation: Sides towards which the x, y, z axes ran in the file; stored is LPS.
        hu_min: Lowest stored value.
        hu_max: Highest stored value.
        voxels_sha256: Hash of size and voxels in HU, before resampling.
        array_sha256: Hash of the array's file; blosc2 itself does not notice a flipped bit.
        status: "ok", "quarantined", "duplicate", "excluded" or "ignored" (DICOM without image).
        reason: Why it is not ok.
        warnings: What is odd about it.
        fingerprint: Hash of the source files' names, sizes and times and of the settings.
    """

    id: str
    source: str
    patient: str = ""
    series: str = ""
    size: tuple[int, int, int] = (0, 0, 0)
    spacing: tuple[float, float, float] = (0.0, 0.0, 0.0)
    orientation: str = ""
    hu_min: int = 0
    hu_max: int = 0
    voxels_sha256: str = ""
    array_sha256: str = ""
    status: str = "ok"
    reason: str = ""
    warnings: tuple[str, ...] = ()
    fingerprint: str = ""

    def to_row(self) -> dict[str, str]:
        """As strings for the manifest."""
        row = {key: str(value) for key, value in asdict(self).items()}
        row["size"] = "x".join(map(str, self.size))
        row["spacing"] = "x".join(f"{s:g}" for s in self.spacing)
        row["warnings"] = json.dumps(list(self.warnings))
        return row

    @classmethod
    def from_row(cls, row: dict[str, str]) -> Record:
        """Inverse of `to_row`. Raises ValueError or KeyError for a damaged row."""
        values: dict[str, Any] = {field.name: row[field.name] for field in fields(cls)}
        d, h, w = (int(n) for n in row["size"].split("x"))
        sd, sh, sw = (float(s) for s in row["spacing"].split("x"))
        values |= {"size": (d, h, w), "spacing": (sd, sh, sw)}
        values |= {"hu_min": int(row["hu_min"]), "hu_max": int(row["hu_max"])}
        return cls(**values | {"warnings": tuple(json.loads(row["warnings"]))})


class Store:
    """A folder of CT volumes, opened for reading (`Store(path)`) or made by `Store.create(path)`.

    Attributes:
        path: The folder.
        all_records: Every row of the manifest, in the order of the manifest.
    """

    def __init__(self, path: Path | str) -> None:
        """Open an existing store.

        Raises:
            FileNotFoundError: If there is no store at `path`.
            ValueError: If the folder's store is of another version, or its manifest is damaged.
        """
        self.path = Path(path)
        marker = self.path / "store.json"
        if not marker.is_file():
            raise FileNotFoundError(
                f"'{self.path}' is no volume store (no store.json): run `medspark prepare` first"
            )
        if json.loads(marker.read_text(encoding="utf-8")) != FORMAT:
            raise ValueError(f"'{marker}' is of another format than {FORMAT}: prepare it anew")
        self.all_records: list[Record] = self._load()

    @classmethod
    def create(cls, path: Path | str) -> Store:
        """Make an empty store, or open the one that is there.

        Raises:
            FileExistsError: If the folder holds something else.
        """
        path = Path(path)
        if not (path / "store.json").is_file():
            if path.is_dir() and any(p.name not in ("volumes", LOCK) for p in path.iterdir()):
                raise FileExistsError(f"'{path}' is not empty and no volume store")
            (path / "volumes").mkdir(parents=True, exist_ok=True)
            write_atomically(path / "store.json", json.dumps(FORMAT))
        return cls(path)

    def __len__(self) -> int:
        """Number of usable volumes."""
        return len(self.records)

    @property
    def records(self) -> list[Record]:
        """The usable volumes."""
        return [r for r in self.all_records if r.status == "ok"]

    @property
    def quarantined(self) -> list[Record]:
        """The sources that were refused, each with its reason."""
        return [r for r in self.all_records if r.status == "quarantined"]

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """Voxel size in mm (z, y, x) if all volumes share it, else None."""
        spacings = np.array([r.spacing for r in self.records])
        if len(spacings) == 0 or np.ptp(spacings, axis=0).max() > _SPACING_TOLERANCE:
            return None
        return self.records[0].spacing

    def volume_path(self, volume_id: str) -> Path:
        """File of the array of a volume."""
        return self.path / "volumes" / f"{volume_id}.b2nd"

    def intact(self, record: Record) -> bool:
        """Whether the array of a usable volume is there and byte for byte what was written."""
        try:
            return hash_file(self.volume_path(record.id)) == record.array_sha256
        except OSError:
            return False

    def read(
        self,
        volume_id: str,
        start: Sequence[int] | None = None,
        size: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Read a volume, or a box of it, as int16 HU `[z, y, x]`.

        Args:
            volume_id: `Record.id`.
            start: First voxel (z, y, x), default (0, 0, 0).
            size: Voxels (d, h, w), default up to the end. The box must lie inside the volume.

        Raises:
            KeyError: If there is no such volume.
            IndexError: If the box leaves the volume.
        """
        array = self._open(volume_id)
        begin = tuple(start) if start is not None else (0, 0, 0)
        extent = (
            size if size is not None else [n - b for n, b in zip(array.shape, begin, strict=True)]
        )
        box = tuple(slice(b, b + e) for b, e in zip(begin, extent, strict=True))
        limits = zip(box, array.shape, strict=True)
        if any(s.start < 0 or s.stop > n or s.stop <= s.start for s, n in limits):
            raise IndexError(f"box {begin} + {tuple(extent)} leaves volume of {array.shape} voxels")
        return np.asarray(array[box])

    def _open(self, volume_id: str) -> Any:
        import blosc2

        # One thread: loaders parallelise over processes, and threads do not survive a fork.
        blosc2.set_nthreads(1)
        try:
            return blosc2.open(str(self.volume_path(volume_id)), mode="r")
        except FileNotFoundError as error:
            raise KeyError(f"no volume '{volume_id}' in store '{self.path}'") from error

    def put(self, records: Iterable[Record], without: Collection[str] = ()) -> None:
        """Add rows, or replace those with the same id, and rewrite the manifest atomically.

        Args:
            records: The rows.
            without: Ids of rows to leave out.
        """
        rows = {r.id: r for r in self.all_records} | {r.id: r for r in records}
        self.all_records = [r for r in rows.values() if r.id not in without]
        text = io.StringIO()
        writer = csv.DictWriter(text, [f.name for f in fields(Record)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(r.to_row() for r in self.all_records)
        write_atomically(self.path / "manifest.csv", text.getvalue())

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing to this store; a killed process lets go of it.

        Raises:
            BlockingIOError: If another process holds the lock.
        """
        with (self.path / LOCK).open("w") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise BlockingIOError(
                        f"another run is writing to the store '{self.path}': wait for its end"
                    ) from error
            yield

    def sweep(self) -> None:
        """Delete what a killed run left: temporary files, arrays and tables without a row."""
        wanted = {f"{r.id}.b2nd" for r in self.records}
        for table in (self.path / "body").glob("*"):
            if f"{table.stem.rpartition('-')[0]}.b2nd" not in wanted:
                table.unlink(missing_ok=True)
        for leftover in self.path.glob(f"{TEMPORARY}*"):
            leftover.unlink(missing_ok=True)
        for array in (self.path / "volumes").iterdir():
            if array.name not in wanted:
                array.unlink(missing_ok=True)

    def _load(self) -> list[Record]:
        manifest = self.path / "manifest.csv"
        if not manifest.is_file():
            return []
        with manifest.open(newline="", encoding="utf-8") as file:
            try:
                return [Record.from_row(row) for row in csv.DictReader(file)]
            except (KeyError, ValueError, TypeError) as error:
                raise ValueError(f"'{manifest}' is damaged: {error}") from error


def hash_text(text: str, length: int = 16) -> str:
    """First `length` hexadecimal digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str, mode: int = 0o666) -> None:
    """Write a UTF-8 text file under a temporary name in the same folder, then rename it.

    Args:
        path: The file.
        text: Its content.
        mode: Its permissions, less the umask.
    """
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT, mode), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_array(path: Path, hu: np.ndarray) -> str:
    """Write int16 `[z, y, x]` as a blosc2 array: LZ4HC 5, bitshuffle, chunk 64^3, block 32^3.

    The caller renames the file into place.

    Returns:
        Hash of the file.
    """
    import blosc2

    blosc2.asarray(
        np.ascontiguousarray(hu, dtype=np.int16),
        urlpath=str(path),
        mode="w",
        chunks=tuple(min(_CHUNK, n) for n in hu.shape),
        blocks=tuple(min(_BLOCK, n) for n in hu.shape),
        cparams={
            "codec": blosc2.Codec.LZ4HC,
            "clevel": 5,
            "filters": [blosc2.Filter.BITSHUFFLE],
            "nthreads": 1,
        },
        dparams={"nthreads": 1},  # else the file's bytes depend on the machine
    )
    # On disk before the rename is: a power cut must not leave a name without its content.
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return hash_file(path)


def split_patients(
    store: Store, val_fraction: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """Split the usable volumes by patient into training and validation.

    Each patient's place is a hash of seed and patient, so it depends on no other patient's data:
    those with the lowest hashes, `val_fraction` of all (at least one, not all), are validation.

    Args:
        store: The store.
        val_fraction: Fraction of patients for validation, in (0, 1).
        seed: Choice of the split.

    Returns:
        Training records and validation records, both non-empty, in manifest order.

    Raises:
        ValueError: If the fraction is not in (0, 1) or there are fewer than two patients.
    """
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}, it must lie between 0 and 1")
    patients = sorted({r.patient for r in store.records})
    if len(patients) < 2:
        raise ValueError(f"{len(patients)} patient(s) in the store: a split needs at least two")
    patients.sort(key=lambda patient: hash_text(f"{seed}/{patient}", 64))
    count = min(max(1, round(val_fraction * len(patients))), len(patients) - 1)
    chosen = set(patients[:count])
    train = [r for r in store.records if r.patient not in chosen]
    return train, [r for r in store.records if r.patient in chosen]
