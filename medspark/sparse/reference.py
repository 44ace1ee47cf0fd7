"""Every op in plain torch on dense tensors: the oracle of the kernels, and the slow backend.

A level is a dense tensor `[B, C, D, H, W]` and a boolean voxel mask `[B, 1, D, H, W]`. Each function
replaces hidden voxels by 0 with `where` (never by a product, so hidden NaN stays out), applies torch's
own op, and keeps the result at the active voxels of the output level. This is how SparK
(arXiv 2301.03580) defines sparse ops by masking.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from medspark.sparse.mask import Level

Three = tuple[int, int, int]


def three(numbers: Sequence[int]) -> Three:
    """Three numbers (z, y, x) as torch takes them."""
    z, y, x = numbers
    return z, y, x


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


def dense_level(features: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """Dense 5-axis tensor and voxel mask of packed blocks."""
    return unpack(features, level), voxel_mask(level)


def keep(x: Tensor, mask: Tensor, value: Tensor | float = 0.0) -> Tensor:
    """`x` at active voxels, `value` elsewhere."""
    fill = value if isinstance(value, Tensor) else x.new_tensor(value)
    return torch.where(mask, x, fill)


def _pad(x: Tensor, like: Tensor, window: tuple[Sequence[int], ...], value: float = 0.0) -> Tensor:
    """`x` with the padding of a window below each axis, and above as much as the size of `like` needs."""
    pads: list[int] = []
    for n, o, k, s, p, d in zip(x.shape[2:], like.shape[2:], *window, strict=True):
        pads = [p, max((o - 1) * s + d * (k - 1) + 1 - n - p, 0), *pads]  # torch: last axis first
    return F.pad(x, pads, value=value)


def _crop(y: Tensor, like: Tensor) -> Tensor:
    """Without the outputs behind the size of `like`."""
    _, _, depth, height, width = like.shape
    return y[..., :depth, :height, :width]


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
    """Dense convolution of the masked volume, kept on the output level's active voxels.

    `padding` counts zeros below each axis; above there are as many as the size of `out_mask` needs.
    """
    kernel = weight.shape[2:]
    padded = _pad(keep(x, mask), out_mask, (kernel, stride, padding, dilation))
    y = F.conv3d(padded, weight, bias, stride, 0, dilation, groups)
    return keep(_crop(y, out_mask), out_mask)


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
    wide = x if x.dtype == torch.float64 else x.float()  # 16-bit sums overflow
    count = mask.expand(-1, 1, *x.shape[2:]).sum(axes, keepdim=True).clamp(min=1)
    mean = keep(wide, mask).sum(axes, keepdim=True) / count
    var = keep((wide - mean) ** 2, mask).sum(axes, keepdim=True) / count
    y = ((wide - mean) / torch.sqrt(var + eps)).to(x.dtype)
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
    hidden: Literal["zero", "ignore"],
) -> Tensor:
    """Max pooling; hidden voxels count as 0 or are ignored. A window without any voxel gives 0.

    The size of `out_mask` says all that `ceil_mode` does. Torch's own padding is not used: where a
    window holds nothing else, its gradient is written outside the volume.
    """
    kernel, stride, _, dilation = window

    def highest(values: Tensor, outside: float) -> Tensor:
        padded = _pad(values, out_mask, window, outside)
        return _crop(F.max_pool3d(padded, kernel, stride, 0, dilation), out_mask)

    y = highest(keep(x, mask, 0.0 if hidden == "zero" else -math.inf), -math.inf)
    counts = torch.ones_like(mask) if hidden == "zero" else mask
    return keep(y, out_mask & (highest(counts.to(x.dtype), 0.0) > 0))


def avg_pool3d(
    x: Tensor,
    mask: Tensor,
    out_mask: Tensor,
    window: tuple[Three, Three, Three],
    count_include_pad: bool,
    divisor_override: int | None,
    divisor: Literal["kernel", "active"],
) -> Tensor:
    """Average pooling; the divisor is torch's, or the number of active voxels in the window.

    Sums over windows, each divided by the sum of what counts: torch's own takes no axis that is
    shorter than the kernel. The size of `out_mask` says all that `ceil_mode` does; what that mode adds
    behind the padding never counts.
    """
    kernel, stride, padding = window

    def total(values: Tensor, below: Three) -> Tensor:
        padded = _pad(values, out_mask, (kernel, stride, below, (1, 1, 1)))
        return _crop(F.avg_pool3d(padded, kernel, stride, divisor_override=1), out_mask)

    # torch has no 16-bit avg_pool3d on the CPU.
    wide = x if x.dtype == torch.float64 else x.float()
    if divisor == "active":
        count = total(mask.to(wide.dtype), padding)
    elif divisor_override:
        count = wide.new_tensor(divisor_override)
    else:
        both = [p for p in reversed(padding) for _ in range(2)]
        counts = F.pad(torch.ones_like(wide[:1, :1]), both, value=float(count_include_pad))
        count = total(counts, (0, 0, 0))
    return keep(total(keep(wide, mask), padding) / count.clamp(min=1), out_mask).to(x.dtype)


def global_pool(x: Tensor, mask: Tensor, maximum: bool) -> Tensor:
    """Mean or maximum `[B, C]` of each sample's active voxels, 0 for a sample without any."""
    count = mask.sum((2, 3, 4))
    if maximum:
        highest = keep(x, mask, -math.inf).amax((2, 3, 4))
        return torch.where(count > 0, highest, highest.new_zeros(()))
    wide = x if x.dtype == torch.float64 else x.float()
    return (keep(wide, mask).sum((2, 3, 4)) / count.clamp(min=1)).to(x.dtype)


def densify(x: Tensor, mask: Tensor, token: Tensor | None) -> Tensor:
    """`x` at active voxels, the token `[C]` (or 0) at hidden ones."""
    return keep(x, mask, 0.0 if token is None else token.view(1, -1, 1, 1, 1))


def transfer(x: Tensor, mask: Tensor, out_mask: Tensor, token: Tensor | None) -> Tensor:
    """Other active voxels: `x` where it is active, the token `[C]` (or 0) where only `out_mask` is."""
    return keep(densify(x, mask, token), out_mask)


def interpolate(
    x: Tensor,
    mask: Tensor,
    out_mask: Tensor,
    size: Three,
    mode: Literal["nearest", "nearest-exact", "linear"],
    align_corners: bool,
    scales: tuple[float, float, float] | None,
) -> Tensor:
    """Dense interpolation of the masked volume to `size`, or by `scales` that lead to it.

    Kept on the output level's active voxels. "linear" is linear along each axis: torch's trilinear.
    """
    # torch has no 16-bit kernel for each of the modes on the CPU.
    wide = x if x.dtype == torch.float64 else x.float()
    y = F.interpolate(
        keep(wide, mask),
        size if scales is None else None,
        scales,
        "trilinear" if mode == "linear" else mode,
        align_corners if mode == "linear" else None,
    )
    return keep(y, out_mask).to(x.dtype)
