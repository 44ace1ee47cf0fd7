"""One fine-tuning run: train, choose a checkpoint by validation, test it once."""

from __future__ import annotations

import copy
import csv
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from medspark.finetune.metrics import classification_metrics
from medspark.finetune.module import ClassifierModule
from medspark.models.encoders import encoder_from_spec

if TYPE_CHECKING:
    from medspark.data.tasks import Sample, Task, TaskDataset
    from medspark.data.windows import Intensity

SPLITS = ("train", "val", "test")
# A linear probe bears larger steps; an unknown mode is refused by the module.
_DEFAULT_LR = {"linear": 1e-2, "full": 1e-3}


@dataclass(frozen=True)
class FinetuneResult:
    """What a run leaves.

    Attributes:
        metrics: of each split, see `classification_metrics`; the test split was looked at once.
        predictions: CSV with id, patient, split, label and the probability of each class.
        checkpoint: the weights that were tested, a `state_dict` of `ClassifierModule`.
        best_epoch: the epoch of lowest validation loss, from 0.
    """

    metrics: dict[str, dict[str, float]]
    predictions: Path
    checkpoint: Path
    best_epoch: int


def finetune(
    task: Task,
    encoder: nn.Module | None,
    *,
    out_dir: str | Path,
    intensity: Intensity,
    size: Sequence[int] | None = None,
    mode: str = "full",
    epochs: int = 20,
    batch_size: int = 16,
    lr: float | None = None,
    encoder_lr_scale: float = 1.0,
    weight_decay: float = 0.01,
    dropout: float = 0.0,
    augment: bool = True,
    seed: int = 0,
    scratch: Mapping[str, Any] | None = None,
    accelerator: str = "auto",
    precision: Any = "32-true",
    num_workers: int = 0,
    progress: bool = True,
) -> FinetuneResult:
    """Trains a classifier on the training split of `task` and tests it.

    The checkpoint of the lowest validation loss is kept and evaluated once on every split. The
    test split is not even read before that choice is made. The same seed gives the same numbers
    on a CPU.

    Args:
        task: labelled samples in the splits train, val and test.
        encoder: pre-trained network, not changed here (a copy trains); None starts from scratch.
        out_dir: folder for `predictions.csv`, `best.ckpt` and `metrics.csv` (losses by epoch).
        intensity: normalisation of the HU values; must be that of the pre-training.
        size: voxels (d, h, w) that every patch is resampled to; None keeps the size of the patches.
        mode: "linear" (encoder frozen) or "full".
        epochs: passes over the training split.
        batch_size: samples per step, cut to the size of the training split.
        lr: peak learning rate of the head; None takes 1e-2 for a linear probe, else 1e-3.
        encoder_lr_scale: factor on `lr` for the encoder.
        weight_decay: of AdamW.
        dropout: before the head.
        augment: random flips and the like on the training split.
        seed: of the head, the order, the augmentation and the scratch weights.
        scratch: spec `{"name": ..., "kwargs": {...}}` of the network where `encoder` is None;
            ResNet-18 by default.
        accelerator: of Lightning, "auto", "cpu" or "gpu".
        precision: of Lightning, "32-true", "bf16-mixed" and so on.
        num_workers: processes that read samples.
        progress: whether to show a progress bar.

    Raises:
        ValueError: a split without samples, training labels of one class only, or losses that
            are not finite.
    """
    _check(task, epochs, batch_size)
    L.seed_everything(seed, workers=True, verbose=False)
    network = copy.deepcopy(encoder) if encoder is not None else _scratch(scratch)
    module = ClassifierModule(
        network,
        len(task.class_names),
        mode=mode,
        lr=_DEFAULT_LR.get(mode, math.nan) if lr is None else lr,
        encoder_lr_scale=encoder_lr_scale,
        weight_decay=weight_decay,
        dropout=dropout,
    )
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    data = _Data(_KeptTask(task), intensity, size, batch_size, seed, num_workers)
    trainer, best = _trainer(out, epochs, accelerator, precision, progress)
    trainer.fit(module, data.training(augment), data.ordered("val"))
    if not best.best_model_path:
        raise ValueError("the validation loss was never finite: lower the learning rate (lr)")
    state = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
    module.load_state_dict(state["state_dict"])
    found = {split: _predict(trainer, module, data.ordered(split)) for split in SPLITS}
    metrics = {split: classification_metrics(p, label) for split, (p, label) in found.items()}
    predictions = _write_predictions(task, found, out / "predictions.csv")
    return FinetuneResult(metrics, predictions, Path(best.best_model_path), int(state["epoch"]))


