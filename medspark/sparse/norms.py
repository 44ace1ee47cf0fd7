"""What normalisations do when they meet a BlockSparseTensor: statistics are those of active voxels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medspark.sparse.casts import widened
from medspark.sparse.ops.norm import group_norm_features, norm_features
from medspark.sparse.tensor import BlockSparseTensor, ChannelsLastView, implements, like


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
    channels = x.shape[1]
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and tuple(parameter.shape) != (channels,):
            raise ValueError(
                f"group_norm: {name} {tuple(parameter.shape)} does not fit input {tuple(x.shape)}"
            )
    x = widened(x, "cuda")
    if num_groups == channels:
        return like(x, norm_features(x, weight, bias, eps, per_sample=True)[0])
    return like(x, group_norm_features(x, num_groups, weight, bias, eps))


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
    y, stats = norm_features(x, weight, bias, eps, per_sample=False)
    if running_mean is not None and running_var is not None and rows:
        mean, var = stats.view(2, -1).unbind()
        unbiased = var * (rows / (rows - 1))
        _update_running(running_mean, running_var, mean, unbiased, momentum)
    return like(x, y)


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
    return like(x, y.view_as(x.features))


def _update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, share: float | Tensor
) -> None:
    """Exponential averages as torch keeps them: unbiased variance, `share` of the new value."""
    running_mean.lerp_(mean.to(running_mean.dtype), share)
    running_var.lerp_(var.to(running_var.dtype), share)


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
    y, stats = norm_features(x, weight, bias, eps, per_sample=True)
    if running_mean is not None and running_var is not None:
        mean, var = stats.unbind()
        # torch averages over samples; those without active voxels have no statistics.
        rows = x.level.segment_starts(True).diff().to(mean)
        weights = (rows > 0).to(mean)
        weights = weights / weights.sum().clamp(min=1)
        unbiased = var * (rows / (rows - 1).clamp(min=1))[:, None]
        share = momentum * (rows.sum() > 0).to(mean)  # nothing seen, nothing learned
        _update_running(running_mean, running_var, weights @ mean, weights @ unbiased, share)
    return like(x, y)


@implements(F.layer_norm, torch.layer_norm, on=ChannelsLastView)
def _layer_norm(
    x: ChannelsLastView,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> BlockSparseTensor:
    if tuple(normalized_shape) != (x.shape[-1],):
        raise NotImplementedError(
            f"layer_norm of a BlockSparseTensor works per voxel, over the {x.shape[-1]} channels, got "
            f"{tuple(normalized_shape)}"
        )
    return like(x, F.layer_norm(x.features, (x.shape[-1],), weight, bias, eps))


@implements(F.layer_norm, torch.layer_norm)
def _layer_norm_channels_first(
    x: BlockSparseTensor, normalized_shape: Any, *_: Any, **__: Any
) -> Any:
    raise NotImplementedError(
        f"layer_norm over the last axes {tuple(normalized_shape)} of a BlockSparseTensor {tuple(x.shape)}: "
        "permute the channels to the end first, x.permute(0, 2, 3, 4, 1)"
    )
