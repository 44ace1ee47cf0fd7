"""Runs pre-training: data order, Trainer, checkpoints, pictures, summary."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor
from torch.utils.data import Dataset

from medspark.models.weights import init_from as load_weights
from medspark.pretrain.checkpoints import (
    Checkpoints,
    WholeFileIO,
    check_resume,
    find_resume,
    remove_partial,
)
from medspark.pretrain.ema import WeightAverage
from medspark.pretrain.export import load_checkpoint
from medspark.pretrain.loaders import Loaders
from medspark.pretrain.panels import Display, PanelCallback
from medspark.pretrain.spark_module import SparKModule
from medspark.pretrain.summary import write_summary
from medspark.pretrain.timing import StepTimer

# What Lightning cannot know: the sampler starts where the checkpoint ended, and the log of a part
# that was killed before its first checkpoint is written anew.
_KNOWN = (".*your dataloader is not resumable", "Experiment logs directory .* is not empty")


@dataclass(frozen=True)
class PretrainResult:
    """What a run left behind.

    Attributes:
        best: checkpoint with the lowest validation loss.
        last: the newest checkpoint, to resume from.
        metrics: last values of everything logged.
        steps: optimiser steps done.
        summary: one-page HTML with curves and pictures.
    """

    best: Path
    last: Path
    metrics: dict[str, float]
    steps: int
    summary: Path


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
    num_nodes: int = 1,
    strategy: str = "auto",
    precision: str = "32-true",
    accumulate: int = 1,
    gradient_clip: float = 5.0,
    ema_decay: float | None = None,
    val_every: int | None = None,
    save_every: int = 0,
    panel_every: int = 1,
    log_every: int = 10,
    resume: str | os.PathLike[str] | None = None,
    init_from: str | os.PathLike[str] | None = None,
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
    ``panels/``, ``summary.html``; ``failure/`` if a loss or gradient is not finite.

    Several processes: start the program with ``torchrun --nnodes N --nproc-per-node G`` and give
    ``devices=G``, ``num_nodes=N``, or let Lightning start them (``devices=G`` alone, on one machine).
    Samples and masks of a step are those of one process with the joint batch.

    Args:
        spec: of the model, see ``medspark.models.spark_spec``.
        train_dataset: a ``CropDataset``, whose masks are used where it draws them; or any whose item
            ``i`` is float32 [C, D, H, W] and depends on ``i`` alone. For every
            ``0 <= i < max_steps * batch_size * accumulate * processes``.
        val_dataset: the same, finite; read in order.
        max_steps: optimiser steps of the whole run, resumed part included.
        batch_size: per process and forward pass.
        out_dir: folder of the run.
        lr: peak learning rate.
        optim: further options of ``medspark.pretrain.schedule.OPTIM_DEFAULTS``.
        accelerator: as Lightning's.
        devices: as Lightning's, per machine.
        num_nodes: machines.
        strategy: as Lightning's, "ddp" for several processes.
        precision: as Lightning's, "bf16-mixed" on a GPU.
        accumulate: batches per optimiser step; gradients are those of the joint batch wherever norms
            work per sample, while batch norms see one batch at a time.
        gradient_clip: greatest gradient norm; 0 for none.
        ema_decay: of an average of the weights, kept in checkpoints; None for none.
        val_every: steps between validation runs; default a tenth of the run.
        save_every: steps between ``last.ckpt``, beside those of validation; 0 for none.
        panel_every: validation runs between panels.
        log_every: steps between log entries.
        resume: a checkpoint of the run to continue, with the same settings, or "auto": the last one in
            ``out_dir`` if there is one, else a new run; a complete run is left as it is.
        init_from: weights that the encoder starts from, see ``medspark.models.weights.init_from``;
            a resumed run has its own.
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
        FloatingPointError: the loss or the gradient is NaN or infinite.
    """
    if min(max_steps, batch_size, accumulate) < 1:
        raise ValueError(
            f"max_steps {max_steps}, batch_size {batch_size} and accumulate {accumulate} must be positive"
        )
    every, out = min(val_every or max(1, max_steps // 10), max_steps), Path(out_dir)
    L.seed_everything(seed, verbose=False)
    options = {"lr": lr, "gradient_clip": gradient_clip, **(optim or {}), "max_steps": max_steps}
    module = SparKModule(spec, options, intensity, _plain(spacing, float), _plain(crop, int), seed)
    saved = Checkpoints(out / "checkpoints", save_every, every, batch_size)
    shown = PanelCallback(out / "panels", panel_every, spacing or (1.0, 1.0, 1.0), display)
    average = [] if ema_decay is None else [WeightAverage(ema_decay)]
    trainer = _trainer(
        module,
        out,
        [shown, StepTimer(log_every), *average, *callbacks, saved],
        progress_bar,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        precision=precision,
        accumulate_grad_batches=accumulate,
        val_check_interval=every * accumulate,
        log_every_n_steps=log_every,
    )
    loaders = Loaders(train_dataset, val_dataset, batch_size, num_workers)
    return _run(trainer, module, saved, loaders, resume, init_from)


def _run(
    trainer: L.Trainer,
    module: SparKModule,
    saved: Checkpoints,
    loaders: Loaders,
    resume: str | os.PathLike[str] | None,
    weights: str | os.PathLike[str] | None,
) -> PretrainResult:
    """Trains what is left to train, and writes the summary."""
    out = Path(trainer.default_root_dir)
    found = find_resume(resume, saved.last.parent)
    start = 0
    if found is not None:
        start = _resume(found, dict(module.hparams), saved, trainer, str(resume) == "auto")
    elif weights is not None:
        report = load_weights(module.spark.encoder, weights)
        if trainer.is_global_zero:
            print(report)
    if trainer.is_global_zero:
        remove_partial(out)
    if start < trainer.max_steps:
        trainer.loggers = _loggers(out, start)
        parts = trainer.accumulate_grad_batches
        device = trainer.strategy.root_device
        train = loaders.train(start * parts, trainer.max_steps * parts, device)
        _fit(trainer, module, train, loaders.val(), found)
        saved.note(trainer)
    if trainer.is_global_zero:
        write_summary(out)
    steps = max(start, trainer.global_step)
    return PretrainResult(saved.best, saved.last, saved.metrics, steps, out / "summary.html")


def _trainer(
    module: SparKModule,
    out: Path,
    callbacks: Sequence[Callback],
    progress_bar: bool,
    **options: Any,
) -> L.Trainer:
    o = module.optim
    return L.Trainer(
        max_steps=o["max_steps"],
        # LAMB clips by itself: its moments and trust ratio come behind.
        gradient_clip_val=None if o["name"] == "lamb" else o["gradient_clip"] or None,
        default_root_dir=out,
        plugins=[WholeFileIO()],
        callbacks=[*([_Progress()] if progress_bar else []), *callbacks],
        # Samples are dealt by CounterSampler, and validation counts in steps.
        use_distributed_sampler=False,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_progress_bar=progress_bar,
        enable_model_summary=False,
        logger=False,
        **options,
    )


def _plain(values: Sequence[Any] | None, kind: type) -> list[Any] | None:
    """A list of Python numbers: checkpoints load with weights_only, which knows no other."""
    return None if values is None else [kind(value) for value in values]


def _resume(
    path: Path, settings: Mapping[str, Any], saved: Checkpoints, trainer: L.Trainer, auto: bool
) -> int:
    """Step of the checkpoint; a complete run is an error unless that may be so."""
    content = load_checkpoint(path)
    step = check_resume(content, path, settings, saved.samples_per_step(trainer))
    if step >= trainer.max_steps:
        if not auto:
            raise ValueError(
                f"{path} is at step {step}, so a run of {trainer.max_steps} steps is complete"
            )
        saved.load_state_dict(content["callbacks"][saved.state_key])
    return step


def _fit(
    trainer: L.Trainer,
    module: SparKModule,
    train: Iterable[Any],
    val: Iterable[Any],
    resume: Path | None,
) -> None:
    with warnings.catch_warnings():
        for message in _KNOWN:
            warnings.filterwarnings("ignore", message=message)
        trainer.fit(module, train, val, ckpt_path=None if resume is None else str(resume))


def _loggers(out: Path, start: int) -> list[Logger]:
    return [
        # Entries behind the checkpoint, of a run that was killed later, are hidden by purge_step.
        TensorBoardLogger(out, name="tensorboard", version="", purge_step=start or None),
        # A resumed run starts its own file: CSVLogger would delete the earlier one.
        CSVLogger(out, name="csv", version=f"from_step_{start:06d}"),
    ]


class _Progress(RichProgressBar):
    """Lightning's bar, which would count epochs where a run has only steps ("Epoch 0/-2")."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "pre-training"
