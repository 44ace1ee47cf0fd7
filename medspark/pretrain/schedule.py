"""Per-step schedules and parameter groups of pre-training (official SparK recipe)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

OPTIM_DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": [0.9, 0.95],
    "weight_decay": 0.04,
    "weight_decay_end": None,
    "warmup_steps": 0,
    "warmup_start": 0.005,
    "lr_end": 0.001,
}


def optim_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Optimiser options with defaults filled in; ``max_steps`` has none.

    Raises:
        ValueError: unknown or missing option, or a warm-up longer than the run.
    """
    unknown = sorted(set(options) - set(OPTIM_DEFAULTS) - {"max_steps"})
    if unknown or "max_steps" not in options:
        raise ValueError(
            f"optim takes max_steps (required), {', '.join(OPTIM_DEFAULTS)}; "
            + (f"unknown: {', '.join(unknown)}" if unknown else "max_steps is missing")
        )
    full = {**OPTIM_DEFAULTS, **options}
    if not 0 <= full["warmup_steps"] <= full["max_steps"]:
        raise ValueError(
            f"warmup_steps {full['warmup_steps']} must lie between 0 and "
            f"max_steps {full['max_steps']}"
        )
    return full


def lr_factor(
    step: int, max_steps: int, warmup_steps: int, warmup_start: float, lr_end: float
) -> float:
    """Learning rate at ``step`` relative to its peak: linear warm-up, then cosine to ``lr_end``."""
    if step < warmup_steps:
        return warmup_start + (1 - warmup_start) * step / warmup_steps
    return lr_end + (1 - lr_end) * cosine(
        (step - warmup_steps) / max(max_steps - 1 - warmup_steps, 1)
    )


def cosine(progress: float) -> float:
    """Half a cosine from 1 (progress 0) to 0 (progress 1 and beyond)."""
    return 0.5 + 0.5 * math.cos(math.pi * min(max(progress, 0.0), 1.0))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights with decay; biases, 1-D parameters and mask tokens without."""
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim <= 1 or name.endswith("bias") or "mask_token" in name
        (rest if plain else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
