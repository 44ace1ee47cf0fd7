"""The training loop: Lightning's, with the best weights by validation kept in memory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from medspark.finetune.data import TaskData
from medspark.finetune.module import ClassifierModule
from medspark.finetune.settings import Settings


@dataclass(frozen=True)
class Machine:
    """Where a run computes; changes no setting of it.

    Attributes:
        accelerator: of Lightning, "auto", "cpu" or "gpu".
        num_workers: processes that read samples.
        progress: whether to show a progress bar.
    """

    accelerator: str = "auto"
    num_workers: int = 0
    progress: bool = True

    def trainer(self, precision: Any, **options: Any) -> L.Trainer:
        """A trainer on one device that writes no file by itself."""
        return L.Trainer(
            accelerator=self.accelerator,
            devices=1,
            precision=precision,
            enable_checkpointing=False,
            enable_progress_bar=self.progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **options,
        )


@dataclass
class Best(Callback):
    """Keeps the weights of the best validation, the first of equals; stops where none follows.

    Attributes:
        monitor: "loss" (lower is better) or "auc" (higher).
        patience: epochs without a better one before training stops; None for never.
        value: the best so far.
        epoch: when, from 0.
        state: the weights then, on the CPU.
    """

    monitor: str
    patience: int | None
    value: float = math.nan
    epoch: int = -1
    state: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    _waited: int = 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compares.

        Raises:
            ValueError: an AUC is asked for that the validation split does not have.
        """
        value = float(trainer.callback_metrics[f"val/{self.monitor}"])
        if math.isnan(value):
            raise ValueError(
                "the validation split has no AUC, it holds samples of one class only: use "
                "monitor=loss"
            )
        better = value < self.value if self.monitor == "loss" else value > self.value
        if better or self.epoch < 0:
            self.value, self.epoch, self._waited = value, trainer.current_epoch, 0
            state = pl_module.state_dict()
            self.state = {k: v.detach().cpu().clone() for k, v in state.items()}
            return
        # While "freeze_then_open" trains its head, what it waits for has not begun.
        waits = not (getattr(pl_module, "frozen", False) and _opens(pl_module))
        self._waited += waits
        if self.patience is not None and self._waited >= self.patience:
            trainer.should_stop = True


def _opens(module: L.LightningModule) -> bool:
    return getattr(module, "mode", "") == "freeze_then_open"


class NextAugmentation(Callback):
    """Tells the training data which epoch it is: its random changes follow seed and epoch."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sets the epoch of data that has one."""
        dataset: Any = getattr(trainer.train_dataloader, "dataset", None)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(trainer.current_epoch)


def fit(
    module: ClassifierModule,
    train: DataLoader[Any],
    val: DataLoader[Any] | None,
    settings: Settings,
    machine: Machine,
    out: Path,
) -> Best:
    """Trains `module`, puts the best weights into it, and leaves losses by epoch in metrics.csv.

    Without `val` the last weights are the best.

    Raises:
        FloatingPointError: a loss is not finite.
        ValueError: see `Best`.
    """
    best = Best(settings.monitor, settings.patience)
    bar = [RichProgressBar()] if machine.progress else []
    trainer = machine.trainer(
        settings.precision,
        max_epochs=settings.epochs,
        logger=CSVLogger(out, name="", version=""),
        callbacks=[*([best] if val is not None else []), NextAugmentation(), *bar],
        log_every_n_steps=1,
    )
    with warnings.catch_warnings():
        # A run that is started again writes its losses anew, as it should.
        warnings.filterwarnings("ignore", message="Experiment logs directory")
        warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no")
        trainer.fit(module, train, val)
    if val is None:
        best.epoch = settings.epochs - 1
    else:
        module.load_state_dict(best.state)
    return best


class _Features(L.LightningModule):
    """Hands out pooled features instead of probabilities."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def predict_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Any:
        x, label, _ = batch
        return self.network.features(x).float(), label


class FeatureBank:
    """Features of a frozen encoder: every sample goes through it once.

    Args:
        network: with `features(x)`.
        data: the samples.
        settings: for the precision.
        machine: where to compute.
    """

    def __init__(
        self, network: L.LightningModule, data: TaskData, settings: Settings, machine: Machine
    ) -> None:
        self._network, self._data, self._settings = network, data, settings
        self._machine = machine
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    def of(self, split: str) -> tuple[Tensor, Tensor]:
        """Features float32 [N, C] and labels [N] of a split in its order, without augmentation."""
        if split not in self._kept:
            reader, loader = _Features(self._network), self._data.ordered(split)
            self._kept[split] = predicted(reader, loader, self._settings, self._machine)
        return self._kept[split]


def predicted(
    module: L.LightningModule, loader: DataLoader[Any], settings: Settings, machine: Machine
) -> tuple[Tensor, Tensor]:
    """What `predict_step` says of all samples of a loader, in its order: values and labels."""
    batches = machine.trainer(settings.precision, logger=False).predict(module, loader)
    assert batches is not None
    return torch.cat([b[0].cpu() for b in batches]), torch.cat([b[1].cpu() for b in batches])
