"""Optimiser, per-step schedules and parameter groups of pre-training (official SparK recipe)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from medspark.pretrain.lamb import Lamb

OPTIM_DEFAULTS: dict[str, Any] = {
    "name": "adamw",
    "lr": 1e-3,
    "lr_batch": None,
    "betas": [0.9, 0.95],
    "weight_decay": 0.04,
    "weight_decay_end": None,
    "warmup_steps": 0,
    "warmup_start": 0.005,
    "lr_end": 0.001,
    "gradient_clip": 0.0,
    "drop_path": 0.0,
}
OPTIMIZERS = ("adamw", "lamb")


def optim_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Optimiser options with defaults filled in; ``max_steps`` has none.

    ``lr_batch`` is the batch that ``lr`` is meant for: the peak is lr x batch / lr_batch, where the
    batch is that of a step, over all processes and accumulated parts. ``None``: the peak is ``lr``.

    Raises:
        ValueError: unknown or missing option, or a value out of range.
    """
    unknown = sorted(set(options) - set(OPTIM_DEFAULTS) - {"max_steps"})
    if unknown or "max_steps" not in options:
        raise ValueError(
            f"optim takes max_steps (required), {', '.join(OPTIM_DEFAULTS)}; "
            + (f"unknown: {', '.join(unknown)}" if unknown else "max_steps is missing")
        )
    full = {**OPTIM_DEFAULTS, **options}
    if full["name"] not in OPTIMIZERS:
        raise ValueError(f"no optimiser {full['name']!r}; there are {', '.join(OPTIMIZERS)}")
    if not 0 <= full["warmup_steps"] <= full["max_steps"]:
        raise ValueError(
            f"warmup_steps {full['warmup_steps']} must lie between 0 and "
            f"max_steps {full['max_steps']}"
        )
    if not 0 <= full["drop_path"] < 1 or full["gradient_clip"] < 0:
        raise ValueError(
            f"drop_path {full['drop_path']} must lie in [0, 1) and gradient_clip "
            f"{full['gradient_clip']} must not be negative"
        )
    return full


def build_optimizer(model: nn.Module, options: Mapping[str, Any]) -> torch.optim.Optimizer:
    """AdamW or LAMB on ``parameter_groups(model)``; LAMB clips gradients by itself."""
    groups = parameter_groups(model, options["weight_decay"])
    lr, betas = options["lr"], (options["betas"][0], options["betas"][1])
    if options["name"] == "lamb":
        return Lamb(groups, lr=lr, betas=betas, max_grad_norm=options["gradient_clip"])
    return torch.optim.AdamW(groups, lr=lr, betas=betas)


def set_step(
    optimizer: torch.optim.Optimizer, step: int, options: Mapping[str, Any], batch: int
) -> None:
    """Sets learning rate and weight decay of ``step``, which counts from 0.

    They are functions of the step alone, so a resumed run has no schedule to restore.

    Args:
        optimizer: with groups of ``parameter_groups``.
        step: optimiser steps done.
        options: of ``optim_options``.
        batch: samples per step, over all processes and accumulated parts.
    """
    o = options
    scale = 1.0 if o["lr_batch"] is None else batch / o["lr_batch"]
    factor = lr_factor(step, o["max_steps"], o["warmup_steps"], o["warmup_start"], o["lr_end"])
    decay, end = o["weight_decay"], o["weight_decay_end"]
    if end is not None:
        decay = end + (decay - end) * cosine(step / max(o["max_steps"] - 1, 1))
    for group in optimizer.param_groups:
        group["lr"] = o["lr"] * scale * factor
        group["weight_decay"] = decay if group["decays"] else 0.0


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
    """Two groups: weights with decay; norms, biases, 1-D parameters and tokens without.

    ``decays`` tells them apart, whatever the decay of the moment is.
    """
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        plain = parameter.ndim <= 1 or name.endswith("bias") or "token" in name
        (rest if plain else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay, "decays": True},
        {"params": rest, "weight_decay": 0.0, "decays": False},
    ]
