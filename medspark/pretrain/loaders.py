"""Batches of a run: from any batch on, for whatever process asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from medspark.data.crops import CropDataset
from medspark.data.loader import CropBatch, CropLoader
from medspark.pretrain.order import CounterSampler, place_in_world


@dataclass(frozen=True)
class Loaders:
    """Makes the loaders of training and validation.

    Args:
        train_dataset: crops, which come with their masks, or any dataset of volumes [C, D, H, W].
        val_dataset: volumes [C, D, H, W], read in order.
        batch_size: per process.
        num_workers: processes that read.
    """

    train_dataset: Dataset[Tensor]
    val_dataset: Dataset[Tensor]
    batch_size: int
    num_workers: int

    def train(self, start: int, batches: int, device: torch.device) -> Iterable[Any]:
        """Batches ``start`` to ``batches`` of each process; its length is ``batches``."""
        if isinstance(self.train_dataset, CropDataset):
            return CropBatches(
                self.train_dataset, self.batch_size, start, batches, self.num_workers, device
            )
        return self._loader(self.train_dataset, CounterSampler(start, batches, self.batch_size))

    def val(self) -> DataLoader[Tensor]:
        """The whole validation set, on every process."""
        return self._loader(self.val_dataset, None)

    def _loader(self, dataset: Dataset[Tensor], sampler: Sampler[int] | None) -> DataLoader[Tensor]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            shuffle=False,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


class CropBatches:
    """``CropLoader`` as Lightning counts: the length is that of the whole run, not of what is left.

    The loader is made when the iteration starts, as only then a process knows its rank.

    Args:
        crops: the crops.
        batch_size: per process.
        start: batches that this process has read before.
        batches: batches that it reads in the whole run.
        num_workers: processes that read.
        device: where batches are wanted.
    """

    def __init__(
        self,
        crops: CropDataset,
        batch_size: int,
        start: int,
        batches: int,
        num_workers: int,
        device: torch.device,
    ) -> None:
        self.crops, self.batch_size, self.device = crops, batch_size, device
        self.start, self.batches, self.num_workers = start, batches, num_workers

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[CropBatch]:
        rank, world = place_in_world()
        joint = self.batch_size * world
        yield from CropLoader(
            self.crops,
            self.batch_size,
            start=self.start * joint,
            stop=self.batches * joint,
            rank=rank,
            world=world,
            num_workers=self.num_workers,
            device=self.device,
        )
