"""Masked patch loss: squared error against standardised patches (SparK, arXiv 2301.03580)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def patchify(volume: Tensor, cell: Sequence[int]) -> Tensor:
    """[B, C, *spatial] -> [B, L, C * prod(cell)]; patches and voxels in row-major (z, y, x) order.

    Raises:
        ValueError: the spatial size is no multiple of the cell.
    """
    grid = _grid(volume.shape[2:], cell)
    n = len(grid)
    split = [size for pair in zip(grid, cell, strict=True) for size in pair]
    x = volume.reshape(*volume.shape[:2], *split)
    grid_axes = [2 + 2 * i for i in range(n)]
    cell_axes = [3 + 2 * i for i in range(n)]
    x = x.permute(0, *grid_axes, 1, *cell_axes)
    return x.reshape(volume.shape[0], math.prod(grid), volume.shape[1] * math.prod(cell))


def unpatchify(patches: Tensor, spatial: Sequence[int], cell: Sequence[int]) -> Tensor:
    """Inverse of ``patchify``: [B, L, C * prod(cell)] -> [B, C, *spatial].

    Raises:
        ValueError: ``patches`` does not hold a volume of that size.
    """
    grid = _grid(spatial, cell)
    batch, length, values = patches.shape
    if length != math.prod(grid) or values % math.prod(cell):
        raise ValueError(
            f"patches [{batch}, {length}, {values}] do not fill {tuple(spatial)} in cells of "
            f"{tuple(cell)}: {math.prod(grid)} patches of n * {math.prod(cell)} values are needed"
        )
    n = len(grid)
    x = patches.reshape(batch, *grid, values // math.prod(cell), *cell)
    axes = [axis for i in range(n) for axis in (1 + i, 2 + n + i)]
    return x.permute(0, 1 + n, *axes).reshape(batch, -1, *spatial)


def standardise(
    patches: Tensor, eps: float = 1e-6, variance_floor: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Standardises each patch over all its values: (patches, mean, scale), the last two [B, L, 1].

    ``scale = sqrt(max(var, variance_floor) + eps)`` with the unbiased variance. With a floor of
    zero (the official target) a patch of air turns its noise into a target of unit variance.

    Raises:
        ValueError: patches of one value, which have no variance.
    """
    if patches.shape[-1] < 2:
        raise ValueError("a patch of one value has no variance; use a larger cell or a raw target")
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=1)
    scale = (var.clamp(min=variance_floor) + eps).sqrt()
    return (patches - mean) / scale, mean, scale


def masked_patch_loss(
    prediction: Tensor,
    target_volume: Tensor,
    mask_visible: Tensor,
    cell: Sequence[int],
    normalise: bool = True,
    eps: float = 1e-6,
    variance_floor: float = 0.0,
) -> Tensor:
    """Mean over all hidden patches of the batch of the mean squared error in each.

    Computed in float32 (float64 stays), under autocast too. Visible patches carry no loss.

    Args:
        prediction: [B, C, *spatial], in the standardised space of each patch if ``normalise``.
        target_volume: [B, C, *spatial], as fed to the network.
        mask_visible: bool [B, *grid], True = visible.
        cell: voxels per patch and axis.
        normalise: target is (x - mean) / sqrt(max(var, variance_floor) + eps) per patch; else x.
        eps: added to the variance.
        variance_floor: least variance, in squared units of ``target_volume``.

    Returns:
        Scalar; 0 (with a gradient of 0) where nothing is hidden.

    Raises:
        ValueError: shapes do not fit each other or the cell.
    """
    _check(prediction, target_volume, mask_visible, cell)
    with torch.autocast(prediction.device.type, enabled=False):
        target = _target(target_volume, cell, normalise, eps, variance_floor)
        error = (patchify(_wide(prediction), cell) - target).square().mean(dim=-1)
        return _mean_hidden(error, mask_visible)


def constant_baseline(
    target_volume: Tensor,
    mask_visible: Tensor,
    cell: Sequence[int],
    normalise: bool = True,
    eps: float = 1e-6,
    variance_floor: float = 0.0,
) -> Tensor:
    """``masked_patch_loss`` of the best constant prediction on the same masks.

    Standardised targets have mean 0 in every patch (the floor changes their scale, not their mean),
    so the error of a constant c is mean(t^2) + c^2 patch by patch: 0 is best, even with a constant
    per patch. A raw target has no such point; there it is the mean of the hidden voxels.

    Args and errors as in ``masked_patch_loss``.
    """
    _check(target_volume, target_volume, mask_visible, cell)
    target = _target(target_volume, cell, normalise, eps, variance_floor)
    constant = target.new_zeros(()) if normalise else _mean_hidden(target.mean(-1), mask_visible)
    return _mean_hidden((target - constant).square().mean(dim=-1), mask_visible)


def _target(
    volume: Tensor, cell: Sequence[int], normalise: bool, eps: float, floor: float
) -> Tensor:
    patches = patchify(_wide(volume.detach()), cell)
    return standardise(patches, eps, floor)[0] if normalise else patches


def _mean_hidden(per_patch: Tensor, mask_visible: Tensor) -> Tensor:
    hidden = ~mask_visible.flatten(1)
    return per_patch.where(hidden, 0.0).sum() / hidden.sum().clamp(min=1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _grid(spatial: Sequence[int], cell: Sequence[int]) -> list[int]:
    if len(spatial) != len(cell) or any(s % c for s, c in zip(spatial, cell, strict=True)):
        raise ValueError(f"spatial size {tuple(spatial)} is no multiple of the cell {tuple(cell)}")
    return [s // c for s, c in zip(spatial, cell, strict=True)]


def _check(prediction: Tensor, target: Tensor, visible: Tensor, cell: Sequence[int]) -> None:
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape"
        )
    expected = (target.shape[0], *_grid(target.shape[2:], cell))
    if visible.dtype != torch.bool or tuple(visible.shape) != expected:
        raise ValueError(
            f"mask is {visible.dtype} {tuple(visible.shape)}, but a target {tuple(target.shape)} "
            f"in cells of {tuple(cell)} needs bool {expected}"
        )
