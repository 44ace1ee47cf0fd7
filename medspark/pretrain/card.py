"""The adaptation card: what a person must know to use exported weights elsewhere."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from medspark.models.encoders import encoder_options
from medspark.models.pyramid import Pyramid
from medspark.pretrain.nnunet import NETWORK_CLASS, NETWORK_WEIGHTS, unet_options
from medspark.pretrain.plan import Plan

_LONGEST = 300
NOT_STATED = "not stated"


@dataclass(frozen=True)
class Origin:
    """What a card says besides the plan.

    Attributes:
        file: name of the weights' file, without its folder.
        target: "encoder" or "nnunet".
        weights: "last" or "ema".
        steps: optimiser steps of the pre-training.
        data_name: what it was trained on.
        data_licence: licence of that data.
        seed: of the fresh decoder (target "nnunet").
    """

    file: str
    target: str = "encoder"
    weights: str = "last"
    steps: int | None = None
    data_name: str | None = None
    data_licence: str | None = None
    seed: int = 0


def adaptation_card(plan: Plan, encoder: nn.Module, origin: Origin) -> str:
    """A page of Markdown: origin, network, voxels, intensities, how to load, limits.

    Everything that comes from a file or a person is escaped, and names neither folders nor
    patients.

    Args:
        plan: of the checkpoint.
        encoder: with its weights.
        origin: what the plan does not know.

    Raises:
        ValueError: strides that the encoder does not have, intensities that are none, or target
            "nnunet" for another encoder than nnU-Net's.
    """
    parts = [
        f"# Adaptation card of {_text(origin.file)}",
        "For research; not a medical device. Not validated for any clinical use.",
        _table(plan, encoder, origin),
        "## Options of the encoder",
        _block("json", json.dumps(encoder_options(plan["encoder"]))),
        "## From HU to network input",
        _intensity_text(plan),
        "## Loading",
        _block("python", _encoder_code(plan, origin.file, origin.target == "nnunet")),
    ]
    if origin.target == "nnunet":
        parts += ["## In nnU-Net", _nnunet_text(plan, origin)]
    return "\n\n".join([*parts, "## Limits", _LIMITS]) + "\n"


_LIMITS = """\
- The weights hold image statistics of the data named above and of its scanners, protocols and
  populations; elsewhere they may help less, or not at all. Measure on your own validation data.
- Voxel size, window, mean and SD must be those above: hidden voxels were 0 in pre-training, so 0 has
  to mean the same HU again.
