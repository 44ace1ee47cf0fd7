"""The samples of a task as batches: read once, in a fixed order or shuffled by the seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from medspark.finetune.settings import Settings

if TYPE_CHECKING:
    from medspark.data.tasks import Sample, Task, TaskDataset
    from medspark.data.windows import Intensity


class KeptTask:
    """A task whose patches are kept in memory once read: each epoch reads all of them again."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._kept: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        """What is not changed here: names of the classes, dimensions and so on."""
        if name.startswith("_"):  # while it is unpickled there is no task yet
            raise AttributeError(name)
        return getattr(self._task, name)

    def read(self, sample: Sample) -> Any:
        """As `Task.read`."""
        if sample.id not in self._kept:
            self._kept[sample.id] = self._task.read(sample)
        return self._kept[sample.id]


@dataclass(frozen=True)
class TaskData:
    """Batches (x, label, index) of the splits of a task.

    Attributes:
        task: with its patches kept in memory.
        intensity: normalisation.
        settings: of the run.
        num_workers: processes that read.
    """

    task: KeptTask
    intensity: Intensity
    settings: Settings
    num_workers: int = 0

    def dataset(self, split: str, augment: bool | str = False) -> TaskDataset:
        """Samples of a split as the network gets them."""
        from medspark.data.tasks import TaskDataset

        size = None if self.settings.size is None else tuple(self.settings.size)
        return TaskDataset(
            cast("Task", self.task),
            split,
            self.intensity,
            cast("Any", size),
            augment=augment,
            seed=self.settings.seed,
        )

    def training(self) -> DataLoader[Any]:
        """The training split, shuffled."""
        return self._shuffled(self.dataset("train", self.settings.augment), self.num_workers)

    def ordered(self, split: str) -> DataLoader[Any]:
        """A split in the order of the task."""
        return DataLoader(
            self.dataset(split), self.settings.batch_size, num_workers=self.num_workers
        )

    def training_features(self, features: Tensor, labels: Tensor) -> DataLoader[Any]:
        """Features [N, C] that stand for the training split, shuffled in the same order."""
        return self._shuffled(_with_index(features, labels), 0)

    def ordered_features(self, features: Tensor, labels: Tensor) -> DataLoader[Any]:
        """Features [N, C] that stand for a split, in the same order."""
        return DataLoader(_with_index(features, labels), self.settings.batch_size)

    def _shuffled(self, dataset: Dataset[Any], num_workers: int) -> DataLoader[Any]:
        count = len(cast("TaskDataset", dataset))
        batch = min(self.settings.batch_size, count)
        return DataLoader(
            dataset,
            batch,
            shuffle=True,
            # A last batch of one sample has no batch statistics where a map is one voxel.
            drop_last=count % batch == 1 and batch > 1,
            generator=torch.Generator().manual_seed(self.settings.seed),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
        )

    def geometry(self) -> dict[str, Any]:
        """What a training sample measures: what has to be known to find such pieces in a scan.

        Returns:
            `size`: voxels that the network gets; the median where samples differ and no size is
            set. `patch_mm`: median physical size, `patch_mm_low` and `patch_mm_high` its range.
            `spacing`: mm of a voxel of the network's input, patch_mm / size. Axes (z, y, x). The
            mm are None for images and grey values.
        """
        read = [self.task.read(sample) for sample in self.task.split("train")]
        shapes = np.array([patch.shape for patch, _ in read])
        if shapes.shape[1] != 3 or self.task.grey:  # no physical size, or none that is known
            size = self.settings.size or np.rint(np.median(shapes, axis=0)).astype(int).tolist()
            return {"size": [int(n) for n in size]} | dict.fromkeys(_MEASURES)
        measured = shapes * np.array([spacing for _, spacing in read])
        size = self.settings.size or np.rint(np.median(shapes, axis=0)).astype(int).tolist()
        patch = np.median(measured, axis=0)
        found = (patch, measured.min(axis=0), measured.max(axis=0), patch / np.array(size))
        return {"size": [int(n) for n in size]} | {
            name: [round(float(v), 4) for v in values]
            for name, values in zip(_MEASURES, found, strict=True)
        }


_MEASURES = ("patch_mm", "patch_mm_low", "patch_mm_high", "spacing")


def _with_index(features: Tensor, labels: Tensor) -> TensorDataset:
    return TensorDataset(features, labels, torch.arange(len(labels)))
