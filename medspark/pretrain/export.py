"""From a pre-training checkpoint to a plain ``state_dict`` that the public network loads."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medspark.models.encoders import encoder_from_spec
from medspark.pretrain.plan import Plan, check_plan

_Path = str | os.PathLike[str]


def export_encoder(checkpoint: _Path, out: _Path, weights: str = "last") -> Path:
    """Writes the encoder's weights as a plain dict of tensors, its plan as ``<out>.json``.

    The dict loads with ``strict=True`` into the network of ``medspark.models.create_encoder``,
    which is the public library's own class (MONAI's ResNet). Both files are written whole or not at
    all.

    Args:
        checkpoint: a Lightning checkpoint of pre-training.
        out: file to write.
        weights: ``"last"``, or ``"ema"`` for the average of a run with ``ema_decay``.

    Returns:
        Path of the plan.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: not a medspark checkpoint, damaged, without the wanted average, or weights that do
            not fit their plan.
    """
    source, target = Path(checkpoint), Path(out)
    content = load_checkpoint(source)
    plan = _checkpoint_plan(content, source)
    found = _encoder_weights(content, plan, source, weights)
    _build(plan, found, source)  # proves that they fit before anything is written
    target.parent.mkdir(parents=True, exist_ok=True)
    _write(target, lambda path: torch.save(found, path))
    sidecar = plan_path(target)
    _write(sidecar, lambda path: path.write_text(json.dumps(plan, indent=2) + "\n", "utf-8"))
    return sidecar


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
        plan, weights = _read_plan(sidecar), _tensors(content, source)
    else:
        plan = _checkpoint_plan(content, source)
        weights = _encoder_weights(content, plan, source)
    return _build(plan, weights, source), plan


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Content of a checkpoint file, read without running any code of it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or it holds more than tensors and plain values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can raise anything
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is damaged, or holds more than tensors and "
            f"plain values ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


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
