"""Learning rates by depth: which stage of an encoder a parameter belongs to, and its share.

Layer-wise decay multiplies the rate of each stage by `layer_decay` relative to the stage above it
(Clark et al., ELECTRA, arXiv 2003.10555; Bao et al., BEiT, arXiv 2106.08254): early layers, which
hold the most general features, move least.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import nn

from medspark.models.pyramid import Pyramid, spatial_dims

# Shapes only where every op knows the meta device, else one small volume.
_TRACE_INPUTS = (("meta", 512), ("cpu", 64))


def parameter_stages(pyramid: Pyramid) -> dict[str, int]:
    """Stage of every parameter, by the map of the pyramid that it is first used for.

    Stage 0 is the stem: what runs before the first map is finished. Stage s is what runs between
    the maps s - 1 and s. A ResNet-18 has the stages conv1 + bn1, layer1, ... layer4; nnU-Net's
    residual encoder has stem + stages.0 (both at full resolution), stages.1, ... stages.5.
    Parameters that are never used (a classification layer that runs idle) count as the last stage.

    Args:
        pyramid: with all maps of its encoder (`strides=None`); not changed.

    Returns:
        Name in `pyramid.named_parameters()` -> stage, from 0 to the number of maps - 1.
    """
    last = len(pyramid.levels) - 1
    owners = _first_uses(pyramid)
    return {
        name: min(owners.get(name.rpartition(".")[0], last), last)
        for name, _ in pyramid.named_parameters()
    }


def _first_uses(pyramid: Pyramid) -> dict[str, int]:
    """Module -> how many maps were finished when it first ran."""
    problems = []
    dims = spatial_dims(pyramid.encoder)
    for device, size in _TRACE_INPUTS:
        try:
            copied = copy.deepcopy(pyramid).to(device).eval()
            # No channel count is asked for: the project's networks take one channel.
            return _traced(copied, torch.zeros(1, 1, *[size] * dims, device=device))
        except Exception as error:  # whatever an arbitrary network raises is reported below
            problems.append(f"{size} voxels on {device}: {type(error).__name__}: {error}")
    raise ValueError(f"the encoder's order cannot be traced; {'; '.join(problems)}")


def _traced(pyramid: Pyramid, x: torch.Tensor) -> dict[str, int]:
    ends = {(level.module, level.call) for level in pyramid.levels}
    found: dict[str, int] = {}
    counts: Counter[str] = Counter()
    finished = 0

    def before(name: str) -> None:
        found.setdefault(name, finished)

    def after(name: str) -> None:
        nonlocal finished
        finished += (name, counts[name]) in ends
        counts[name] += 1

    # remove_duplicate=False: a module registered twice has its parameters listed under one name.
    for name, module in pyramid.encoder.named_modules(remove_duplicate=False):
        inside = f"encoder.{name}".rstrip(".")
        module.register_forward_pre_hook(lambda m, args, inside=inside: before(inside))
        module.register_forward_hook(lambda m, args, out, name=name: after(name))
    with torch.no_grad():
        pyramid.encoder(x)
    return found


def layer_groups(
    pyramid: Pyramid,
    head: nn.Module,
    *,
    lr: float,
    encoder_lr_scale: float,
    layer_decay: float,
    weight_decay: float,
    head_only: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups: the head, then the stages from the last to the stem.

    The head learns at `lr`, stage s of n (from 0) at `lr * encoder_lr_scale * layer_decay^(n - s)`.
    Each is split into weights, which decay, and biases and normalisation weights, which do not.

    Returns:
        Groups for an optimiser, each with `name`: "head", "stage 4", ... "stage 0".
    """
    groups = _split("head", list(head.named_parameters()), lr, weight_decay)
    if head_only:
        return groups
    stages, count = parameter_stages(pyramid), len(pyramid.levels)
    members: dict[int, list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in pyramid.named_parameters():
        members[stages[name]].append((name, parameter))
    for stage in sorted(members, reverse=True):
        # The decay counts from the head: without it (1.0) every stage has the same rate.
        rate = lr * encoder_lr_scale * layer_decay ** (count - stage)
        groups += _split(f"stage {stage}", members[stage], rate, weight_decay)
    return groups


def _split(
    name: str, members: list[tuple[str, nn.Parameter]], lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    vectors = [p for n, p in members if p.ndim <= 1 or n.endswith("bias")]
    weights = [p for n, p in members if not (p.ndim <= 1 or n.endswith("bias"))]
    parts = [(weights, weight_decay), (vectors, 0.0)]
    return [
        {"params": params, "lr": lr, "weight_decay": decay, "name": name}
        for params, decay in parts
        if params
    ]
