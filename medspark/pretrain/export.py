"""From a pre-training checkpoint to weights that the public networks load."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medspark.models.encoders import encoder_from_spec
from medspark.models.weight_files import load_checkpoint
from medspark.pretrain.card import Origin, adaptation_card
from medspark.pretrain.nnunet import NETWORK_WEIGHTS, encoder_part, unet_file
from medspark.pretrain.plan import Plan, check_plan

__all__ = [
    "TARGETS",
    "card_path",
    "export_encoder",
    "load_checkpoint",
    "load_encoder",
    "load_plan",
    "plan_path",
]

TARGETS = ("encoder", "nnunet")
_Path = str | os.PathLike[str]


def export_encoder(
    checkpoint: _Path,
    out: _Path,
    weights: str = "last",
    *,
    target: str = "encoder",
    data_name: str | None = None,
    data_licence: str | None = None,
    seed: int = 0,
) -> Path:
    """Writes the encoder's weights, its plan as ``<out>.json``, its card as ``<out>.card.md``.

    Target ``"encoder"`` is a plain dict of tensors, which loads with ``strict=True`` into the
    network of ``medspark.models.create_encoder``: the public library's own class (MONAI's ResNet in
    2D or 3D, nnU-Net's residual encoder). Target ``"nnunet"`` is what nnU-Net's
    ``-pretrained_weights`` takes: the whole ``ResidualEncoderUNet`` with the trained encoder and a
    fresh decoder, since SparK's decoder is another network. Each file is written whole or not at
    all, and none before all is known to fit.

    Args:
        checkpoint: a Lightning checkpoint of pre-training.
        out: file to write.
        weights: ``"last"``, or ``"ema"`` for the average of a run with ``ema_decay``.
        target: ``"encoder"`` or ``"nnunet"``.
        data_name: what the encoder was trained on, for the card.
        data_licence: licence of that data, for the card.
        seed: of the fresh decoder.

    Returns:
        Path of the plan.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: not a medspark checkpoint, damaged, without the wanted average, weights that do
            not fit their plan, or a target that the encoder has no part in.
    """
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, not {target!r}")
    source, file = Path(checkpoint), Path(out)
    content = load_checkpoint(source)
    plan = _checkpoint_plan(content, source)
    found = _encoder_weights(content, plan, source, weights)
    encoder = _build(plan, found, source)  # proves that they fit before anything is written
    steps = content.get("global_step")
    origin = Origin(
        file=file.name,
        target=target,
        weights=weights,
        steps=steps if isinstance(steps, int) else None,
        data_name=data_name,
        data_licence=data_licence,
        seed=seed,
    )
    card = adaptation_card(plan, encoder, origin)
    kept = unet_file(encoder, plan, seed) if target == "nnunet" else found
    file.parent.mkdir(parents=True, exist_ok=True)
    _write(file, lambda path: torch.save(kept, path))
    sidecar = plan_path(file)
    _write(sidecar, lambda path: path.write_text(json.dumps(plan, indent=2) + "\n", "utf-8"))
    _write(card_path(file), lambda path: path.write_text(card, "utf-8"))
    return sidecar


def card_path(weights: _Path) -> Path:
    """Where the adaptation card of exported weights lies: ``<weights>.card.md``."""
    path = Path(weights)
    return path.with_name(path.name + ".card.md")


def plan_path(weights: _Path) -> Path:
    """Where the plan of exported weights lies: ``<weights>.json``."""
    path = Path(weights)
    return path.with_name(path.name + ".json")


def load_plan(path: _Path) -> Plan:
    """The plan of exported weights or of a pre-training checkpoint.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or no plan of medspark.
    """
    source = Path(path)
    sidecar = plan_path(source)
    return (
        _read_plan(sidecar)
        if sidecar.exists()
        else _checkpoint_plan(load_checkpoint(source), source)
    )


def load_encoder(path: _Path) -> tuple[nn.Module, Plan]:
    """Encoder with its trained weights, and its plan, from exported weights or a checkpoint.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, no file of medspark, or weights that do not fit the plan.
        ImportError: the encoder's package is missing.
    """
    source = Path(path)
    sidecar = plan_path(source)
    content = load_checkpoint(source)
    if sidecar.exists():
        plan = _read_plan(sidecar)
        inside = encoder_part(content) if NETWORK_WEIGHTS in content else content
        weights = _tensors(inside, source)
    else:
        plan = _checkpoint_plan(content, source)
        weights = _encoder_weights(content, plan, source)
    return _build(plan, weights, source), plan


def _read_plan(path: Path) -> Plan:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return check_plan(content, str(path))


def _checkpoint_plan(content: dict[str, Any], path: Path) -> Plan:
    return check_plan(content.get("plan"), str(path))


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        raise ValueError(f"{path} is not a plain dict of tensors")
    return content


def _encoder_weights(
    content: dict[str, Any], plan: Plan, path: Path, which: str = "last"
) -> dict[str, Tensor]:
    keys = {"last": "state_dict", "ema": "ema_state_dict"}
    if which not in keys:
        raise ValueError(f"weights must be one of {', '.join(keys)}, not {which!r}")
    if which == "ema" and "ema_state_dict" not in content:
        raise ValueError(
            f"{path} holds no average of weights: pre-train with trainer.ema_decay=0.999"
        )
    prefix = plan["encoder_key"] + "."
    weights = _tensors(content.get(keys[which]), path)
    found = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    if not found:
        raise ValueError(f"{path} has no weights below {prefix!r}")
    return found


def _build(plan: Plan, weights: dict[str, Tensor], path: Path) -> nn.Module:
    # Built without memory first: a plan that asks for a giant network is refused by its shapes.
    with torch.device("meta"):
        encoder = encoder_from_spec(plan["encoder"])
    try:
        encoder.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"weights in {path} do not fit {plan['encoder']}: {error}") from error
    left = [n for n, t in [*encoder.named_parameters(), *encoder.named_buffers()] if t.is_meta]
    if left:
        raise ValueError(f"{path} has no values for {', '.join(left)}")
    return encoder


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
