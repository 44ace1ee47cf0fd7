"""Batches of contrastive views on the device of the network.

On the CPU the workers make whole views; for a GPU they read int16 boxes, and the device makes the
views of a batch at once. Either way big memory is shared and used again, as in `CropLoader`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from medspark.data.sampler import CounterBatches
from medspark.data.views import Sample, ViewDataset
from medspark.data.views_render import render

_Key = tuple[int, range]  # slot of the shared memory, sample numbers
_Made = tuple[int, range, list[Sample]]


class ViewBatch(NamedTuple):
    """One batch of one process.

    Attributes:
        views: For each view float32 `[B, 1, D, H, W]` (slices `[B, 1, H, W]`) on the loader's
            device, the large ones first. Row b of all of them shows one place in one scan.
        indices: int64 `[B]` on the CPU, numbers of the samples.
    """

    views: list[Tensor]
    indices: Tensor


class ViewLoader:
    """Iterates over the batches of a run, from any sample on; the counterpart of `CropLoader`.

    Views are functions of the dataset's seed and the sample numbers: the same for any number of
    workers, and `world` processes read together what one with the joint batch would. A GPU gives
    the views of the CPU up to rounding.

    Args:
        views: The samples.
        batch_size: Samples per process.
        start: Number of the first sample, over all processes: those done before a resume.
        stop: End of the sample numbers; default the length of `views`.
        rank: This process, from 0.
        world: Processes.
        num_workers: Processes that read; 0 reads in this one.
        prefetch: Batches that each worker makes ahead. Shared memory holds
            `num_workers * prefetch + 1` batches: of finished views, or of their int16 boxes.
        device: Where the batch ends up.
        batched: Whether the device makes the views of a whole batch at once, and not the workers
            one by one; None does so on every device but the CPU.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        views: ViewDataset,
        batch_size: int,
        *,
        start: int = 0,
        stop: int | None = None,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        prefetch: int = 2,
        device: torch.device | str = "cpu",
        batched: bool | None = None,
    ) -> None:
        stop = len(views) if stop is None else stop
        if num_workers < 0 or prefetch < 1 or stop > len(views):
            raise ValueError(
                f"num_workers {num_workers} must not be negative, prefetch {prefetch} positive "
                f"and stop {stop} at most the {len(views)} samples there are"
            )
        self.batches = CounterBatches(batch_size, start, stop, rank=rank, world=world)
        self.views, self.device = views, torch.device(device)
        self.num_workers, self.prefetch = num_workers, prefetch
        self.batched = self.device.type != "cpu" if batched is None else batched

    def __len__(self) -> int:
        """Batches of this process from `start` on."""
        return len(self.batches)

    def __iter__(self) -> Iterator[ViewBatch]:
        """Start at `start`, each time.

        Raises:
            DamagedVolume: If a volume cannot be read.
        """
        # A slot is filled again once its batch and the next have been handed out.
        slots = self.num_workers * self.prefetch + 1
        rings = [self._ring(slots, number) for number in range(self.views.policy.n_views)]
        made: DataLoader[_Made] = DataLoader(
            _Slots(self.views, rings, self.batched),
            batch_size=None,
            sampler=_Keys(self.batches, slots),
            num_workers=self.num_workers,
            collate_fn=_as_is,
            prefetch_factor=self.prefetch if self.num_workers else None,
            generator=torch.Generator(),  # else it draws a number from torch's own
        )
        for slot, indices, samples in made:
            views = [self._finish(ring[slot], samples, v) for v, ring in enumerate(rings)]
            yield ViewBatch(views, torch.arange(indices.start, indices.stop))

    def _ring(self, slots: int, number: int) -> Tensor:
        inner = (1, *self.views.box_size(number)) if self.batched else self.views.shape(number)
        dtype = torch.int16 if self.batched else torch.float32
        ring = torch.empty((slots, self.batches.batch_size, *inner), dtype=dtype)
        return ring.share_memory_() if self.num_workers else ring

    def _finish(self, made: Tensor, samples: list[Sample], number: int) -> Tensor:
        if self.device.type == "cuda":
            # Pinned memory comes from torch's pool, which waits for the copy before reuse.
            made = made.pin_memory()
        found = made.to(self.device, non_blocking=made.is_pinned())
        if not self.batched:
            return found.clone() if found is made else found
        frames, shots = [s.frames[number] for s in samples], [s.shots[number] for s in samples]
        return self.views.shaped(render(found, frames, shots, self.views.crops.intensity))


class _Keys(Sampler[_Key]):
    """Sample numbers of each batch, and the slots in turn."""

    def __init__(self, batches: CounterBatches, slots: int) -> None:
        self.batches, self.slots = batches, slots

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[_Key]:
        for step, indices in enumerate(self.batches):
            yield step % self.slots, indices


class _Slots(Dataset[_Made]):
    """Makes a batch in a slot; only what is small goes through the workers' queue."""

    def __init__(self, views: ViewDataset, rings: list[Tensor], batched: bool) -> None:
        self.views, self.rings, self.batched = views, rings, batched

    def __getitem__(self, key: _Key) -> _Made:
        slot, indices = key
        samples = [self.views.sample(index) for index in indices]
        for number, ring in enumerate(self.rings):
            for out, sample in zip(ring[slot], samples, strict=True):
                if self.batched:
                    self.views.read_into(out[0].numpy(), sample, number)
                else:
                    out.copy_(self.views.view(sample, number))
        return slot, indices, samples if self.batched else []


def _as_is(made: Any) -> Any:
    return made
