"""Exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor


class WeightAverage(L.Callback):
    """Keeps an average of all weights and buffers, which training does not see.

    After step n = 1, 2, ...: ``average += (1 - d) (weights - average)`` with
    d = min(decay, n / (n + 9)), so that the random start is soon forgotten. Statistics of norms are
    averaged too; whole numbers are copied. Checkpoints hold it as ``ema_state_dict``, with the keys of
    ``state_dict``; ``export_encoder(..., weights="ema")`` reads it.

    Args:
        decay: in [0, 1); .999 looks back about a thousand steps.

    Raises:
        ValueError: a decay out of range.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of the weight average must lie in [0, 1), not {decay}")
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts from the weights, or goes on from a checkpoint's average."""
        weights = pl_module.state_dict()
        kept = self.average or {key: value.detach().clone() for key, value in weights.items()}
        self.average = {key: kept[key].to(value.device) for key, value in weights.items()}
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Updates the average if this batch completed a step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        decay = min(self.decay, self._step / (self._step + 9))
        weights = pl_module.state_dict()
        real = [key for key, value in weights.items() if value.is_floating_point()]
        torch._foreach_lerp_(
            [self.average[key] for key in real], [weights[key] for key in real], 1 - decay
        )
        for key in weights.keys() - set(real):
            self.average[key].copy_(weights[key])

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the average."""
        checkpoint["ema_state_dict"] = self.average

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes the average over, if the run had one."""
        self.average = checkpoint.get("ema_state_dict", {})
