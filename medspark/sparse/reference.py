"""Every op in plain torch on dense tensors: the oracle of the kernels, and the slow backend.

A level is a dense tensor `[B, C, D, H, W]` and a boolean voxel mask `[B, 1, D, H, W]`. Each function
replaces hidden voxels by 0 with `where` (never by a product, so hidden NaN stays out), applies torch's
own op, and keeps the result at the active voxels of the output level. This is how SparK
(arXiv 2301.03580) defines sparse ops by masking.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from medspark.sparse.mask import Level

Three = tuple[int, int, int]


def voxel_mask(level: Level) -> Tensor:
    """Boolean `[B, 1, D, H, W]`: the active voxels of a level."""
    mask = level.visible
    for axis, n in enumerate(level.block, start=1):
        mask = mask.repeat_interleave(n, dim=axis)
    return mask[:, None]


def pack(dense: Tensor, level: Level) -> Tensor:
    """Dense `[B, C, D, H, W]` -> packed blocks `[n_blocks, bz, by, bx, C]`."""
    b, c = dense.shape[:2]
    (gz, gy, gx), (nz, ny, nx) = level.grid, level.block
    cells = dense.view(b, c, gz, nz, gy, ny, gx, nx).permute(0, 2, 4, 6, 3, 5, 7, 1)
    return cells[level.visible]


def unpack(features: Tensor, level: Level) -> Tensor:
    """Packed blocks -> dense `[B, C, D, H, W]`, 0 at hidden voxels."""
    (gz, gy, gx), (nz, ny, nx) = level.grid, level.block
    b, c = level.cells.shape[0], features.shape[-1]
    cells = features.new_zeros(b, gz, gy, gx, nz, ny, nx, c)
    cells = cells.index_put((level.visible,), features)
    return cells.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(b, c, gz * nz, gy * ny, gx * nx)


def keep(x: Tensor, mask: Tensor, value: Tensor | float = 0.0) -> Tensor:
    """`x` at active voxels, `value` elsewhere."""
    fill = value if isinstance(value, Tensor) else x.new_tensor(value)
    return torch.where(mask, x, fill)


def conv3d(
    x: Tensor,
    mask: Tensor,
    out_mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Three,
    padding: Three,
    dilation: Three,
    groups: int,
) -> Tensor:
    """Dense convolution of the masked volume, kept on the output level's active voxels."""
    return keep(F.conv3d(keep(x, mask), weight, bias, stride, padding, dilation, groups), out_mask)


def conv_transpose3d(
    x: Tensor,
    mask: Tensor,
    out_mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Three,
    padding: Three,
    output_padding: Three,
    groups: int,
    dilation: Three,
) -> Tensor:
    """Dense transposed convolution of the masked volume, kept on the finer level's active voxels."""
    y = F.conv_transpose3d(
        keep(x, mask), weight, bias, stride, padding, output_padding, groups, dilation
    )
    return keep(y, out_mask)


def norm(
    x: Tensor,
    mask: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    per_sample: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalisation by the statistics of the active voxels of the batch, or of each sample.

    Returns:
        The dense result and the mean and biased variance `[segments, C]`, segments = 1 or B.
    """
    axes = (2, 3, 4) if per_sample else (0, 2, 3, 4)
    count = mask.expand(-1, 1, *x.shape[2:]).sum(axes, keepdim=True).clamp(min=1)
    mean = keep(x, mask).sum(axes, keepdim=True) / count
    var = keep((x - mean) ** 2, mask).sum(axes, keepdim=True) / count
    y = (x - mean) / torch.sqrt(var + eps)
    if weight is not None:
        y = y * weight.view(1, -1, 1, 1, 1)
    if bias is not None:
        y = y + bias.view(1, -1, 1, 1, 1)
    return keep(y, mask), mean.flatten(1), var.flatten(1)


def group_norm(
    x: Tensor, mask: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Normalisation of each sample's channel groups over its active voxels."""
    batch, channels, depth, *plane = x.shape
    # A group's channels, one after the other along depth, are one channel to the norm.
    joined = x.reshape(batch, groups, channels // groups * depth, *plane)
    y, _, _ = norm(joined, mask.repeat(1, 1, channels // groups, 1, 1), None, None, eps, True)
    y = y.view_as(x)
    if weight is not None:
        y = y * weight.view(1, -1, 1, 1, 1)
    if bias is not None:
        y = y + bias.view(1, -1, 1, 1, 1)
    return keep(y, mask)


def max_pool3d(
    x: Tensor,
    mask: Tensor,
    out_mask: Tensor,
    window: tuple[Three, Three, Three, Three],
    ceil_mode: bool,
    hidden: Literal["zero", "ignore"],
) -> Tensor:
    """Max pooling; hidden voxels count as 0 or are ignored. A window without active voxel gives 0."""
    kernel, stride, padding, dilation = window
    filled = keep(x, mask, 0.0 if hidden == "zero" else -math.inf)
    y = F.max_pool3d(filled, kernel, stride, padding, dilation, ceil_mode)
    seen = F.max_pool3d(mask.to(x.dtype), kernel, stride, padding, dilation, ceil_mode) > 0
    return keep(y, out_mask if hidden == "zero" else out_mask & seen)


def avg_pool3d(
    x: Tensor,
    mask: Tensor,
    out_mask: Tensor,
    window: tuple[Three, Three, Three],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    divisor: Literal["kernel", "active"],
) -> Tensor:
    """Average pooling; the divisor is torch's, or the number of active voxels in the window."""
    kernel, stride, padding = window
    args = (kernel, stride, padding, ceil_mode)
    # torch has no 16-bit avg_pool3d on the CPU.
    wide = x if x.dtype == torch.float64 else x.float()
    if divisor == "kernel":
        y = F.avg_pool3d(keep(wide, mask), *args, count_include_pad, divisor_override)
    else:
        total = F.avg_pool3d(keep(wide, mask), *args, True, 1)
        y = total / F.avg_pool3d(mask.to(wide.dtype), *args, True, 1).clamp(min=1)
    return keep(y, out_mask).to(x.dtype)


def global_pool(x: Tensor, mask: Tensor, maximum: bool) -> Tensor:
    """Mean or maximum `[B, C]` of each sample's active voxels, 0 for a sample without any."""
    count = mask.sum((2, 3, 4))
    if maximum:
        highest = keep(x, mask, -math.inf).amax((2, 3, 4))
        return torch.where(count > 0, highest, highest.new_zeros(()))
    return keep(x, mask).sum((2, 3, 4)) / count.clamp(min=1)


def densify(x: Tensor, mask: Tensor, token: Tensor | None) -> Tensor:
    """`x` at active voxels, the token `[C]` (or 0) at hidden ones."""
    return keep(x, mask, 0.0 if token is None else token.view(1, -1, 1, 1, 1))
