"""Where the body is in a volume: a small table of counts, so that crops find it unread.

The table is a summed-area table (Crow, SIGGRAPH 1984, in 3D) of the body voxels in cells of 8^3.
It finds the cell of the n-th body voxel in three binary searches, and the share of body in any
box from its corners. It is made on first use and kept beside the volumes:

    store/body/<id>-<signature of the array's file>.npy    int64 [cells + 1] per axis
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medspark.data.store import TEMPORARY

BODY = -500  # HU; lung is below, so a crop of lung counts through its walls and vessels only
CELL = 8  # voxels per cell and axis
_SLAB = 64  # planes counted at once, the depth of a chunk
_ENDS = 4096  # bytes of a file's head and tail in its signature; the tail indexes all chunks

Slab = Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class BodyTable:
    """Counts of body voxels (above -500 HU) of one volume.

    Attributes:
        size: Voxels of the volume (z, y, x).
        sums: int64 `[cells + 1]` per axis; `sums[i, j, k]` counts the body voxels of the first
            i, j, k cells.
    """

    size: tuple[int, int, int]
    sums: np.ndarray

    @classmethod
    def count(cls, size: Sequence[int], read_slab: Slab) -> BodyTable:
        """Count a volume, slab by slab.

        Args:
            size: Voxels (z, y, x).
            read_slab: Gives planes `start` to `stop` as HU `[z, y, x]`.
        """
        counts = np.concatenate(
            [_count_cells(read_slab(z, min(z + _SLAB, size[0]))) for z in range(0, size[0], _SLAB)]
        )
        sums = np.zeros([n + 1 for n in counts.shape], np.int64)
        sums[1:, 1:, 1:] = counts.cumsum(0, dtype=np.int64).cumsum(1).cumsum(2)
        return cls((size[0], size[1], size[2]), sums)

    @property
    def total(self) -> int:
        """Body voxels of the volume."""
        return int(self.sums[-1, -1, -1])

    def cell_of(self, number: int) -> tuple[tuple[slice, slice, slice], int]:
        """The cell that holds body voxel `number`, counted cell by cell in (z, y, x) order.

        Returns:
            The cell's box of voxels, and how many of its body voxels come before this one.

        Raises:
            IndexError: If the volume has no such body voxel.
        """
        if not 0 <= number < self.total:
            raise IndexError(f"body voxel {number} of {self.total}")
        s = self.sums
        z, number = _search(s[:, -1, -1], number)
        y, number = _search(s[z + 1, :, -1] - s[z, :, -1], number)
        x, number = _search(s[z + 1, y + 1] - s[z + 1, y] - s[z, y + 1] + s[z, y], number)
        low = [c * CELL for c in (z, y, x)]
        box = [slice(b, min(b + CELL, n)) for b, n in zip(low, self.size, strict=True)]
        return (box[0], box[1], box[2]), number

    def voxels_in(self, start: Sequence[int], extent: Sequence[int]) -> float:
        """Body voxels in a box, as if they were spread evenly in each cell; exact on whole cells."""
        near, weight = [], []
        for b, e, n, edges in zip(start, extent, self.size, self.sums.shape, strict=True):
            low, left = _on_axis(b, n, edges - 1)
            high, right = _on_axis(b + e, n, edges - 1)
            near.append([low, low + 1, high, high + 1])
            weight.append(np.array([left - 1, -left, 1 - right, right]))
        return float(np.einsum("ijk,i,j,k->", self.sums[np.ix_(*near)], *weight))


def _count_cells(hu: np.ndarray) -> np.ndarray:
    counts = (hu > BODY).view(np.uint8)
    for axis, dtype in enumerate((np.uint8, np.uint16, np.uint16)):  # at most 8, 64, 512
        starts = np.arange(0, hu.shape[axis], CELL)
        counts = np.add.reduceat(counts, starts, axis=axis, dtype=dtype)
    return counts


def _search(sums: np.ndarray, number: int) -> tuple[int, int]:
    """Cell of a row of running sums `[cells + 1]` that holds `number`, and its number there."""
    cell = int(np.searchsorted(sums, number, side="right")) - 1
    return cell, number - int(sums[cell])


def _on_axis(voxel: int, size: int, cells: int) -> tuple[int, float]:
    """Cell that holds the edge before a voxel, and how far into the cell it is (0 to 1)."""
    cell = min(voxel // CELL, cells - 1)
    return cell, (voxel - cell * CELL) / min(CELL, size - cell * CELL)


def signature(path: Path) -> str:
    """Eight hexadecimal digits that change when an array is written anew, and stay when copied."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_ENDS)
        file.seek(max(0, size - _ENDS))
        return f"{zlib.crc32(file.read(), zlib.crc32(head, size & 0xFFFFFFFF)):08x}"


def write_table(array: Path, volume_id: str, hu: np.ndarray) -> None:
    """Keep the table of a volume that was just written to `array`, under its name to come.

    Args:
        array: File in the store's folder of volumes.
        volume_id: Name that the array gets.
        hu: Its voxels `[z, y, x]`.
    """
    table = BodyTable.count(hu.shape, lambda z, end: hu[z:end])
    _keep(_table_path(array, volume_id), volume_id, table.sums)


def _table_path(array: Path, volume_id: str) -> Path:
    return array.parent.parent / "body" / f"{volume_id}-{signature(array)}.npy"


def load_table(array: Path, size: Sequence[int], read_slab: Slab) -> BodyTable:
    """The table of a volume: the kept one, memory-mapped, or a new one that is then kept.

    Args:
        array: File of the volume in the store.
        size: Voxels (z, y, x).
        read_slab: See `BodyTable.count`.
    """
    path = _table_path(array, array.stem)
    try:
        sums = np.load(path, mmap_mode="r")
        if sums.shape == tuple(-(-n // CELL) + 1 for n in size) and sums.dtype == np.int64:
            return BodyTable((size[0], size[1], size[2]), sums)
    except (OSError, ValueError, EOFError):
        pass  # absent or damaged: count again
    table = BodyTable.count(size, read_slab)
    try:
        _keep(path, array.stem, table.sums)
    except OSError as error:
        warnings.warn(
            f"the body table of volume '{array.stem}' cannot be kept ({error}); every process "
            "counts it anew, which is slow: make the store writable once",
            stacklevel=2,
        )
    return table


def _keep(path: Path, volume_id: str, sums: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    with temporary.open("wb") as file:
        np.save(file, sums)
    os.replace(temporary, path)
    for old in path.parent.glob(f"{volume_id}-*.npy"):
        if old != path:
            old.unlink(missing_ok=True)
