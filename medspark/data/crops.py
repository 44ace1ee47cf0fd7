"""Random crops of a store's volumes for pre-training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from medspark.data.body import BODY
from medspark.data.headers import AIR
from medspark.data.reader import VolumeReader
from medspark.data.sampler import PLACE, draw_visible, uniforms
from medspark.data.store import Record, Store
from medspark.data.windows import Intensity, finish

__all__ = ["BODY", "CropDataset", "Place", "pad_with_air"]

_TRIES = 8
_WORDS = 7 + 3 * _TRIES  # patient, volume, kind, three flips, body voxel, places


@dataclass(frozen=True)
class Place:
    """Where a crop is cut.

    Attributes:
        record: The volume.
        start: First voxel (z, y, x) in the volume.
        extent: Voxels (d, h, w) that the volume has of the crop; the rest is air on both sides.
        flips: Axes (z, y, x) to mirror after cutting.
        centred: Whether the crop was drawn round a body voxel.
    """

    record: Record
    start: tuple[int, int, int]
    extent: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    centred: bool


class CropDataset(Dataset[torch.Tensor]):
    """Crop `i` of a virtual epoch: a function of (seed, i) alone, whatever worker asks for it.

    A patient is drawn uniformly, then one of the patient's volumes in proportion to its voxels:
    nobody counts more for having been scanned more often, and a thin slab less than a whole scan.
    A share of the crops (`body_share`) is centred on a body voxel (above -500 HU), each body
    voxel of the volume as likely as the next; near the border the crop is moved inside. The
    others lie anywhere with the same chance: of up to 8 places the first with enough body is
    taken, else the best. An axis on which the volume is smaller than the crop is padded with air
    on both sides.

    `dataset[i]` is one finished crop, computed on the CPU. `CropLoader` gives the same crops in
    batches and several times as fast.

    Args:
        store: The store; only the blocks under a crop are read.
        records: Volumes to draw from, such as one half of `split_patients`.
        crop_size: Voxels (d, h, w).
        intensity: Window and standardisation, the same for the whole run.
        length: Crops in an epoch. A later epoch continues with another `seed`, or with a longer
            dataset and a sampler that moves on.
        seed: Seed of every draw.
        flips: Mirror each axis with probability 1/2.
        min_body: Wanted fraction of voxels above -500 HU in the crops that lie anywhere, in
            [0, 1]; estimated from counts in cells of 8^3 voxels.
        body_share: Share of crops centred on a body voxel, in [0, 1].
        mask_grid: Cells (z, y, x) of the mask that is drawn with each crop; None draws none.
        mask_ratio: Share of cells hidden.

    Raises:
        ValueError: If there are no volumes, or a size, length, fraction or grid makes no sense.
    """

    def __init__(
        self,
        store: Store,
        records: Sequence[Record],
        crop_size: tuple[int, int, int],
        intensity: Intensity,
        *,
        length: int,
        seed: int,
        flips: bool = True,
        min_body: float = 0.3,
        body_share: float = 0.5,
        mask_grid: tuple[int, int, int] | None = None,
        mask_ratio: float = 0.6,
    ) -> None:
        _check(records, crop_size, length, seed, (min_body, body_share, mask_ratio), mask_grid)
        self.store, self.intensity, self.crop_size = store, intensity, tuple(crop_size)
        self.length, self.seed, self.flips = length, seed, flips
        self.min_body, self.body_share = min_body, body_share
        self.mask_grid, self.mask_ratio = mask_grid, mask_ratio
        self._reader = VolumeReader(store)
        by_patient: dict[str, list[Record]] = {}
        for record in sorted(records, key=lambda r: r.id):
            by_patient.setdefault(record.patient, []).append(record)
        self._patients = [by_patient[patient] for patient in sorted(by_patient)]
        voxels = [np.cumsum([float(np.prod(r.size)) for r in rs]) for rs in self._patients]
        self._shares = [v / v[-1] for v in voxels]

    def __len__(self) -> int:
        """Crops in an epoch."""
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        """Crop `index` as float32 `[1, D, H, W]`, normalised.

        Raises:
            IndexError: If the index is not in the epoch.
            DamagedVolume: If its volume cannot be read.
        """
        hu = torch.empty((1, 1, *self.crop_size), dtype=torch.int16)
        place = self.read_into(hu[0, 0].numpy(), index)
        return finish(hu, torch.tensor([place.flips]), self.intensity)[0]

    def hu(self, index: int) -> np.ndarray:
        """Crop `index` as int16 HU `[D, H, W]`, before normalisation; errors as `[index]`."""
        crop = np.empty(self.crop_size, np.int16)
        place = self.read_into(crop, index)
        steps = tuple(slice(None, None, -1 if flip else 1) for flip in place.flips)
        return np.ascontiguousarray(crop[steps])

    def read_into(self, out: np.ndarray, index: int) -> Place:
        """Fill contiguous int16 `out` `[D, H, W]` with crop `index`, not yet mirrored.

        Errors as `[index]`; ValueError if `out` has another size, type or layout.
        """
        if out.shape != self.crop_size:
            raise ValueError(f"crops are {self.crop_size}, the memory for one is {out.shape}")
        place = self.place(index)
        if place.extent == self.crop_size:
            self._reader.read_into(out, place.record, place.start)
            return place
        inner = self._reader.read(place.record, place.start, place.extent)
        out[...] = pad_with_air(inner, self.crop_size)
        return place

    def visible(self, index: int) -> np.ndarray | None:
        """Cells of crop `index` that stay visible, bool `[Gz, Gy, Gx]`; None without a mask grid.

        It belongs to the mirrored crop, which is what a network sees.
        """
        if self.mask_grid is None:
            return None
        return draw_visible(self.seed, index, self.mask_grid, self.mask_ratio)

    def place(self, index: int) -> Place:
        """Where crop `index` is cut. Errors as `[index]`."""
        if not 0 <= index < self.length:
            raise IndexError(f"crop {index} of {self.length}")
        # One fixed place in the row for each decision: switching one off changes no other.
        u = uniforms(self.seed, PLACE, index, _WORDS)
        patient = int(u[0] * len(self._patients))
        volume = int(np.searchsorted(self._shares[patient], u[1], side="right"))
        record = self._patients[patient][volume]
        d, h, w = (min(c, n) for c, n in zip(self.crop_size, record.size, strict=True))
        centred = u[2] < self.body_share and self._reader.table(record).total > 0
        if centred:
            start = self._start_at_body(record, (d, h, w), u[6])
        else:
            start = self._start_anywhere(record, (d, h, w), u[7:].reshape(_TRIES, 3))
        z, y, x = (bool(self.flips and f < 0.5) for f in u[3:6])
        return Place(record, start, (d, h, w), (z, y, x), bool(centred))

    def _start_at_body(
        self, record: Record, extent: tuple[int, int, int], u: float
    ) -> tuple[int, int, int]:
        number = int(u * self._reader.table(record).total)
        centre = self._reader.body_voxel(record, number)
        z, y, x = (
            min(max(c - e // 2, 0), n - e)
            for c, e, n in zip(centre, extent, record.size, strict=True)
        )
        return z, y, x

    def _start_anywhere(
        self, record: Record, extent: tuple[int, int, int], u: np.ndarray
    ) -> tuple[int, int, int]:
        places = self._places(record, extent, u)
        if self.min_body == 0:
            return places[0]
        table, voxels = self._reader.table(record), float(np.prod(self.crop_size))
        best, best_body = places[0], -1.0
        for place in places:
            body = table.voxels_in(place, extent) / voxels
            if body > best_body:
                best, best_body = place, body
            if body >= self.min_body:
                break
        return best

    def _places(
        self, record: Record, extent: tuple[int, int, int], u: np.ndarray
    ) -> list[tuple[int, int, int]]:
        room = np.array(record.size) - extent + 1
        return [(z, y, x) for z, y, x in (u * room).astype(int).tolist()]


def _check(
    records: Sequence[Record],
    crop_size: Sequence[int],
    length: int,
    seed: int,
    fractions: Sequence[float],
    grid: Sequence[int] | None,
) -> None:
    """Raise ValueError for options that make no sense."""
    if not records:
        raise ValueError("no volumes to draw crops from")
    if len(crop_size) != 3 or min(crop_size) < 1:
        raise ValueError(f"crop_size {crop_size} must be three positive numbers (d, h, w)")
    if length < 1 or not 0 <= seed < 1 << 64:
        raise ValueError(f"length {length} must be positive and seed {seed} in [0, 2**64)")
    for name, value in zip(("min_body", "body_share", "mask_ratio"), fractions, strict=True):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} {value} must lie between 0 and 1")
    if grid is not None and (
        len(grid) != 3 or min(grid) < 1 or any(c % g for c, g in zip(crop_size, grid, strict=True))
    ):
        raise ValueError(f"mask_grid {grid} must divide crop_size {crop_size} (z, y, x)")


def pad_with_air(hu: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Pad int16 HU `[z, y, x]` with -1024 on both sides up to `size`.

    The far side gets the odd voxel. Axes that are large enough stay as they are.
    """
    short = [max(0, wanted - n) for wanted, n in zip(size, hu.shape, strict=True)]
    if not any(short):
        return hu
    return np.pad(hu, [(s // 2, s - s // 2) for s in short], constant_values=AIR)
