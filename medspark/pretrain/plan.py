"""The adaptation plan: what a checkpoint must say so that its encoder can be used elsewhere."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import medspark
from medspark.sparse._ext import load_extension

Plan = dict[str, Any]

_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "encoder": dict,
    "encoder_key": str,
    "method": str,
    "strides": list,
    "intensity": (dict, type(None)),
    "spacing": (list, type(None)),
    "crop": (list, type(None)),
    "medspark_version": str,
    "commit": str,
}


def make_plan(
    *,
    method: str,
    encoder: Mapping[str, Any],
    encoder_key: str,
    strides: list[Any],
    intensity: Mapping[str, Any] | None,
    spacing: list[float] | None,
    crop: list[int] | None,
) -> Plan:
    """A plain, JSON-safe plan.

    Args:
        method: name of the pre-training method.
        encoder: spec of the encoder, see ``medspark.models.encoder_spec``.
        encoder_key: prefix of the encoder's keys in the checkpoint's ``state_dict``, without the
            last dot.
        strides: total strides of the maps that pre-training used, fine to coarse.
        intensity: how HU became network input; the same is needed at fine-tuning.
        spacing: mm (z, y, x) of the training volumes, ``None`` for as stored.
        crop: voxels (z, y, x) of the training crops.
    """
    plan = {
        "method": method,
        "encoder": dict(encoder),
        "encoder_key": encoder_key,
        "strides": list(strides),
        "intensity": None if intensity is None else dict(intensity),
        "spacing": spacing,
        "crop": crop,
        "medspark_version": medspark.__version__,
        "commit": source_commit(),
    }
    return check_plan(json.loads(json.dumps(plan)), "this plan")


def check_plan(plan: Any, where: str) -> Plan:
    """Returns ``plan`` if it has the entries and types of a plan.

    Raises:
        ValueError: it has not; the message names ``where`` and the entry.
    """
    if not isinstance(plan, dict):
        raise ValueError(f"{where} holds no adaptation plan; was it written by medspark?")
    for key, kind in _REQUIRED.items():
        if key not in plan or not isinstance(plan[key], kind):
            raise ValueError(f"{where}: entry {key!r} of the plan is missing or of the wrong type")
    return plan


def source_commit() -> str:
    """Commit of the checkout the package runs from, else the one inside the binary, else "unknown"."""
    extension = load_extension()
    built: str = extension.build_info()["commit"] if extension else "unknown"
    root = Path(medspark.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return built
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return built
    return found.stdout.strip()
