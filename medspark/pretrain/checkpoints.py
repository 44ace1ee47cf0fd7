"""Checkpoints that are whole or absent, when they are written, and what a run resumes from."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import lightning as L
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

# Settings that decide which samples and targets a run sees: another value is another run.
_IDENTITY = ("spec", "seed", "intensity", "spacing", "crop")


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> Path:
    """Writes a file so that at any moment, a kill or power cut included, it is whole or absent.

    Lightning moves its file from the system's temporary folder, which copies where that is another
    disk. Here the temporary name is in the same folder, and content reaches the disk before the name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if os.name == "posix":  # makes the new name itself survive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return path


def remove_partial(out: Path) -> None:
    """Removes what killed runs left half-written in the folders that a run writes to."""
    for folder in (out, *(out / name for name in ("checkpoints", "panels", "failure"))):
        for partial in folder.glob(".*.tmp"):
            partial.unlink(missing_ok=True)


class WholeFileIO(TorchCheckpointIO):
    """Checkpoint files through ``write_whole``, read back as plain tensors and values only."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Writes ``checkpoint``; ``storage_options`` are for remote storage, and unused."""
        write_whole(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(
        self, path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Reads a checkpoint to the CPU, whatever code it might hold is refused."""
        from medspark.pretrain.export import load_checkpoint

        return load_checkpoint(Path(path))


class Checkpoints(Checkpoint):
    """Writes ``last.ckpt`` after every validation and every few steps, ``best.ckpt`` when it is best.

    Files hold no path of this machine. Logs are flushed first, so that they reach as far as the
    checkpoint.

    Args:
        folder: for the files.
        every: steps between ``last.ckpt``, beside those of validation; 0 for none.
        val_every: steps between validation runs.
        batch_size: per process and forward pass.

    Attributes:
        metrics: last value of everything logged, kept over a resume.
    """

    def __init__(self, folder: Path, every: int, val_every: int, batch_size: int) -> None:
        self.best, self.last = folder / "best.ckpt", folder / "last.ckpt"
        self.every, self.val_every, self.batch_size = every, val_every, batch_size
        self.metrics: dict[str, float] = {}
        self._score = math.inf
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes note of the step, which is restored by now and was not on fit start."""
        self._step = trainer.global_step
        if not self.best.exists():  # resumed from elsewhere: the best so far is not in this folder
            self._score = math.inf

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Saves if this batch completed a step whose turn it is; validation saves by itself."""
        step = trainer.global_step
        if step == self._step:
            return
        self._step = step
        if self.every and step % self.every == 0 and step % self.val_every:
            self._save(trainer, self.last)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the last, and the best if the loss on unseen patients has fallen."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        score = float(trainer.callback_metrics.get("val/loss", math.inf))
        if score < self._score or not self.best.exists():
            self._score = score
            self._save(trainer, self.best)
        self._save(trainer, self.last)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the end of a run that ends between two validation runs."""
        if trainer.global_step % self.val_every:
            self._save(trainer, self.last)

    def note(self, trainer: L.Trainer) -> None:
        """Keeps what was logged last. Not times: they would make two equal runs differ."""
        logged = trainer.callback_metrics.items()
        self.metrics.update({k: float(v) for k, v in logged if not k.startswith("time/")})

    def _save(self, trainer: L.Trainer, path: Path) -> None:
        self.note(trainer)
        for logger in trainer.loggers:
            logger.save()
        trainer.save_checkpoint(path)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the samples per step, which a resumed run must keep."""
        checkpoint["samples_per_step"] = self.samples_per_step(trainer)

    def samples_per_step(self, trainer: L.Trainer) -> int:
        """Over all processes and accumulated batches."""
        return self.batch_size * trainer.accumulate_grad_batches * trainer.world_size

    def state_dict(self) -> dict[str, Any]:
        """Best loss and last metrics."""
        return {"score": self._score, "metrics": dict(self.metrics)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``state_dict`` gave."""
        self._score, self.metrics = float(state_dict["score"]), dict(state_dict["metrics"])


def find_resume(resume: str | os.PathLike[str] | None, folder: Path) -> Path | None:
    """The checkpoint to go on from: the given file; with "auto" the folder's last, if there is one."""
    if resume is None or str(resume) != "auto":
        return None if resume is None else Path(resume)
    return folder / "last.ckpt" if (folder / "last.ckpt").exists() else None


def check_resume(
    content: Mapping[str, Any], path: Path, settings: Mapping[str, Any], samples_per_step: int
) -> int:
    """Step of a checkpoint, after checking that it belongs to a run with these settings.

    Other optimiser settings are allowed, as they help a run that has diverged, and named in a
    warning, as the result is no longer that of one run.

    Raises:
        ValueError: another model, seed, crop, spacing, window or number of samples per step.
    """
    stored = content.get("hyper_parameters", {})
    then = {**{k: stored.get(k) for k in _IDENTITY}, "samples per step": samples_per_step}
    then["samples per step"] = content.get("samples_per_step", samples_per_step)
    now = {**{k: settings.get(k) for k in _IDENTITY}, "samples per step": samples_per_step}
    other = [key for key in now if then[key] != now[key]]
    if other:
        raise ValueError(
            f"{path} belongs to another run: "
            + "; ".join(f"its {key} is {then[key]}, here it is {now[key]}" for key in other)
            + ". Start anew in another folder, or resume with the same settings"
        )
    was, is_now = stored.get("optim", {}), settings.get("optim", {})
    changed = [k for k in sorted({*was, *is_now}) if was.get(k) != is_now.get(k)]
    if changed:
        listed = ", ".join(f"{k} {was.get(k)} -> {is_now.get(k)}" for k in changed)
        warnings.warn(f"resuming {path} with other optimiser settings: {listed}", stacklevel=2)
    return int(content.get("global_step", 0))
