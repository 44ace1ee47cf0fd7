"""Batches of crops on the device of the network.

Workers decompress int16 crops straight into shared memory that is used again and again: a fresh
shared tensor per batch, which is what `DataLoader` makes, costs more than decompressing (every
page is faulted in by both processes). Window and flips are done on whole batches, on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from medspark.data.crops import CropDataset
from medspark.data.sampler import CounterBatches
from medspark.data.windows import finish

_Key = tuple[int, range]  # slot of the shared memory, sample numbers
_Drawn = tuple[int, range, np.ndarray, np.ndarray | None]  # and flips, visible cells


class CropBatch(NamedTuple):
    """One batch of one process.

    Attributes:
        volume: float32 `[B, 1, D, H, W]`, normalised, on the loader's device.
        visible: bool `[B, Gz, Gy, Gx]` on the CPU, for `BlockMask`; None without a mask grid.
        indices: int64 `[B]` on the CPU, numbers of the samples.
    """

    volume: Tensor
    visible: Tensor | None
    indices: Tensor


class CropLoader:
    """Iterates over the batches of a run, from any sample on.

    Batch and mask are functions of the dataset's seed and the sample numbers: the same for any
    number of workers, and `world` processes read together what one with the joint batch would.

        loader = CropLoader(crops, batch_size=8, start=samples_done, num_workers=4, device="cuda")
        for batch in loader:
            spark(batch.volume, mask=BlockMask(batch.visible).to(batch.volume.device))

    Args:
        crops: The crops.
        batch_size: Crops per process.
        start: Number of the first sample, over all processes: those done before a resume.
        stop: End of the sample numbers; default the length of `crops`.
        rank: This process, from 0.
        world: Processes.
        num_workers: Processes that read; 0 reads in this one.
        prefetch: Batches that each worker reads ahead. Shared memory holds
            `num_workers * prefetch + 1` batches of int16.
        device: Where window and flips are computed, and the batch ends up.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        crops: CropDataset,
        batch_size: int,
        *,
        start: int = 0,
        stop: int | None = None,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        prefetch: int = 2,
        device: torch.device | str = "cpu",
    ) -> None:
        stop = crops.length if stop is None else stop
        if num_workers < 0 or prefetch < 1 or stop > crops.length:
            raise ValueError(
                f"num_workers {num_workers} must not be negative, prefetch {prefetch} positive "
                f"and stop {stop} at most the {crops.length} crops there are"
            )
        self.batches = CounterBatches(batch_size, start, stop, rank=rank, world=world)
        self.crops, self.device = crops, torch.device(device)
        self.num_workers, self.prefetch = num_workers, prefetch

    def __len__(self) -> int:
        """Batches of this process from `start` on."""
        return len(self.batches)

    def __iter__(self) -> Iterator[CropBatch]:
        """Start at `start`, each time.

        Raises:
            DamagedVolume: If a volume cannot be read.
        """
        # A slot is filled again once its batch and the next have been handed out.
        slots = self.num_workers * self.prefetch + 1
        shape = (slots, self.batches.batch_size, 1, *self.crops.crop_size)
        ring = torch.empty(shape, dtype=torch.int16)
        if self.num_workers:
            ring.share_memory_()
        drawn: DataLoader[_Drawn] = DataLoader(
            _Slots(self.crops, ring),
            batch_size=None,
            sampler=_Keys(self.batches, slots),
            num_workers=self.num_workers,
            collate_fn=_as_is,
            prefetch_factor=self.prefetch if self.num_workers else None,
            generator=torch.Generator(),  # else it draws a number from torch's own
        )
        for slot, indices, flips, visible in drawn:
            hu = ring[slot]
            if self.device.type == "cuda":
                # Pinned memory comes from torch's pool, which waits for the copy before reuse.
                hu = hu.pin_memory()
            hu = hu.to(self.device, non_blocking=hu.is_pinned())
            yield CropBatch(
                finish(hu, torch.from_numpy(flips), self.crops.intensity),
                None if visible is None else torch.from_numpy(visible),
                torch.arange(indices.start, indices.stop),
            )


class _Keys(Sampler[_Key]):
    """Sample numbers of each batch, and the slots in turn."""

    def __init__(self, batches: CounterBatches, slots: int) -> None:
        self.batches, self.slots = batches, slots

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[_Key]:
        for step, indices in enumerate(self.batches):
            yield step % self.slots, indices


class _Slots(Dataset[_Drawn]):
    """Reads a batch into a slot; only what is small goes through the workers' queue."""

    def __init__(self, crops: CropDataset, ring: Tensor) -> None:
        self.crops, self.ring = crops, ring

    def __getitem__(self, key: _Key) -> _Drawn:
        slot, indices = key
        memory = self.ring[slot, :, 0].numpy()
        places = [
            self.crops.read_into(out, index) for out, index in zip(memory, indices, strict=True)
        ]
        visible = [self.crops.visible(index) for index in indices]
        masks = None if visible[0] is None else np.stack(visible)  # type: ignore[arg-type]
        return slot, indices, np.array([place.flips for place in places]), masks


def _as_is(drawn: Any) -> Any:
    return drawn
