"""What convolutions do when they meet a BlockSparseTensor, and the geometry of sliding windows.

They are turned into three axes, checked against the cells of the mask, and handed to
`medspark.sparse.ops`. The other functions are in `pools.py`, `norms.py`, `reductions.py`, `resize.py`,
`shape.py` and `elementwise.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from medspark.sparse.casts import autocast
from medspark.sparse.mask import BlockMask, Level
from medspark.sparse.ops.conv3d import Geometry, conv3d_features
from medspark.sparse.ops.conv_transpose3d import conv_transpose3d_features
from medspark.sparse.tensor import (
    BlockSparseTensor,
    PaddedView,
    block_sparse,
    implements,
    shell,
)


def three_axes(value: int | Sequence[int], axes: int, fill: int) -> list[int]:
    """A per-axis argument as (z, y, x); 2D arguments get `fill` for depth."""
    values = [value] * axes if isinstance(value, int) else list(value)
    if len(values) == 1:
        values *= axes
    return [fill] * (3 - axes) + [int(v) for v in values]


def _pads(x: BlockSparseTensor, padding: list[int]) -> tuple[list[int], list[int]]:
    """Zeros below and above each axis: of the op itself and of a pad before it."""
    extra = x.pads if isinstance(x, PaddedView) else ((0, 0),) * 3
    lower = [p + a for p, (a, _) in zip(padding, extra, strict=True)]
    return lower, [p + b for p, (_, b) in zip(padding, extra, strict=True)]


def output_size(
    x: BlockSparseTensor,
    window: tuple[list[int], list[int], list[int], list[int]],
    upper: list[int],
    what: str,
    ceil_mode: bool = False,
) -> tuple[int, ...]:
    """Spatial size on which a sliding window (kernel, stride, lower padding, dilation) leaves its results.

    Raises:
        ValueError: the output does not map onto the cells of the mask.
    """
    axes = x.ndim - 2
    size = []
    for n, k, s, p, d, q in zip((1,) * (3 - axes) + x.spatial, *window, upper, strict=True):
        span = n + p + q - d * (k - 1) - 1
        if span < 0:
            raise ValueError(
                f"{what}: kernel {window[0]} does not fit into a volume of size {x.spatial}"
            )
        out = (span + s - 1 if ceil_mode else span) // s + 1
        if ceil_mode and (out - 1) * s >= n + p:  # torch: a window must start inside the volume
            out -= 1
        if out * s != n and (out, n) != (1, 1):
            pads = p if p == q else (p, q)
            raise ValueError(
                f"{what}: kernel {k}, stride {s}, padding {pads} turns {n} voxels into {out}: the output of "
                f"{tuple(x.shape)} does not map onto cells, as voxel o must lie in the cell of voxel "
                f"{s} * o; pad so that {n} becomes {n}/{s} (crop sizes must divide by the total stride)"
            )
        size.append(out)
    return tuple(size[3 - axes :])


def _same_padding(kernel: list[int], dilation: list[int]) -> tuple[list[int], list[int]]:
    """Torch's 'same': an odd number of zeros puts one more above."""
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return [r // 2 for r in reach], [r - r // 2 for r in reach]


def _mask_of(x: BlockSparseTensor, out_mask: BlockMask | None) -> BlockMask:
    """The mask of an op's output.

    Raises:
        ValueError: another batch size. TypeError: not a BlockMask.
    """
    if out_mask is None:
        return x.mask
    if not isinstance(out_mask, BlockMask):
        raise TypeError(f"out_mask must be a BlockMask, got {type(out_mask).__name__}")
    if out_mask.batch_size != x.shape[0] or len(out_mask.grid) != x.ndim - 2:
        raise ValueError(f"{out_mask!r} does not fit a tensor of shape {tuple(x.shape)}")
    return out_mask.to(x.device)


@implements(F.conv3d, torch.conv3d, F.conv2d, torch.conv2d)
@implements(F.conv3d, torch.conv3d, F.conv2d, torch.conv2d, on=PaddedView)
def conv(
    x: BlockSparseTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    out_mask: BlockMask | None = None,
) -> BlockSparseTensor:
    """Convolution of a masked volume (or image); `F.conv3d` and `F.conv2d` come here.

    Args:
        x: `[B, C, D, H, W]` or `[B, C, H, W]`.
        weight: `[C_out, C / groups, kz, ky, kx]`, or without kz.
        bias: `[C_out]` or None.
        stride: per axis or one number, like padding and dilation.
        padding: zeros on both sides, or `"same"` or `"valid"`.
        dilation: distance of taps.
        groups: channel groups.
        out_mask: voxels to compute, on any grid that fits the output; those of `x` if None.

    Raises:
        ValueError: shapes that do not fit, or an output that does not map onto cells.
        TypeError: weight or bias of another dtype. RuntimeError: another device.
    """
    level = x._level
    key = (weight.shape, hashable(stride), hashable(padding), hashable(dilation), groups, out_mask)
    if type(x) is not BlockSparseTensor:
        key = (*key, x.pads)  # type: ignore[attr-defined, assignment]
    plan = level.plan(
        key, lambda: _plan_conv(x, weight, stride, padding, dilation, groups, out_mask)
    )
    if weight.shape[1] * groups != x._size[1]:
        raise ValueError(
            f"conv{x.ndim - 2}d: weight {tuple(weight.shape)} with groups={groups} does not fit input "
            f"{tuple(x.shape)}"
        )
    features = x.features
    dtype = autocast(features)
    if dtype is not None:
        features, weight, bias = _cast(dtype, features, weight, bias)
    if weight.ndim == 4:
        weight = weight.unsqueeze(2)
    y = conv3d_features(features, level, plan.level, weight, bias, plan.geometry)
    return shell(BlockSparseTensor, y, plan.mask, plan.level, plan.spatial, x._semantics, plan.size)


def _cast(
    dtype: torch.dtype, features: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return features.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


class Plan(NamedTuple):
    """Where a convolution leaves its results, and between which voxels it runs."""

    mask: BlockMask
    level: Level
    spatial: tuple[int, ...]
    size: torch.Size
    geometry: Geometry


def hashable(value: Any) -> Any:
    """A list as a tuple, so that it can be part of a key."""
    return tuple(value) if isinstance(value, list) else value


def _plan_conv(
    x: BlockSparseTensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    out_mask: BlockMask | None,
) -> Plan:
    axes = x.ndim - 2
    if weight.ndim != x.ndim:
        raise ValueError(
            f"conv{axes}d: weight {tuple(weight.shape)} does not fit input {tuple(x.shape)}"
        )
    kernel, steps = three_axes(tuple(weight.shape[2:]), axes, 1), three_axes(stride, axes, 1)
    dilations = three_axes(dilation, axes, 1)
    if padding == "same":
        lower, upper = _same_padding(kernel, dilations)
    else:
        given = 0 if padding == "valid" else cast("int | Sequence[int]", padding)
        lower, upper = _pads(x, three_axes(given, axes, 0))
    spatial = output_size(x, (kernel, steps, lower, dilations), upper, f"conv{axes}d")
    mask = _mask_of(x, out_mask)
    level = mask.level(spatial, x.semantics.coarse)
    geometry = Geometry.between(x.level, level, steps, lower, dilations, groups)
    size = torch.Size((mask.batch_size, weight.shape[0], *spatial))
    return Plan(mask, level, spatial, size, geometry)


@implements(F.conv_transpose3d, torch.conv_transpose3d, F.conv_transpose2d, torch.conv_transpose2d)
def conv_transpose(
    x: BlockSparseTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    out_mask: BlockMask | None = None,
) -> BlockSparseTensor:
    """Transposed convolution; `F.conv_transpose3d` and `F.conv_transpose2d` come here.

    Args:
        x: `[B, C, D, H, W]` or `[B, C, H, W]`.
        weight: `[C, C_out / groups, kz, ky, kx]`, or without kz.
        bias: `[C_out]` or None.
        stride: per axis or one number, like the next three.
        padding: of the convolution that this one is the adjoint of.
        output_padding: voxels added to one side of the output.
        groups: channel groups.
        dilation: distance of taps.
        out_mask: voxels to compute, on any grid that fits the output; those of `x` if None.

    Raises:
        ValueError: shapes that do not fit, or an output that does not map onto cells.
        TypeError: weight or bias of another dtype. RuntimeError: another device.
    """
    axes = x.ndim - 2
    if weight.ndim != x.ndim or weight.shape[0] != x.shape[1]:
        raise ValueError(
            f"conv_transpose{axes}d: weight {tuple(weight.shape)} does not fit input {tuple(x.shape)}"
        )
    kernel = three_axes(tuple(weight.shape[2:]), axes, 1)
    steps, pads = three_axes(stride, axes, 1), three_axes(padding, axes, 0)
    extra, dilations = three_axes(output_padding, axes, 0), three_axes(dilation, axes, 1)
    size = [s * n for s, n in zip(steps, (1,) * (3 - axes) + x.spatial, strict=True)]
    for n, s, k, p, e, d in zip(size, steps, kernel, pads, extra, dilations, strict=True):
        if n - s - 2 * p + d * (k - 1) + e + 1 != n:
            raise ValueError(
                f"conv_transpose{axes}d: kernel {k}, stride {s}, padding {p}, output padding {e} do not turn "
                f"{n // s} voxels of {tuple(x.shape)} into {n}: the output does not map onto cells"
            )
    spatial = tuple(size[3 - axes :])
    mask = _mask_of(x, out_mask)
    level = mask.level(spatial, x.semantics.coarse)
    features = x.features
    dtype = autocast(features)
    if dtype is not None:
        features, weight, bias = _cast(dtype, features, weight, bias)
    weight = weight if weight.ndim == 5 else weight.unsqueeze(2)
    geometry = level.plan(
        ("conv_transpose", x.level, *map(tuple, (steps, pads, dilations)), groups),
        lambda: Geometry.between(level, x.level, steps, pads, dilations, groups),
    )
    y = conv_transpose3d_features(features, x.level, level, weight, bias, geometry, tuple(extra))
    return block_sparse(y, mask, level, spatial, x.semantics)
