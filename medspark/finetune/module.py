"""Classifier on top of any encoder, as a linear probe or fine-tuned as a whole."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from medspark.models.pyramid import Pyramid

MODES = ("linear", "full")
_WARMUP = 0.05  # part of all steps; the fresh head would else shake a pre-trained encoder


class ClassifierModule(L.LightningModule):
    """Encoder, global average over its coarsest map, dropout, linear head; AdamW, cosine.

    The coarsest map is found by tracing strides (`Pyramid`), not by replacing a classification
    layer: so the encoder stays as it is, keys included, and any network with strides will do. A
    classification layer of its own, where it has one, runs idle.

    In mode "linear" the encoder is frozen and stays in eval mode, so neither its weights nor its
    batch norm statistics move. In mode "full" everything trains.

    Args:
        encoder: network on [B, 1, D, H, W].
        n_classes: outputs of the head, at least 2.
        mode: "linear" or "full".
        lr: peak learning rate of the head.
        encoder_lr_scale: the encoder learns at `lr` times this (mode "full").
        weight_decay: of AdamW; biases and normalisation weights have none.
        dropout: on the pooled features.

    Raises:
        ValueError: an unknown mode, fewer than two classes, or an encoder without a strided map.
    """

    def __init__(
        self,
        encoder: nn.Module,
        n_classes: int,
        *,
        mode: str = "full",
        lr: float = 1e-3,
        encoder_lr_scale: float = 1.0,
        weight_decay: float = 0.01,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
        if n_classes < 2:
            raise ValueError(f"a classifier needs at least two classes, got {n_classes}")
        self.mode, self.lr, self.weight_decay = mode, lr, weight_decay
        self.encoder_lr_scale = encoder_lr_scale
        self.pyramid = Pyramid(encoder, strides=None)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.pyramid.channels[-1], n_classes)
        if mode == "linear":
            self.pyramid.requires_grad_(False)
            self.pyramid.eval()

    def train(self, mode: bool = True) -> ClassifierModule:
        """As in torch, but the encoder of a linear probe stays in eval mode."""
        super().train(mode)
        if self.mode == "linear":
            self.pyramid.eval()
        return self

    def features(self, x: Tensor) -> Tensor:
        """Volumes [B, 1, D, H, W] to pooled features [B, C] of the coarsest map."""
        with torch.set_grad_enabled(self.mode == "full" and torch.is_grad_enabled()):
            top: Tensor = self.pyramid(x)[-1]
            return top.flatten(2).mean(dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """Volumes [B, 1, D, H, W], normalised as in pre-training, to logits [B, n_classes]."""
        logits: Tensor = self.head(self.dropout(self.features(x)))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of a batch (x, label, index)."""
        x, label, _ = batch
        loss = nn.functional.cross_entropy(self(x), label)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(x))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Logs `val/loss`, the mean over the split, by which the checkpoint is chosen."""
        x, label, _ = batch
        loss = nn.functional.cross_entropy(self(x), label)
        self.log("val/loss", loss, prog_bar=True, batch_size=len(x))

    def predict_step(
        self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities [B, n_classes], labels [B] and dataset indices [B]."""
        x, label, index = batch
        return self(x).float().softmax(dim=1), label, index

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Head and encoder, each split into weights that decay and vectors that do not."""
        return [
            *_groups(self.head, self.lr, self.weight_decay),
            *_groups(self.pyramid, self.lr * self.encoder_lr_scale, self.weight_decay),
        ]

    def configure_optimizers(self) -> Any:
        """AdamW with a short linear warm-up and a cosine to zero over all steps."""
        optimizer = torch.optim.AdamW(self.parameter_groups())
        total = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_scale(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def lr_scale(step: int, total: int) -> float:
    """Part of the peak learning rate at `step` (from 0) of `total`: linear warm-up, then cosine."""
    warmup = max(1, round(_WARMUP * total))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _groups(module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    trained = [p for p in module.parameters() if p.requires_grad]
    parts = [
        ([p for p in trained if p.ndim > 1], weight_decay),
        ([p for p in trained if p.ndim <= 1], 0.0),
    ]
    return [{"params": params, "lr": lr, "weight_decay": wd} for params, wd in parts if params]
