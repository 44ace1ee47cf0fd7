"""Embeddings as rows [B, D]: of unit length in float32, and those of all processes together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, ``wide``; a row of zeros stays one, one that is not finite becomes NaN."""
    return F.normalize(wide(x), dim=-1)


def check_pair(first: Tensor, second: Tensor, names: str) -> None:
    """Both are [B, D] with the same B, at least 1, and D.

    Raises:
        ValueError: they are not; ``names`` says what they are.
    """
    if first.ndim != 2 or first.shape != second.shape or not len(first):
        raise ValueError(
            f"{names} must be two tensors [B, D] of the same shape with B of at least 1, not "
            f"{tuple(first.shape)} and {tuple(second.shape)}"
        )


def check_positive(**values: float) -> None:
    """Each is a positive, finite number.

    Raises:
        ValueError: one is not; names it.
    """
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive and finite, not {value}")


def rank_and_world(joint: bool = True) -> tuple[int, int]:
    """Number of this process and of processes; (0, 1) without ``joint`` or torch.distributed."""
    if joint and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_rows(x: Tensor) -> Tensor:
    """Rows [B, ...] of all processes in the order of their ranks: [world * B, ...], differentiable.

    Gradients that any process sends into a row are summed where the row came from. As
    DistributedDataParallel averages gradients of weights, a loss that is the mean over a process's
    own samples, each compared with those of all, then has the gradients of the joint batch.
    Every process must call it, and backward if any does; it waits for the GPU to compare sizes, which
    would otherwise hang or mix up rows. One process: ``x`` itself.

    Raises:
        ValueError: processes hold different numbers of rows. All of them raise it.
    """
    rank, world = rank_and_world()
    if world == 1:
        return x
    own = torch.tensor([len(x)], device=x.device)
    sizes = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(sizes, own)
    rows = torch.cat(sizes).tolist()
    if len(set(rows)) > 1:
        raise ValueError(f"processes must have batches of the same size to share, not {rows}")
    gathered: Tensor = _Gather.apply(x, rank, world)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rank: int, world: int) -> Tensor:
        ctx.own = slice(rank * len(x), (rank + 1) * len(x))
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
        dist.all_gather(parts, x.detach().contiguous())
        return torch.cat(parts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # A reduce-scatter would move less, but gloo has none in every torch that is supported.
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.own], None, None
