"""Reductions of BlockSparseTensors: over space to plain tensors, over channels voxel by voxel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medspark.sparse.casts import widened
from medspark.sparse.ops.global_pool import global_pool
from medspark.sparse.tensor import BlockSparseTensor, implements, like


def _to_one(x: BlockSparseTensor, output_size: Any, maximum: bool) -> Tensor:
    axes = x.ndim - 2
    sizes = [output_size] * axes if isinstance(output_size, int) else list(output_size)
    if any(n != 1 for n in sizes):
        raise NotImplementedError(
            f"adaptive pooling of a BlockSparseTensor {tuple(x.shape)} goes to size 1 only, got "
            f"{output_size}; pool with a kernel and stride instead, or after `x.to_dense()`"
        )
    x = widened(x, "cpu") if axes == 3 else x
    return global_pool(x, maximum).view(*x.shape[:2], *(1,) * axes)


@implements(F.adaptive_avg_pool3d, F.adaptive_avg_pool2d)
def _adaptive_avg_pool(x: BlockSparseTensor, output_size: Any) -> Tensor:
    return _to_one(x, output_size, maximum=False)


@implements(F.adaptive_max_pool3d, F.adaptive_max_pool2d)
def _adaptive_max_pool(
    x: BlockSparseTensor, output_size: Any, return_indices: bool = False
) -> Tensor:
    if return_indices:
        raise NotImplementedError("adaptive max pooling of a BlockSparseTensor returns no indices")
    return _to_one(x, output_size, maximum=True)


def _axes(x: BlockSparseTensor, dim: Any, what: str) -> str:
    """Whether a reduction goes over `"space"` or over `"channels"`; nothing else has a meaning."""
    axes = {d % x.ndim for d in ((dim,) if isinstance(dim, int) else dim or ())}
    if axes == set(range(2, x.ndim)):
        return "space"
    if axes == {1}:
        return "channels"
    raise NotImplementedError(
        f"{what} of a BlockSparseTensor {tuple(x.shape)} goes over all spatial axes, or over the "
        f"channels, got dim={dim}; work on `x.features`"
    )


def _over_space(x: BlockSparseTensor, pooled: Tensor, keepdim: bool) -> Tensor:
    return pooled.view(*x.shape[:2], *(1,) * (x.ndim - 2)) if keepdim else pooled


def _over_channels(x: BlockSparseTensor, features: Tensor, keepdim: bool, what: str) -> Any:
    if not keepdim:
        raise NotImplementedError(
            f"{what} over the channels of a BlockSparseTensor must keep their axis: keepdim=True"
        )
    return like(x, features)


@implements(torch.mean, Tensor.mean)
def _mean(x: BlockSparseTensor, dim: Any = None, keepdim: bool = False) -> Any:
    if _axes(x, dim, "mean") == "channels":
        return _over_channels(x, x.features.mean(-1, keepdim=True), keepdim, "mean")
    return _over_space(x, global_pool(x), keepdim)


@implements(torch.amax, Tensor.amax)
def _amax(x: BlockSparseTensor, dim: Any = None, keepdim: bool = False) -> Any:
    if _axes(x, dim, "amax") == "channels":
        return _over_channels(x, x.features.amax(-1, keepdim=True), keepdim, "amax")
    return _over_space(x, global_pool(x, maximum=True), keepdim)


def _sum_over_space(x: BlockSparseTensor) -> Tensor:
    voxels = x.level.segment_starts(True).diff().to(x.features.dtype)
    return global_pool(x) * voxels[:, None]


@implements(torch.sum, Tensor.sum)
def _sum(x: BlockSparseTensor, dim: Any = None, keepdim: bool = False) -> Any:
    if _axes(x, dim, "sum") == "channels":
        return _over_channels(x, x.features.sum(-1, keepdim=True), keepdim, "sum")
    return _over_space(x, _sum_over_space(x), keepdim)


@implements(torch.norm, Tensor.norm, torch.linalg.vector_norm)
def _vector_norm(
    x: BlockSparseTensor, p: Any = 2, dim: Any = None, keepdim: bool = False, **_: Any
) -> Any:
    if p not in (2, 2.0, "fro", None):
        raise NotImplementedError(f"norm of a BlockSparseTensor: p must be 2, got {p}")
    if _axes(x, dim, "norm") == "channels":
        length = torch.linalg.vector_norm(x.features, dim=-1, keepdim=True)
        return _over_channels(x, length, keepdim, "norm")
    squares = _sum_over_space(like(x, x.features.square()))
    # The root of 0 has no derivative; torch's norm takes 0.
    length = torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)
    return _over_space(x, length, keepdim)
