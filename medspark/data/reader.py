"""Reads boxes of a store's volumes, many times and fast."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medspark.data.body import BODY, BodyTable, load_table
from medspark.data.store import Record, Store

_OPEN = 128  # volumes kept open; opening costs about 50 us, and each holds a mapped table


class DamagedVolume(RuntimeError):
    """A volume of the store that cannot be read; the message names it and says what to do."""


@dataclass
class _Open:
    """An open array, the state of its file when it was opened, and its table once asked for."""

    state: tuple[int, int, int]
    array: Any
    table: BodyTable | None = None


class VolumeReader:
    """Boxes of volumes, read into memory that is there already.

    Against `Store.read` it keeps arrays open, allocates nothing and turns every failure into a
    `DamagedVolume`. An array that `medspark prepare` replaced meanwhile is opened anew.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._open: OrderedDict[str, _Open] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Open arrays do not travel to other processes."""
        return {"store": self.store, "_open": OrderedDict()}

    def read_into(self, out: np.ndarray, record: Record, start: Sequence[int]) -> None:
        """Fill int16 `out` `[d, h, w]`, C-contiguous, with the box that begins at `start`.

        Raises:
            ValueError: If `out` has another type or layout.
            IndexError: If the box leaves the volume.
            DamagedVolume: If the volume is missing, of another size, or fails to decompress.
        """
        if out.dtype != np.int16 or not out.flags.c_contiguous or out.ndim != 3:
            raise ValueError(f"a crop is a contiguous int16 [d, h, w], not {out.dtype} {out.shape}")
        stop = [b + e for b, e in zip(start, out.shape, strict=True)]
        if min(start) < 0 or any(e > n for e, n in zip(stop, record.size, strict=True)):
            raise IndexError(f"box {tuple(start)} + {out.shape} leaves {record.size} voxels")
        array = self._entry(record).array
        try:
            array.get_slice_numpy(out, (list(start), stop))
        except RuntimeError as error:
            raise self._damaged(record, f"box {tuple(start)} + {out.shape}: {error}") from error

    def read(self, record: Record, start: Sequence[int], size: Sequence[int]) -> np.ndarray:
        """A box as a new int16 array `[z, y, x]`; errors as `read_into`."""
        out = np.empty(tuple(size), np.int16)
        self.read_into(out, record, start)
        return out

    def table(self, record: Record) -> BodyTable:
        """Counts of body voxels of a volume."""
        entry = self._entry(record)
        if entry.table is None:
            _, height, width = record.size
            entry.table = load_table(
                self.store.volume_path(record.id),
                record.size,
                lambda z, end: self.read(record, (z, 0, 0), (end - z, height, width)),
            )
        return entry.table

    def body_voxel(self, record: Record, number: int) -> tuple[int, int, int]:
        """Place (z, y, x) of body voxel `number`, see `BodyTable.cell_of`.

        Raises:
            IndexError: If the volume has no such voxel.
            DamagedVolume: If table and volume disagree.
        """
        box, rank = self.table(record).cell_of(number)
        low = [s.start for s in box]
        hu = self.read(record, low, [s.stop - s.start for s in box])
        inside = np.flatnonzero(hu > BODY)
        if rank >= len(inside):
            raise self._damaged(record, f"its body table expects more body at {low}")
        z, y, x = (
            int(b + i) for b, i in zip(low, np.unravel_index(inside[rank], hu.shape), strict=True)
        )
        return z, y, x

    def _entry(self, record: Record) -> _Open:
        path = self.store.volume_path(record.id)
        try:
            stat = os.stat(path)
        except OSError as error:
            reason = f"its file cannot be reached ({error.strerror})"
            raise self._damaged(record, reason) from error
        state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        entry = self._open.get(record.id)
        if entry is None or entry.state != state:
            entry = self._open[record.id] = _Open(state, self._open_array(record))
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(record.id)
        return entry

    def _open_array(self, record: Record) -> Any:
        import blosc2

        path = str(self.store.volume_path(record.id))
        try:
            # One thread: loaders parallelise over processes, and threads do not survive a fork.
            array = blosc2.open(path, mode="r", dparams={"nthreads": 1})
        except (RuntimeError, ValueError) as error:
            raise self._damaged(record, f"it cannot be opened: {error}") from error
        if tuple(getattr(array, "shape", ())) != record.size or array.dtype != np.int16:
            raise self._damaged(record, f"it is no int16 array of {record.size} voxels")
        return array

    def _damaged(self, record: Record, reason: str) -> DamagedVolume:
        return DamagedVolume(
            f"volume '{record.id}' (source '{record.source}') of store '{self.store.path}' is "
            f"damaged: {reason}. Run `medspark prepare` again with verify=true"
        )
