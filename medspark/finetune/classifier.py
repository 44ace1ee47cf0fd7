"""The classifier as a file that explains itself: weights and a plan, usable without the task."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

import medspark
from medspark.finetune.knn import NearestNeighbours
from medspark.finetune.module import ClassifierModule
from medspark.models.encoders import encoder_from_spec
from medspark.models.weight_files import load_checkpoint

FORMAT = {"format": "medspark-classifier", "version": 1}
_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "encoder": (dict, type(None)),
    "mode": str,
    "class_names": list,
    "intensity": dict,
    "grey": bool,
    "dims": int,
    "size": list,
    "spacing": (list, type(None)),
    "patch_mm": (list, type(None)),
    "patch_mm_low": (list, type(None)),
    "patch_mm_high": (list, type(None)),
    "knn": (dict, type(None)),
}


def make_plan(
    *,
    encoder: Mapping[str, Any] | None,
    mode: str,
    class_names: list[str],
    intensity: Mapping[str, Any],
    grey: bool,
    dims: int,
    geometry: Mapping[str, Any],
    knn: Mapping[str, Any] | None = None,
    pretrained: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A plain, JSON-safe plan of a classifier. It names no patient and no file of the task.

    Args:
        encoder: spec of the network; None where it is not known, such a file cannot be predicted
            with.
        mode: how it was trained.
        class_names: in the order of the outputs.
        intensity: how HU or grey values became network input.
        grey: whether samples are grey values, not HU.
        dims: 3 for volumes, 2 for images.
        geometry: `size` in voxels, `spacing`, `patch_mm` and its range; see `TaskData.geometry`.
        knn: `k`, `temperature`, `references` of mode "knn".
        pretrained: plan of the pre-training; None from scratch.
    """
    about = None
    if pretrained is not None:
        about = {
            k: v for k, v in pretrained.items() if k in ("method", "spacing", "crop", "commit")
        }
        about["medspark_version"] = pretrained.get("medspark_version")
    plan = {
        **FORMAT,
        "encoder": None if encoder is None else dict(encoder),
        "encoder_key": "pyramid.encoder",
        "mode": mode,
        "class_names": list(class_names),
        "intensity": dict(intensity),
        "grey": grey,
        "dims": dims,
        **geometry,
        "knn": None if knn is None else dict(knn),
        "pretrained": about,
        "versions": {"medspark": medspark.__version__, "torch": str(torch.__version__)},
    }
    return check_plan(json.loads(json.dumps(plan)), "this plan")


def check_plan(plan: Any, where: str) -> dict[str, Any]:
    """Returns `plan` if it is one of a classifier.

    Raises:
        ValueError: it is not; the message names `where` and the entry.
    """
    if not isinstance(plan, dict) or plan.get("format") != FORMAT["format"]:
        raise ValueError(
            f"{where} holds no classifier of `medspark finetune` (best.ckpt in the folder of a seed)"
        )
    if plan.get("version") != FORMAT["version"]:
        raise ValueError(
            f"{where} is of version {plan.get('version')}, this medspark reads version 1"
        )
    for key, kind in _REQUIRED.items():
        if key not in plan or not isinstance(plan[key], kind):
            raise ValueError(f"{where}: entry {key!r} of the plan is missing or of the wrong type")
    return plan


@dataclass(frozen=True)
class Classifier:
    """A trained classifier, ready to predict.

    Attributes:
        network: in eval mode.
        plan: see `make_plan`.
    """

    network: L.LightningModule
    plan: dict[str, Any]

    def probabilities(self, x: Tensor) -> Tensor:
        """Probabilities float32 [B, n_classes] of normalised samples [B, 1, (D,) H, W]."""
        with torch.inference_mode():
            logits: Tensor = self.network(x)
            return logits.float().softmax(dim=1)


def save_classifier(path: Path, network: nn.Module, plan: Mapping[str, Any]) -> Path:
    """Writes `state_dict` and `plan`, loadable with weights_only=True, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    state = {k: v.detach().cpu().clone() for k, v in network.state_dict().items()}
    try:
        torch.save({"state_dict": state, "plan": dict(plan)}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def load_classifier(path: str | os.PathLike[str]) -> Classifier:
    """Reads a classifier; runs no code of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, no classifier, one whose network is not known, or weights that do not
            fit their plan.
        ImportError: the encoder's package is missing.
    """
    source = Path(path)
    content = load_checkpoint(source)
    plan = check_plan(content.get("plan"), str(source))
    network = _build(plan, source)
    try:
        network.load_state_dict(content["state_dict"], strict=True)
    except (RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"weights in {source} do not fit {plan['encoder']}: {error}") from error
    return Classifier(network.eval(), plan)


def _build(plan: dict[str, Any], source: Path) -> L.LightningModule:
    if plan["encoder"] is None:
        raise ValueError(
            f"{source} does not say which network it holds: it was trained from Python with an "
            "encoder and without its spec (scratch=...)"
        )
    encoder, n_classes = encoder_from_spec(plan["encoder"]), len(plan["class_names"])
    if plan["mode"] != "knn":
        return ClassifierModule(encoder, n_classes)
    knn = plan["knn"]
    try:
        k, temperature, count = int(knn["k"]), float(knn["temperature"]), int(knn["references"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: entry 'knn' of the plan is damaged: {error}") from error
    if not (1 <= k <= count <= 10_000_000 and temperature > 0):
        raise ValueError(f"{source}: entry 'knn' of the plan is out of range: {knn}")
    return NearestNeighbours(encoder, n_classes, count, k, temperature)


def fitting_spec(encoder: nn.Module, spec: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The spec, if it describes this network: same names and shapes of weights; else None."""
    if spec is None:
        return None
    with torch.device("meta"):
        built = encoder_from_spec(spec)
    same = {k: v.shape for k, v in built.state_dict().items()}
    found = {k: v.shape for k, v in encoder.state_dict().items()}
    return dict(spec) if same == found else None
