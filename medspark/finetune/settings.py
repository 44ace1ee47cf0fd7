"""What decides the numbers of a fine-tuning run, checked before anything is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

MODES = ("linear", "knn", "full", "freeze_then_open")
MONITORS = ("loss", "auc", "last")
SPLITS = ("train", "val", "test")
# A linear head bears larger steps; kNN takes none.
_DEFAULT_LR = {"linear": 1e-2, "knn": 0.0, "full": 1e-3, "freeze_then_open": 1e-3}


@dataclass(frozen=True)
class Settings:
    """Settings of one run. The same settings and seed give the same numbers on a CPU.

    Attributes:
        mode: "linear": linear head on a frozen encoder. "knn": nearest neighbours of frozen
            features, nothing is trained. "full": everything trains. "freeze_then_open": the head
            alone for `open_at`, then a "full" run over the remaining epochs.
        size: voxels, (d, h, w) or (h, w), that samples are resampled to; None keeps theirs.
        epochs: passes over the training split.
        batch_size: samples per step, cut to the size of the training split.
        lr: peak learning rate of the head; None takes 1e-2 for a linear probe, else 1e-3.
        encoder_lr_scale: the encoder's peak is `lr` times this.
        layer_decay: each stage of the encoder learns at this times the rate of the one above it;
            1 is off. See `medspark.finetune.layers`.
        open_at: when "freeze_then_open" opens the encoder: below 1 a share of the epochs, from 1
            a number of epochs.
        weight_decay: of AdamW; biases and normalisation weights have none.
        dropout: on the pooled features.
        augment: random changes of the training samples: True or "light", "strong", False or "none",
            see `medspark.data.augment`.
        standardise: features minus the training split's mean, over its SD ("linear", "knn"). None
            does so for "knn" only: there it raised the AUC on both real tasks it was tried on; for
            a linear layer it made no clear difference.
        class_weights: factor on the loss (in "knn" on the votes) of each class; "balanced" is
            n / (classes x n of the class) in the training split; None is 1.
        label_smoothing: share of the target that is spread over all classes in training.
        monitor: what the validation split chooses by, "loss" or "auc". The AUC of a small split
            moves in steps of 1 / (positives x negatives) and does not see overconfidence; the loss
            uses every probability, so it is the default. "last" chooses nothing and keeps the last
            epoch: with very few labels all of them can train, and no validation split is needed.
        patience: epochs without a better validation before training stops; None is off. The
            epochs before the encoder opens do not count.
        seed: of the head, the order, the augmentation and the weights from scratch.
        precision: of Lightning, "32-true", "bf16-mixed" and so on.
    """

    mode: str = "full"
    size: Sequence[int] | None = None
    epochs: int = 20
    batch_size: int = 16
    lr: float | None = None
    encoder_lr_scale: float = 1.0
    layer_decay: float = 1.0
    open_at: float = 0.15
    weight_decay: float = 0.01
    dropout: float = 0.0
    augment: bool | str = True
    standardise: bool | None = None
    class_weights: str | Sequence[float] | None = None
    label_smoothing: float = 0.0
    monitor: str = "loss"
    patience: int | None = None
    seed: int = 0
    precision: Any = "32-true"

    def __post_init__(self) -> None:
        """Raise ValueError for an impossible setting."""
        _one_of("mode", self.mode, MODES)
        _one_of("monitor", self.monitor, MONITORS)
        if isinstance(self.class_weights, str):
            _one_of("class_weights", self.class_weights, ("balanced",))
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(
                f"epochs and batch_size must be at least 1, got {self.epochs} and {self.batch_size}"
            )
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}, it must be at least 1, or null for off")
        if self.monitor == "last" and (self.patience is not None or self.mode == "knn"):
            raise ValueError(
                "monitor=last looks at no validation split, so there is nothing to stop early by "
                "(patience) and nothing to choose the number of neighbours by (mode=knn)"
            )
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}, it must lie in (0, 1]")
        if not (0 <= self.label_smoothing < 1 and 0 <= self.dropout < 1):
            raise ValueError(
                f"label_smoothing {self.label_smoothing} and dropout {self.dropout} must lie in "
                "[0, 1)"
            )
        if self.mode == "freeze_then_open":
            opening_epoch(self.open_at, self.epochs)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of a task that a run reads."""
        return tuple(s for s in SPLITS if s != "val" or self.monitor != "last")

    @property
    def peak_lr(self) -> float:
        """`lr`, or the mode's own."""
        return _DEFAULT_LR[self.mode] if self.lr is None else self.lr

    @property
    def frozen(self) -> bool:
        """Whether the encoder never changes."""
        return self.mode in ("linear", "knn")

    @property
    def standardises(self) -> bool:
        """Whether features are standardised."""
        chosen = self.mode == "knn" if self.standardise is None else self.standardise
        return self.frozen and chosen

    @property
    def augments(self) -> bool:
        """Whether the training samples change from epoch to epoch."""
        return self.augment not in (False, "none")

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        found = asdict(self)
        for key in ("size", "class_weights"):
            if found[key] is not None and not isinstance(found[key], str):
                found[key] = list(found[key])
        return found


def opening_epoch(open_at: float, epochs: int) -> int:
    """The epoch, from 0, at whose start "freeze_then_open" opens the encoder.

    Raises:
        ValueError: no epoch would be left before or after it.
    """
    epoch = max(1, round(open_at * epochs)) if open_at < 1 else int(open_at)
    if not math.isfinite(open_at) or open_at <= 0 or not 1 <= epoch < epochs:
        raise ValueError(
            f"open_at={open_at} with {epochs} epochs leaves no epoch with the encoder frozen, or "
            "none with it open: give a share below 1 or a number of epochs below epochs"
        )
    return epoch


def balanced_weights(labels: Sequence[int], n_classes: int) -> list[float]:
    """Samples / (classes x samples of the class); 1 for a class without a sample, which weighs nothing."""
    counts = [sum(label == c for label in labels) for c in range(n_classes)]
    return [len(labels) / (n_classes * count) if count else 1.0 for count in counts]


def loss_weights(settings: Settings, labels: Sequence[int], n_classes: int) -> list[float] | None:
    """The weight of each class, None for all equal.

    Args:
        settings: with `class_weights`.
        labels: of the training split.
        n_classes: of the task.

    Raises:
        ValueError: not one positive number for each class.
    """
    weights = settings.class_weights
    if weights is None:
        return None
    if isinstance(weights, str):
        return balanced_weights(labels, n_classes)
    if len(weights) != n_classes or not all(math.isfinite(w) and w > 0 for w in weights):
        raise ValueError(
            f"class_weights {list(weights)} must be {n_classes} positive numbers, one for each class"
        )
    return [float(w) for w in weights]


def _one_of(name: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
