"""Random crops of a store's volumes for pre-training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from medspark.data.io import AIR
from medspark.data.store import Record, Store
from medspark.data.windows import Intensity

BODY = -500  # HU; lung is below, so a crop of lung counts through its walls and vessels only
_TRIES = 8


class CropDataset(Dataset[torch.Tensor]):
    """Crop `i` of a virtual epoch: a function of (seed, i) alone, whatever worker asks for it.

    A patient is drawn uniformly, then one of the patient's volumes in proportion to its voxels:
    nobody counts more for having been scanned more often, and a thin slab less than a whole scan.
    Then a place, uniformly; up to 8 places are tried for one with enough body, else the best is
    taken. An axis on which the volume is smaller than the crop is padded with air on both sides.

    Args:
        store: The store; only the chunks under a crop are read.
        records: Volumes to draw from, such as one half of `split_patients`.
        crop_size: Voxels (d, h, w).
        intensity: Window and standardisation, the same for the whole run.
        length: Crops in an epoch. A later epoch continues with another `seed`, or with a longer
            dataset and a sampler that moves on.
        seed: Seed of every draw.
        flips: Mirror each axis with probability 1/2.
        min_body: Wanted fraction of voxels above -500 HU, in [0, 1].

    Raises:
        ValueError: If there are no volumes, or a size, length or fraction makes no sense.
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
    ) -> None:
        if not records:
            raise ValueError("no volumes to draw crops from")
        if len(crop_size) != 3 or min(crop_size) < 1:
            raise ValueError(f"crop_size {crop_size} must be three positive numbers (d, h, w)")
        if length < 1 or seed < 0 or not 0 <= min_body <= 1:
            raise ValueError(f"length {length}, seed {seed} or min_body {min_body} out of range")
        self.store, self.intensity, self.crop_size = store, intensity, tuple(crop_size)
        self.length, self.seed, self.flips, self.min_body = length, seed, flips, min_body
        by_patient: dict[str, list[Record]] = {}
        for record in sorted(records, key=lambda r: r.id):
            by_patient.setdefault(record.patient, []).append(record)
        self._patients = [by_patient[patient] for patient in sorted(by_patient)]

    def __len__(self) -> int:
        """Crops in an epoch."""
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        """Crop `index` as float32 `[1, D, H, W]`, normalised.

        Raises:
            IndexError: If the index is not in the epoch.
        """
        return torch.from_numpy(self.intensity.normalise(self.hu(index)))[None]

    def hu(self, index: int) -> np.ndarray:
        """Crop `index` as int16 HU `[D, H, W]`, before normalisation."""
        if not 0 <= index < self.length:
            raise IndexError(f"crop {index} of {self.length}")
        # Philox is counter-based: the key (seed, index) gives independent streams at no cost.
        rng = np.random.Generator(np.random.Philox(key=np.array([self.seed, index], np.uint64)))
        record = self._draw_volume(rng)
        best, best_body = np.empty(0), -1.0
        for _ in range(_TRIES):
            crop = self._draw_crop(record, rng)
            body = float((crop > BODY).mean())
            if body > best_body:
                best, best_body = crop, body
            if body >= self.min_body:
                break
        if self.flips:
            steps = tuple(slice(None, None, -1 if flip else 1) for flip in rng.random(3) < 0.5)
            best = best[steps]
        return np.ascontiguousarray(best)

    def _draw_volume(self, rng: np.random.Generator) -> Record:
        volumes = self._patients[rng.integers(len(self._patients))]
        voxels = np.array([np.prod(r.size, dtype=np.float64) for r in volumes])
        return volumes[rng.choice(len(volumes), p=voxels / voxels.sum())]

    def _draw_crop(self, record: Record, rng: np.random.Generator) -> np.ndarray:
        extent = [min(c, n) for c, n in zip(self.crop_size, record.size, strict=True)]
        room = [n - e for n, e in zip(record.size, extent, strict=True)]
        start = [int(rng.integers(0, free + 1)) for free in room]
        return pad_with_air(self.store.read(record.id, start, extent), self.crop_size)


def pad_with_air(hu: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Pad int16 HU `[z, y, x]` with -1024 on both sides up to `size`.

    The far side gets the odd voxel. Axes that are large enough stay as they are.
    """
    short = [max(0, wanted - n) for wanted, n in zip(size, hu.shape, strict=True)]
    if not any(short):
        return hu
    return np.pad(hu, [(s // 2, s - s // 2) for s in short], constant_values=AIR)