def _check(task: Task, epochs: int, batch_size: int) -> None:
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}")
    labels = {split: {sample.label for sample in task.split(split)} for split in SPLITS}
    if len(labels["train"]) < 2:
        raise ValueError("the training split holds one class only: nothing to learn")


def _scratch(spec: Mapping[str, Any] | None) -> nn.Module:
    return encoder_from_spec(spec if spec is not None else {"name": "resnet18", "kwargs": {}})


class _KeptTask:
    """A task whose patches are kept in memory once read: each epoch reads all of them again."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._kept: dict[str, Any] = {}

    def split(self, name: str) -> list[Sample]:
        return self._task.split(name)

    def read(self, sample: Sample) -> Any:
        if sample.id not in self._kept:
            self._kept[sample.id] = self._task.read(sample)
        return self._kept[sample.id]


@dataclass(frozen=True)
class _Data:
    task: _KeptTask
    intensity: Intensity
    size: Sequence[int] | None
    batch_size: int
    seed: int
    num_workers: int

    def _dataset(self, split: str, augment: bool) -> TaskDataset:
        from medspark.data.tasks import TaskDataset

        size = None if self.size is None else (self.size[0], self.size[1], self.size[2])
        task = cast("Task", self.task)
        return TaskDataset(task, split, self.intensity, size, augment=augment, seed=self.seed)

    def training(self, augment: bool) -> DataLoader[Any]:
        dataset = self._dataset("train", augment)
        batch = min(self.batch_size, len(dataset))
        return DataLoader(
            dataset,
            batch,
            shuffle=True,
            # A last batch of one sample has no batch statistics where a map is one voxel.
            drop_last=len(dataset) % batch == 1 and batch > 1,
            generator=torch.Generator().manual_seed(self.seed),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )

    def ordered(self, split: str) -> DataLoader[Any]:
        return DataLoader(
            self._dataset(split, False), self.batch_size, num_workers=self.num_workers
        )


class _NextAugmentation(Callback):
    """Tells the training data which epoch it is: its random changes follow seed and epoch."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loader = trainer.train_dataloader
        assert loader is not None
        loader.dataset.set_epoch(trainer.current_epoch)


def _trainer(
    out: Path, epochs: int, accelerator: str, precision: Any, progress: bool
) -> tuple[L.Trainer, ModelCheckpoint]:
    best = ModelCheckpoint(
        dirpath=out,
        filename="best",
        monitor="val/loss",
        save_top_k=1,
        save_weights_only=True,
        enable_version_counter=False,
    )
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator=accelerator,
        devices=1,
        precision=precision,
        logger=CSVLogger(out, name="", version=""),
        callbacks=[best, _NextAugmentation(), *([RichProgressBar()] if progress else [])],
        enable_progress_bar=progress,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    return trainer, best


def _predict(
    trainer: L.Trainer, module: ClassifierModule, loader: DataLoader[Any]
) -> tuple[Tensor, Tensor]:
    batches = trainer.predict(module, loader)
    assert batches is not None
    probabilities = torch.cat([b[0].cpu() for b in batches])
    return probabilities, torch.cat([b[1].cpu() for b in batches])


def _write_predictions(
    task: Task, found: Mapping[str, tuple[Tensor, Tensor]], target: Path
) -> Path:
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["id", "patient", "split", "label", *(f"prob_{n}" for n in task.class_names)]
        )
        for split, (probabilities, _) in found.items():
            for sample, row in zip(task.split(split), probabilities.tolist(), strict=True):
                numbers = (f"{value:.6g}" for value in row)
                writer.writerow([sample.id, sample.patient, split, sample.label, *numbers])
    os.replace(partial, target)
    return target
