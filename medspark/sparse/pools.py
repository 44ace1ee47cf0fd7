"""What max and average pools with a window do when they meet a BlockSparseTensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from medspark.sparse._op import tables
from medspark.sparse.casts import widened
from medspark.sparse.convolutions import hashable, output_size, three_axes
from medspark.sparse.mask import Level
from medspark.sparse.ops.pool3d import (
    MOST_TAPS,
    AvgPool,
    MaxPool,
    avg_pool3d_features,
    max_pool3d_features,
)
from medspark.sparse.tensor import BlockSparseTensor, block_sparse, implements


class PoolPlan(NamedTuple):
    """Where a pool leaves its results, and how it runs."""

    level: Level
    spatial: tuple[int, ...]
    config: Any


def _plan_pool(
    x: BlockSparseTensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
    build: Callable[..., Any],
) -> PoolPlan:
    axes = x.ndim - 2
    kernel = three_axes(kernel_size, axes, 1)
    empty = stride is None or (not isinstance(stride, int) and len(stride) == 0)
    steps = kernel if empty else three_axes(stride, axes, 1)
    pads, dilations = three_axes(padding, axes, 0), three_axes(dilation, axes, 1)
    spatial = output_size(x, (kernel, steps, pads, dilations), pads, "pool", ceil_mode)
    level = x.mask.level(spatial, x.semantics.coarse)
    levels = (*tables(x.level), x.level.block, *tables(level), level.block)
    return PoolPlan(level, spatial, build(*levels, kernel, steps, pads, dilations))


@implements(F.max_pool3d, torch.max_pool3d, F.max_pool2d, torch.max_pool2d)
def _max_pool(
    x: BlockSparseTensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> BlockSparseTensor:
    if return_indices:
        raise NotImplementedError("max pooling of a BlockSparseTensor does not return indices")
    x = widened(x, "cpu") if x.ndim == 5 else x
    window = (hashable(kernel_size), hashable(stride), hashable(padding), hashable(dilation))
    hidden = x.semantics.max_pool

    def build(*levels_and_window: Any) -> MaxPool:
        if math.prod(levels_and_window[6]) > MOST_TAPS:
            raise ValueError(f"max pooling kernel {kernel_size} has more than {MOST_TAPS} voxels")
        return MaxPool._make((*levels_and_window, hidden == "zero"))

    key = ("max_pool", *window, ceil_mode, hidden)
    plan = x.level.plan(key, lambda: _plan_pool(x, *window, ceil_mode, build))
    features = max_pool3d_features(x, plan.level, plan.config)
    return block_sparse(features, x.mask, plan.level, plan.spatial, x.semantics)


@implements(F.avg_pool3d, torch._C._nn.avg_pool3d, F.avg_pool2d, torch._C._nn.avg_pool2d)
def _avg_pool(
    x: BlockSparseTensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> BlockSparseTensor:
    x = widened(x, "cpu") if x.ndim == 5 else x
    window = (hashable(kernel_size), hashable(stride), hashable(padding), 1)
    flags = (x.semantics.avg_divisor == "active", count_include_pad, divisor_override or 0)

    def build(*levels_and_window: Any) -> AvgPool:
        return AvgPool._make((*levels_and_window[:-1], *flags))

    key = ("avg_pool", *window, ceil_mode, *flags)
    plan = x.level.plan(key, lambda: _plan_pool(x, *window, ceil_mode, build))
    features = avg_pool3d_features(x, plan.level, plan.config)
    return block_sparse(features, x.mask, plan.level, plan.spatial, x.semantics)
