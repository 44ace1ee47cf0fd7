"""Classifier on top of any encoder, as a linear probe or fine-tuned as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from medspark.finetune.layers import layer_groups
from medspark.finetune.metrics import classification_metrics
from medspark.finetune.settings import opening_epoch
from medspark.models.pyramid import Pyramid

MODES = ("linear", "full", "freeze_then_open")  # of those in `settings`, what is trained
_WARMUP = 0.05  # part of all steps; the fresh head would else shake a pre-trained encoder
Batch = tuple[Tensor, Tensor, Tensor]


class ClassifierModule(L.LightningModule):
    """Encoder, global average over its coarsest map, dropout, linear head; AdamW, cosine.

    The coarsest map is found by tracing strides (`Pyramid`), not by replacing a classification
    layer: so the encoder stays as it is, keys included, and any network with strides will do. A
    classification layer of its own, where it has one, runs idle.

    In mode "linear" the encoder is frozen and stays in eval mode, so neither its weights nor its
    batch norm statistics move. In mode "full" everything trains. Mode "freeze_then_open" is the
    first up to an epoch and the second from there on, at the rates and with the schedule of a
    "full" run over the epochs that are left.

    Args:
        encoder: network on [B, 1, D, H, W] or [B, 1, H, W].
        n_classes: outputs of the head, at least 2.
        mode: one of `MODES`.
        lr: peak learning rate of the head.
        encoder_lr_scale: the encoder learns at `lr` times this.
        layer_decay: see `medspark.finetune.layers`.
        open_at: see `Settings.open_at`.
        weight_decay: of AdamW; biases and normalisation weights have none.
        dropout: on the pooled features.
        class_weights: factor on the loss of each class, None for 1. They also weigh `val/loss`.
        label_smoothing: share of the target spread over all classes, in training only.

    Attributes:
        frozen: whether the encoder is frozen at the moment.
        feature_mean, feature_sd: [C], what pooled features are standardised by; 0 and 1 (no change)
            until set.

    Raises:
        ValueError: an unknown mode, fewer than two classes, or an encoder without a strided map.
    """

    feature_mean: Tensor
    feature_sd: Tensor
    class_weights: Tensor | None

    def __init__(
        self,
        encoder: nn.Module,
        n_classes: int,
        *,
        mode: str = "full",
        lr: float = 1e-3,
        encoder_lr_scale: float = 1.0,
        layer_decay: float = 1.0,
        open_at: float = 0.15,
        weight_decay: float = 0.01,
        dropout: float = 0.0,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
        if n_classes < 2:
            raise ValueError(f"a classifier needs at least two classes, got {n_classes}")
        self.mode, self.lr, self.weight_decay = mode, lr, weight_decay
        self.encoder_lr_scale, self.layer_decay, self.open_at = (
            encoder_lr_scale,
            layer_decay,
            open_at,
        )
        self.label_smoothing = label_smoothing
        self.pyramid = Pyramid(encoder, strides=None)
        channels = self.pyramid.channels[-1]
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, n_classes)
        self.register_buffer("feature_mean", torch.zeros(channels))
        self.register_buffer("feature_sd", torch.ones(channels))
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        self._validated: list[tuple[Tensor, Tensor]] = []
        self.frozen = mode != "full"
        self.pyramid.requires_grad_(not self.frozen)
        self.train()

    def train(self, mode: bool = True) -> ClassifierModule:
        """As in torch, but a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.pyramid.eval()
        return self

    def open(self) -> None:
        """Lets the encoder train from now on."""
        self.frozen = False
        self.pyramid.requires_grad_(True)
        self.train(self.training)

    def features(self, x: Tensor) -> Tensor:
        """Samples [B, 1, (D,) H, W] to pooled features [B, C] of the coarsest map."""
        with torch.set_grad_enabled(not self.frozen and torch.is_grad_enabled()):
            top: Tensor = self.pyramid(x)[-1]
            return top.flatten(2).mean(dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised samples [B, 1, (D,) H, W], or pooled features [B, C], to logits [B, n_classes]."""
        pooled = x if x.ndim == 2 else self.features(x)
        standard = (pooled - self.feature_mean) / self.feature_sd
        logits: Tensor = self.head(self.dropout(standard))
        return logits

    def on_train_epoch_start(self) -> None:
        """Opens the encoder when it is time."""
        if self.mode == "freeze_then_open" and self.frozen:
            epochs = self.trainer.max_epochs or 0
            if self.trainer.current_epoch >= opening_epoch(self.open_at, epochs):
                self.open()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy of a batch (x, label, index).

        Raises:
            FloatingPointError: it is NaN or infinite.
        """
        x, label, _ = batch
        loss = nn.functional.cross_entropy(
            self(x), label, weight=self.class_weights, label_smoothing=self.label_smoothing
        )
        self._check_finite(loss, "training")
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(x))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keeps the logits: loss and AUC are those of the whole split."""
        x, label, _ = batch
        self._validated.append((self(x).float(), label))

    def on_validation_epoch_end(self) -> None:
        """Logs `val/loss` and `val/auc`, by which the checkpoint is chosen.

        Raises:
            FloatingPointError: the loss is NaN or infinite.
        """
        logits, labels = (torch.cat(parts) for parts in zip(*self._validated, strict=True))
        self._validated.clear()
        loss = nn.functional.cross_entropy(logits, labels, weight=self.class_weights)
        self._check_finite(loss, "validation")
        metrics = classification_metrics(logits.softmax(dim=1).cpu(), labels.cpu())
        self.log("val/loss", loss, prog_bar=True)
        self.log("val/auc", metrics["auc"])

    def _check_finite(self, loss: Tensor, kind: str) -> None:
        if torch.isfinite(loss):
            return
        raise FloatingPointError(
            f"the {kind} loss is {loss.item()} in epoch {self.current_epoch}, step "
            f"{self.global_step}: the training has diverged; lower lr (now {self.lr:g}), or use "
            "precision=32-true if it is another"
        )

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Probabilities [B, n_classes], labels [B] and dataset indices [B]."""
        x, label, index = batch
        return self(x).float().softmax(dim=1), label, index

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Head and stages of the encoder, see `layer_groups`; of a linear probe the head alone."""
        return layer_groups(
            self.pyramid,
            self.head,
            lr=self.lr,
            encoder_lr_scale=self.encoder_lr_scale,
            layer_decay=self.layer_decay,
            weight_decay=self.weight_decay,
            head_only=self.mode == "linear",
        )

    def configure_optimizers(self) -> Any:
        """AdamW with a short linear warm-up and a cosine to zero over all steps.

        The encoder is in it from the start, also where it opens later: with a rate of 0 and without
        gradients, so that AdamW passes it over.
        """
        groups = self.parameter_groups()
        optimizer = torch.optim.AdamW(groups)
        total = max(1, int(self.trainer.estimated_stepping_batches))
        opening = 0
        if self.mode == "freeze_then_open":
            epochs = self.trainer.max_epochs or 0
            opening = total * opening_epoch(self.open_at, epochs) // epochs
        scales = [_schedule(group["name"] == "head", opening, total) for group in groups]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scales)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _schedule(head: bool, opening: int, total: int) -> Callable[[int], float]:
    """Part of the peak rate by step.

    Before `opening` the head warms up and stays at its peak, and the encoder has a rate of 0. The
    rest is a run of its own, warm-up included: the encoder has no moments yet.
    """

    def scale(step: int) -> float:
        if step >= opening:
            return lr_scale(step - opening, total - opening)
        return min(1.0, (step + 1) / max(1, round(_WARMUP * opening))) if head else 0.0

    return scale


def lr_scale(step: int, total: int) -> float:
    """Part of the peak learning rate at `step` (from 0) of `total`: linear warm-up, then cosine."""
    warmup = max(1, round(_WARMUP * total))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