- Pre-trained weights can reveal something about their training data. Whether they may be passed on is
  for the licence of the data, and for whoever is responsible for it, to say."""


def hu_scale(intensity: dict[str, Any]) -> tuple[float, float, float, float]:
    """Low, high, shift, scale in HU: network input = (clip(HU, low, high) - shift) / scale.

    Raises:
        ValueError: the entry of the plan is not of that kind.
    """
    try:
        window = intensity["window"]
        ends = (window["low"], window["high"]) if isinstance(window, dict) else window
        low, high = (float(end) for end in ends)
        mean, std = float(intensity["mean"]), float(intensity["std"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the plan's intensities are not window, mean and SD: {error}") from error
    shift, scale = low + mean * (high - low), (high - low) * std
    if not (math.isfinite(shift) and math.isfinite(scale) and low < high and std > 0):
        raise ValueError(f"the plan's window {low}..{high}, mean {mean}, SD {std} make no sense")
    return low, high, shift, scale


def _table(plan: Plan, encoder: nn.Module, origin: Origin) -> str:
    kernel = next(p for p in encoder.parameters() if p.ndim > 2)
    axes = "(z, y, x)" if kernel.ndim == 5 else "(y, x)"
    pyramid = Pyramid(encoder, int(kernel.shape[1]), plan["strides"] or None)
    maps = ", ".join(
        f"{'x'.join(map(str, stride))}: {channels}"
        for stride, channels in zip(pyramid.strides, pyramid.channels, strict=True)
    )
    which = "average over the last steps (ema)" if origin.weights == "ema" else "last step"
    network = f"{type(encoder).__module__}.{type(encoder).__qualname__}"
    rows = {
        "method": _text(plan["method"]),
        "steps": f"{_number(origin.steps)}; weights: {which}",
        "network": f"`{network}`, here `create_encoder({plan['encoder']['name']!r}, ...)`",
        "input channels": str(int(kernel.shape[1])),
        f"maps, total stride {axes}: channels": maps,
        "voxel size in mm (z, y, x)": _numbers(plan["spacing"]),
        f"crop in voxels {axes}": _numbers(plan["crop"]),
        "trained on": _text(origin.data_name),
        "licence of that data": _text(origin.data_licence),
        "medspark": f"{_text(plan['medspark_version'])}, commit {_text(plan['commit'])}",
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join(["| entry | value |", "|---|---|", *lines])


def _intensity_text(plan: Plan) -> str:
    if plan["intensity"] is None:
        return f"Intensities: {NOT_STATED}."
    low, high, shift, scale = hu_scale(plan["intensity"])
    mean, std = float(plan["intensity"]["mean"]), float(plan["intensity"]["std"])
    formula = f"x = (min(max(hu, {low:.10g}), {high:.10g}) - ({shift:.10g})) / {scale:.10g}"
    return (
        f"Window {low:.10g}..{high:.10g} HU, scaled to 0..1; mean {mean:.10g}, SD {std:.10g} of "
        f"that scale. The same in one step:\n\n{_block('python', formula)}\n\n"
        f"Network input 0 is {shift:.10g} HU. These numbers are fixed, never taken from an image."
    )


def _encoder_code(plan: Plan, file: str, inside: bool) -> str:
    name, kwargs = plan["encoder"]["name"], plan["encoder"].get("kwargs", {})
    options = "".join(f", {key}={value!r}" for key, value in kwargs.items())
    lines = [
        "import torch",
        "from medspark.models import create_encoder",
        "",
        f"encoder = create_encoder({name!r}{options})",
        f"weights = torch.load({file!r}, weights_only=True)",
    ]
    if inside:
        lines += [
            f"network = weights[{NETWORK_WEIGHTS!r}]",
            'weights = {k[8:]: v for k, v in network.items() if k.startswith("encoder.")}',
        ]
    return "\n".join([*lines, "encoder.load_state_dict(weights, strict=True)"])


def nnunet_plans(plan: Plan) -> dict[str, Any]:
    """What nnU-Net's plans file must say for the weights to fit and to see what they know.

    nnU-Net's CTNormalization clips to two percentiles, subtracts a mean and divides by an SD, all
    read from the plans: with the window and the HU numbers of ``hu_scale`` there, it computes the
    network input of the pre-training.

    Raises:
        ValueError: see ``unet_options`` and ``hu_scale``.
    """
    configuration: dict[str, Any] = {
        "spacing": plan["spacing"],
        "patch_size": plan["crop"],
        "architecture": {
            "network_class_name": NETWORK_CLASS,
            "arch_kwargs": unet_options(plan),
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    found = {"configurations": {"3d_fullres": configuration}}
    if plan["intensity"] is not None:
        low, high, shift, scale = hu_scale(plan["intensity"])
        numbers = {"percentile_00_5": low, "percentile_99_5": high, "mean": shift, "std": scale}
        configuration["normalization_schemes"] = ["CTNormalization"]
        configuration["use_mask_for_norm"] = [False]
        found["foreground_intensity_properties_per_channel"] = {"0": numbers}
    return found


def _nnunet_text(plan: Plan, origin: Origin) -> str:
    return "\n\n".join(
        [
            "The file holds every key of the network below. Its encoder is trained; its decoder is "
            f"fresh (nnU-Net's initialisation, seed {origin.seed}), and nnU-Net replaces the "
            "segmentation layers by its own. Set these entries in the plans file before "
            "preprocessing; `null` was not stated by the pre-training. Axes are (z, y, x), which "
            "is nnU-Net's order where `transpose_forward` is `[0, 1, 2]`; each side of the patch "
            "must be a multiple of the largest total stride.",
            _block("json", json.dumps(nnunet_plans(plan), indent=1)),
            "Then preprocess and train with them:",
            _block(
                "bash",
                "nnUNetv2_preprocess -d DATASET -plans_name PLANS -c 3d_fullres\n"
                "nnUNetv2_train DATASET 3d_fullres FOLD -p PLANS -pretrained_weights FILE",
            ),
        ]
    )


def _text(value: Any) -> str:
    """One line without control characters and without markup; "not stated" for nothing."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(value or "")).split())
    return re.sub(r"([\\`*_\[\]<>|#~&!])", r"\\\1", line[:_LONGEST]) or NOT_STATED


def _number(value: float | None) -> str:
    return NOT_STATED if value is None else f"{value:.10g}"


def _numbers(values: list[Any] | None) -> str:
    if values is None:
        return NOT_STATED
    return _text(" x ".join(f"{v:.10g}" if isinstance(v, int | float) else str(v) for v in values))


def _block(kind: str, text: str) -> str:
    return f"```{kind}\n{text}\n```"
