"""Runs pre-training: data order, Trainer, checkpoints, pictures."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from medspark.pretrain.panels import Display, PanelCallback
from medspark.pretrain.spark_module import SparKModule


@dataclass(frozen=True)
class PretrainResult:
    """What a run left behind.

    Attributes:
        best: checkpoint with the lowest validation loss.
        last: checkpoint of the last validation run, to resume from.
        metrics: last values of everything logged.
        steps: optimiser steps done.
    """

    best: Path
    last: Path
    metrics: dict[str, float]
    steps: int


class CounterSampler(Sampler[int]):
    """Sample numbers 0, 1, 2, ... of a run from any step on, batches dealt to processes.

    The dataset maps a number to a sample by itself, so a run resumed at step ``start`` reads
    exactly what it would have read. The length is that of the whole run, as Lightning counts the
    steps already done.
    """

    def __init__(self, start: int, max_steps: int, batch_size: int) -> None:
        self.start, self.max_steps, self.batch_size = start, max_steps, batch_size

    def __len__(self) -> int:
        return self.max_steps * self.batch_size

    def __iter__(self) -> Iterator[int]:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if distributed else 0
        world = torch.distributed.get_world_size() if distributed else 1
        for step in range(self.start, self.max_steps):
            first = (step * world + rank) * self.batch_size
            yield from range(first, first + self.batch_size)


def pretrain(
    spec: dict[str, Any],
    train_dataset: Dataset[Tensor],
    val_dataset: Dataset[Tensor],
    *,
    max_steps: int,
    batch_size: int,
    out_dir: str | os.PathLike[str],
    lr: float = 1e-3,
    optim: dict[str, Any] | None = None,
    accelerator: str = "auto",
    devices: int | str = "auto",
    precision: str = "32-true",
    gradient_clip: float = 5.0,
    val_every: int | None = None,
    panel_every: int = 1,
    log_every: int = 10,
    resume: str | os.PathLike[str] | None = None,
    seed: int = 0,
    num_workers: int = 0,
    intensity: dict[str, Any] | None = None,
    spacing: Sequence[float] | None = None,
    crop: Sequence[int] | None = None,
    display: Display | None = None,
    progress_bar: bool = True,
    callbacks: Sequence[Callback] = (),
) -> PretrainResult:
    """Pre-trains a SparK model.

    Writes below ``out_dir``: ``checkpoints/{best,last}.ckpt``, ``tensorboard/``, ``csv/``,
    ``panels/``.

    Args:
        spec: of the model, see ``medspark.models.spark_spec``.
        train_dataset: item ``i`` is float32 [C, D, H, W] and depends on ``i`` alone, for every
            ``0 <= i < max_steps * batch_size * processes``.
        val_dataset: the same, finite; read in order.
        max_steps: optimiser steps of the whole run, resumed part included.
        batch_size: per process.
        out_dir: folder of the run.
        lr: peak learning rate.
        optim: further options of ``medspark.pretrain.schedule.OPTIM_DEFAULTS``.
        accelerator: as Lightning's.
        devices: as Lightning's.
        precision: as Lightning's, "bf16-mixed" on a GPU.
        gradient_clip: greatest gradient norm; 0 for none.
        val_every: steps between validation runs; default a tenth of the run.
        panel_every: validation runs between panels.
        log_every: steps between log entries.
        resume: ``last.ckpt`` of the run to continue, with the same spec, seed and batch size.
        seed: of weights and masks.
        num_workers: loader processes.
        intensity: how HU became network input, stored in the checkpoint.
        spacing: mm (z, y, x), stored, and used for the panels.
        crop: voxels (z, y, x), stored.
        display: units and window of the panels.
        progress_bar: whether to show one.
        callbacks: further Lightning callbacks.

    Raises:
        ValueError: options that do not fit, or a checkpoint of another run.
        FloatingPointError: the loss is NaN or infinite.
    """
    if max_steps < 1 or batch_size < 1:
        raise ValueError(f"max_steps {max_steps} and batch_size {batch_size} must be positive")
    every = min(val_every or max(1, max_steps // 10), max_steps)
    start = 0 if resume is None else _resume_step(Path(resume), spec, seed, max_steps)
    L.seed_everything(seed, verbose=False)
    options = {"lr": lr, **(optim or {}), "max_steps": max_steps}
    module = SparKModule(spec, options, intensity, _plain(spacing, float), _plain(crop, int), seed)
    out = Path(out_dir)
    best, last = _checkpoints(out / "checkpoints")
    panels = PanelCallback(out / "panels", panel_every, spacing or (1.0, 1.0, 1.0), display)
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=devices,
        precision=precision,  # type: ignore[arg-type]
        max_steps=max_steps,
        gradient_clip_val=gradient_clip or None,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=log_every,
        use_distributed_sampler=False,
        enable_progress_bar=progress_bar,
        enable_model_summary=False,
        callbacks=[best, last, panels, *([_Progress()] if progress_bar else []), *callbacks],
        logger=_loggers(out, start),
    )
    sampler = CounterSampler(start, max_steps, batch_size)
    train = _loader(train_dataset, batch_size, num_workers, sampler)
    _fit(trainer, module, train, _loader(val_dataset, batch_size, num_workers, None), resume)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    paths = Path(best.best_model_path), Path(last.best_model_path)
    return PretrainResult(*paths, metrics, trainer.global_step)


def _plain(values: Sequence[Any] | None, kind: type) -> list[Any] | None:
    """A list of Python numbers: checkpoints load with weights_only, which knows no other."""
    return None if values is None else [kind(value) for value in values]


def _fit(
    trainer: L.Trainer,
    module: SparKModule,
    train: DataLoader[Tensor],
    val: DataLoader[Tensor],
    resume: str | os.PathLike[str] | None,
) -> None:
    with warnings.catch_warnings():
        # Lightning cannot know that the sampler starts where the checkpoint ended.
        warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")
        trainer.fit(module, train, val, ckpt_path=None if resume is None else str(resume))


def _checkpoints(folder: Path) -> tuple[ModelCheckpoint, ModelCheckpoint]:
    """Best and last; two callbacks, as ``save_last`` of one writes only where the best improves."""

    def keep(name: str, monitor: str | None) -> ModelCheckpoint:
        return ModelCheckpoint(folder, name, monitor=monitor, enable_version_counter=False)

    return keep("best", "val/loss"), keep("last", None)


def _loggers(out: Path, start: int) -> list[Logger]:
    return [
        TensorBoardLogger(out, name="tensorboard", version=""),
        # A resumed run starts its own file: CSVLogger would delete the earlier one.
        CSVLogger(out, name="csv", version=f"from_step_{start:06d}"),
    ]


class _Progress(RichProgressBar):
    """Lightning's bar, which would count epochs where a run has only steps ("Epoch 0/-2")."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "pre-training"


def _loader(
    dataset: Dataset[Tensor], batch_size: int, num_workers: int, sampler: Sampler[int] | None
) -> DataLoader[Tensor]:
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        shuffle=False,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def _resume_step(path: Path, spec: dict[str, Any], seed: int, max_steps: int) -> int:
    """Step of a checkpoint, after checking that it belongs to a run with this spec and seed."""
    from medspark.pretrain.export import load_checkpoint

    content = load_checkpoint(path)
    stored = content.get("hyper_parameters", {})
    if stored.get("spec") != spec or stored.get("seed") != seed:
        raise ValueError(
            f"{path} belongs to another run: it has spec {stored.get('spec')} and seed "
            f"{stored.get('seed')}, this run {spec} and {seed}; start anew, or resume with the same"
        )
    step = int(content.get("global_step", 0))
    if step >= max_steps:
        raise ValueError(f"{path} is at step {step}, so a run of {max_steps} steps is complete")
    return step
