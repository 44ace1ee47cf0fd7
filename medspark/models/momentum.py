"""Momentum copy of a network: the key encoder of MoCo, the target of BYOL."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class MomentumNetwork(nn.Module):
    """Follows another network: ``average = tau * average + (1 - tau) * online``.

    Starts as a copy. Kept in float32 (float64 stays), whatever the other's type: at tau = .999 and
    above, 16 bits would lose the steps. No gradient reaches it: parameters do not require one, and
    forward runs without autograd. Its state is in the ``state_dict`` under ``network.``; optimisers
    and DistributedDataParallel pass over it.

    Buffers, that is, statistics of batch norms: by default the copy's own, which its forward passes
    in training mode update, as in the official codes of MoCo and BYOL. With ``buffers=True`` those
    of floating point are averaged like the parameters and counters copied. The mode (training or not)
    is that of the module it sits in.

    Args:
        online: network to copy; may be wrapped in DistributedDataParallel.
        buffers: whether ``update`` averages buffers too.
    """

    def __init__(self, online: nn.Module, buffers: bool = False) -> None:
        super().__init__()
        self.network = copy.deepcopy(_bare(online)).requires_grad_(False)
        for tensor in _floats(_tensors(self.network, True)).values():
            tensor.data = tensor.data if tensor.dtype == torch.float64 else tensor.data.float()
        self.buffers_too = buffers

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Of the copy, without autograd."""
        return self.network(*args, **kwargs)

    @torch.no_grad()
    def update(self, online: nn.Module, tau: float) -> None:
        """One step towards ``online``: 0 copies it exactly, 1 changes nothing.

        Call it after the optimiser's step (BYOL) or before keys are made (MoCo). NaN in ``online``
        would come along and stay: check loss and gradients first.

        Args:
            online: network of the same structure, where batch norms may have become synchronised
                ones; may be wrapped in DistributedDataParallel.
            tau: share of the old average, in [0, 1].

        Raises:
            ValueError: tau out of range, another structure, or a copy that was cast to 16 bits.
        """
        if not 0 <= tau <= 1:
            raise ValueError(f"the momentum must lie in [0, 1], not {tau}")
        mine = _tensors(self.network, self.buffers_too)
        theirs = _tensors(_bare(online), self.buffers_too)
        _check(mine, theirs)
        averaged = _floats(mine)
        new = [theirs[name].to(old) for name, old in averaged.items()]
        if averaged:
            torch._foreach_lerp_(list(averaged.values()), new, 1 - tau)
        if tau < 1:
            for name in mine.keys() - averaged.keys():
                mine[name].copy_(theirs[name])


def momentum_at(step: int, steps: int, base: float, end: float = 1.0) -> float:
    """Momentum of a step, rising by half a cosine (BYOL, arXiv 2006.07733, section 3.3).

    ``tau = end - (end - base) (cos(pi step / steps) + 1) / 2``

    From ``base`` at step 0 to ``end`` at step ``steps`` and beyond: over the whole run, however long.
    BYOL: .996 to 1; MoCo: .999 all along, which is ``end = base``.

    Raises:
        ValueError: steps below 1, or a momentum outside [0, 1].
    """
    if steps < 1 or not (0 <= base <= 1 and 0 <= end <= 1):
        raise ValueError(
            f"momentum from {base} to {end} in {steps} steps: both must lie in [0, 1], and it takes "
            "at least one step"
        )
    progress = min(max(step / steps, 0.0), 1.0)
    return end - (end - base) * (math.cos(math.pi * progress) + 1) / 2


def _bare(network: nn.Module) -> nn.Module:
    return network.module if isinstance(network, DistributedDataParallel) else network


def _tensors(network: nn.Module, buffers: bool) -> dict[str, Tensor]:
    found: dict[str, Tensor] = dict(network.named_parameters())
    return {**found, **dict(network.named_buffers())} if buffers else found


def _floats(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if t.is_floating_point()}


def _check(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name in sorted(mine.keys() | theirs.keys()):
        shapes = [tuple(t[name].shape) if name in t else "missing" for t in (mine, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} is {shapes[0]} in the momentum network, {shapes[1]} online")
    narrow = sorted(n for n, t in _floats(mine).items() if t.dtype.itemsize < 4)
    if narrow:
        raise ValueError(
            f"the momentum network was cast to {mine[narrow[0]].dtype} ({narrow[0]}), too coarse for "
            "an average: train with precision bf16-mixed or 32, not bf16-true"
        )
