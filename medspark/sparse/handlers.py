"""What convolutions, norms and pools do when they meet a BlockSparseTensor.

They are turned into three axes, checked against the cells of the mask, and handed to
`medspark.sparse.ops`. Elementwise functions are in `elementwise.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medspark.sparse.mask import Level
from medspark.sparse.ops.conv3d import conv3d_features
from medspark.sparse.ops.conv_transpose3d import conv_transpose3d_features
from medspark.sparse.ops.global_pool import global_pool
from medspark.sparse.ops.norm import group_norm_features, norm_features
from medspark.sparse.ops.pool3d import avg_pool3d_features, max_pool3d_features
from medspark.sparse.tensor import BlockSparseTensor, implements


def _three(value: int | Sequence[int], axes: int, fill: int) -> list[int]:
    """A per-axis argument as (z, y, x); 2D arguments get `fill` for depth."""
    values = [value] * axes if isinstance(value, int) else list(value)
    if len(values) == 1:
        values *= axes
    return [fill] * (3 - axes) + [int(v) for v in values]


def _output_level(
    x: BlockSparseTensor, window: tuple[list[int], ...], ceil_mode: bool = False
) -> tuple[Level, tuple[int, ...]]:
    """Level and spatial size on which a sliding window leaves its results.

    Raises:
        ValueError: the output does not map onto the cells of the mask.
    """
    kernel, stride, padding, dilation = window
    axes = x.ndim - 2
    size = []
    for n, k, s, p, d in zip(
        (1,) * (3 - axes) + x.spatial, kernel, stride, padding, dilation, strict=True
    ):
        span = n + 2 * p - d * (k - 1) - 1
        if span < 0:
            raise ValueError(f"kernel {kernel} does not fit into a volume of size {x.spatial}")
        out = (span + s - 1 if ceil_mode else span) // s + 1
        if ceil_mode and (out - 1) * s >= n + p:  # torch: a window must start inside the volume
            out -= 1
        if out * s != n and (out, n) != (1, 1):
            raise ValueError(
                f"kernel {k}, stride {s}, padding {p} turns {n} voxels into {out}: the output does not map "
                f"onto cells, as voxel o must lie in the cell of voxel {s} * o; pad so that {n} becomes "
                f"{n}/{s} (crop sizes must divide by the total stride)"
            )
        size.append(out)
    spatial = tuple(size[3 - axes :])
    return x.mask.level(spatial, x.semantics.coarse), spatial


def _result(x: BlockSparseTensor, features: Tensor, spatial: tuple[int, ...]) -> BlockSparseTensor:
    return BlockSparseTensor(features, x.mask, spatial, x.semantics)


def _autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Arguments of a convolution in the autocast type, as torch casts its own."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return (x, *others)
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if t is None else t.to(dtype) for t in (x, *others))


def _same_padding(kernel: list[int], dilation: list[int]) -> list[int]:
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if any(r % 2 for r in reach):
        raise NotImplementedError("padding='same' with an even reach pads unevenly; pad explicitly")
    return [r // 2 for r in reach]


@implements(F.conv3d, torch.conv3d, F.conv2d, torch.conv2d)
def _conv(
    x: BlockSparseTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> BlockSparseTensor:
    axes = x.ndim - 2
    if weight.ndim != x.ndim or weight.shape[1] * groups != x.shape[1]:
        raise ValueError(
            f"weight {tuple(weight.shape)} with groups={groups} does not fit input {tuple(x.shape)}"
        )
    kernel = _three(tuple(weight.shape[2:]), axes, 1)
    dilations = _three(dilation, axes, 1)
    if isinstance(padding, str):
        pads = _same_padding(kernel, dilations) if padding == "same" else [0, 0, 0]
    else:
        pads = _three(padding, axes, 0)
    window = (kernel, _three(stride, axes, 1), pads, dilations)
    level, spatial = _output_level(x, window)
    features, weight_, bias = _autocast(x.features, weight, bias)
    assert features is not None and weight_ is not None
    cast = x.with_features(features)
    y = conv3d_features(
        cast, level, weight_.view(*weight.shape[:2], *kernel), bias, *window[1:], groups
    )
    return _result(x, y, spatial)


@implements(F.conv_transpose3d, torch.conv_transpose3d, F.conv_transpose2d, torch.conv_transpose2d)
def _conv_transpose(
    x: BlockSparseTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> BlockSparseTensor:
    axes = x.ndim - 2
    if weight.ndim != x.ndim or weight.shape[0] != x.shape[1]:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit input {tuple(x.shape)}")
    kernel = _three(tuple(weight.shape[2:]), axes, 1)
    steps, pads = _three(stride, axes, 1), _three(padding, axes, 0)
    extra, dilations = _three(output_padding, axes, 0), _three(dilation, axes, 1)
    size = [s * n for s, n in zip(steps, (1,) * (3 - axes) + x.spatial, strict=True)]
    for n, s, k, p, e, d in zip(size, steps, kernel, pads, extra, dilations, strict=True):
        if n - s - 2 * p + d * (k - 1) + e + 1 != n:
            raise ValueError(
                f"kernel {k}, stride {s}, padding {p}, output padding {e} do not turn {n // s} voxels "
                f"into {n}: the output does not map onto cells"
            )
    spatial = tuple(size[3 - axes :])
    level = x.mask.level(spatial, x.semantics.coarse)
    features, weight_, bias = _autocast(x.features, weight, bias)
    assert features is not None and weight_ is not None
    y = conv_transpose3d_features(
        x.with_features(features), level, weight_.view(*weight.shape[:2], *kernel), bias,
        steps, pads, extra, dilations, groups,
    )  # fmt: skip
    return _result(x, y, spatial)


@implements(F.group_norm, torch.group_norm)
def _group_norm(
    x: BlockSparseTensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> BlockSparseTensor:
    if x.shape[1] % num_groups:
        raise ValueError(f"{x.shape[1]} channels do not divide into {num_groups} groups")
    return x.with_features(group_norm_features(x, num_groups, weight, bias, eps))


@implements(F.batch_norm, torch.batch_norm)
def _batch_norm(
    x: BlockSparseTensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> BlockSparseTensor:
    rows = x.features.shape[0] * x.level.block_voxels
    if not training:
        return _by_running(x, running_mean, running_var, weight, bias, eps)
    if rows == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got one active voxel in the batch"
        )
    y, mean, var = norm_features(x, weight, bias, eps, per_sample=False)
    if running_mean is not None and running_var is not None and rows:
        _update_running(running_mean, running_var, mean[0], var[0] * (rows / (rows - 1)), momentum)
    return x.with_features(y)


def _by_running(
    x: BlockSparseTensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> BlockSparseTensor:
    """Evaluation: a fixed affine map per channel, torch's own on the list of active voxels."""
    flat = x.features.flatten(0, 3)
    y = F.batch_norm(flat, running_mean, running_var, weight, bias, False, 0.0, eps)
    return x.with_features(y.view_as(x.features))


def _update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, momentum: float
) -> None:
    """Exponential averages as torch keeps them: unbiased variance."""
    with torch.no_grad():
        running_mean.mul_(1 - momentum).add_(mean.to(running_mean.dtype), alpha=momentum)
        running_var.mul_(1 - momentum).add_(var.to(running_var.dtype), alpha=momentum)


@implements(F.instance_norm, torch.instance_norm)
def _instance_norm(
    x: BlockSparseTensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> BlockSparseTensor:
    if not use_input_stats:
        return _by_running(x, running_mean, running_var, weight, bias, eps)
    y, mean, var = norm_features(x, weight, bias, eps, per_sample=True)
    if running_mean is not None and running_var is not None:
        rows = x.level.segment_starts(True).diff().to(mean)
        shown = rows > 0
        if shown.any():
            unbiased = var * (rows / (rows - 1).clamp(min=1))[:, None]
            _update_running(
                running_mean, running_var, mean[shown].mean(0), unbiased[shown].mean(0), momentum
            )
    return x.with_features(y)


def _pool_window(
    x: BlockSparseTensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any
) -> tuple[list[int], list[int], list[int], list[int]]:
    axes = x.ndim - 2
    kernel = _three(kernel_size, axes, 1)
    empty = stride is None or (not isinstance(stride, int) and len(stride) == 0)
    steps = kernel if empty else _three(stride, axes, 1)
    return kernel, steps, _three(padding, axes, 0), _three(dilation, axes, 1)


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
    window = _pool_window(x, kernel_size, stride, padding, dilation)
    level, spatial = _output_level(x, window, ceil_mode)
    return _result(x, max_pool3d_features(x, level, *window, ceil_mode), spatial)


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
    window = _pool_window(x, kernel_size, stride, padding, 1)
    level, spatial = _output_level(x, window, ceil_mode)
    features = avg_pool3d_features(
        x, level, *window[:3], ceil_mode, count_include_pad, divisor_override
    )
    return _result(x, features, spatial)


def _to_one(x: BlockSparseTensor, output_size: Any, maximum: bool) -> Tensor:
    axes = x.ndim - 2
    sizes = [output_size] * axes if isinstance(output_size, int) else list(output_size)
    if any(n != 1 for n in sizes):
        raise NotImplementedError(
            f"adaptive pooling of a BlockSparseTensor goes to size 1 only, got {output_size}"
        )
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


def _spatial_axes(x: BlockSparseTensor, dim: Any) -> None:
    """Only reductions over exactly the spatial axes have a meaning for active voxels."""
    axes = {d % x.ndim for d in ((dim,) if isinstance(dim, int) else dim or ())}
    if axes != set(range(2, x.ndim)):
        raise NotImplementedError(
            f"reductions of a BlockSparseTensor go over all spatial axes, got dim={dim}"
        )


@implements(torch.mean, Tensor.mean)
def _mean(x: BlockSparseTensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    _spatial_axes(x, dim)
    pooled = global_pool(x)
    return pooled.view(*x.shape[:2], *(1,) * (x.ndim - 2)) if keepdim else pooled


@implements(torch.amax, Tensor.amax)
def _amax(x: BlockSparseTensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    _spatial_axes(x, dim)
    pooled = global_pool(x, maximum=True)
    return pooled.view(*x.shape[:2], *(1,) * (x.ndim - 2)) if keepdim else pooled
