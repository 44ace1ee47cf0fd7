"""Batch and instance normalisation over active voxels (`csrc/include/medspark/norm.h`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medspark.sparse import reference
from medspark.sparse._backend import current_backend
from medspark.sparse._ext import native
from medspark.sparse._op import (
    accumulation,
    check,
    check_device,
    code,
    core_starts,
    define_op,
    launch,
    threads,
)
from medspark.sparse.ops.densify import dense_level
from medspark.sparse.tensor import BlockSparseTensor


def _core(x: Tensor, starts: Tensor, eps: float) -> Any:
    address, rows = core_starts(starts, x), x.shape[:-1].numel()
    return native().Norm(
        code(x.dtype), starts.shape[0] - 1, address, rows, x.shape[-1], eps, threads()
    )


def _address(tensor: Tensor | None) -> int:
    return tensor.data_ptr() if tensor is not None else 0


def _parameter(tensor: Tensor | None, name: str, x: Tensor) -> Tensor | None:
    """Weight or bias `[C]` in the accumulation type."""
    if tensor is None:
        return None
    return check(tensor.to(accumulation(x.dtype)), name, (x.shape[-1],))


def _statistics(tensor: Tensor, name: str, size: tuple[int, int], x: Tensor) -> Tensor:
    """Mean or var `[segments, C]`, which the forward pass left in the accumulation type."""
    check_device(tensor, name, like=x)
    return check(tensor.to(accumulation(x.dtype)), name, size)


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, starts: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x = check(x, "features", (None,) * 5)
    weight, bias = _parameter(weight, "weight", x), _parameter(bias, "bias", x)
    y = x.new_empty(x.shape)
    mean = x.new_empty(starts.shape[0] - 1, x.shape[-1], dtype=accumulation(x.dtype))
    var = torch.empty_like(mean)
    launch(
        "norm", _core(x, starts, eps), x, x.data_ptr(), _address(weight), _address(bias),
        y.data_ptr(), mean.data_ptr(), var.data_ptr(),
    )  # fmt: skip
    return y, mean, var


def _forward_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, starts: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    size = (starts.shape[0] - 1, x.shape[-1])
    kind = accumulation(x.dtype)
    return x.new_empty(x.shape), x.new_empty(size, dtype=kind), x.new_empty(size, dtype=kind)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, starts, eps = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, weight, mean, var, starts)
    ctx.eps = eps
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mean, var, starts = ctx.saved_tensors
    dx, dw, db = norm_input_op(grad, x, weight, mean, var, starts, ctx.eps)
    return (
        dx,
        dw.to(weight.dtype) if weight is not None else None,
        db.to(ctx.bias_dtype) if ctx.bias_dtype is not None else None,
        None,
        None,
    )


def _input(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    starts: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = check(grad, "grad", tuple(x.shape), like=x)
    x, weight = check(x, "features", tuple(x.shape)), _parameter(weight, "weight", x)
    size = (starts.shape[0] - 1, x.shape[-1])
    mean, var = _statistics(mean, "mean", size, x), _statistics(var, "var", size, x)
    dx = x.new_empty(x.shape)
    dw = x.new_empty(x.shape[-1], dtype=accumulation(x.dtype))
    db = x.new_empty(x.shape[-1], dtype=accumulation(x.dtype))
    launch(
        "norm_input", _core(x, starts, eps), x, grad.data_ptr(), x.data_ptr(), _address(weight),
        mean.data_ptr(), var.data_ptr(), dx.data_ptr(), dw.data_ptr(), db.data_ptr(),
    )  # fmt: skip
    return dx, dw, db


def _input_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    starts: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    kind = accumulation(x.dtype)
    channels = x.shape[-1]
    return (
        x.new_empty(x.shape),
        x.new_empty(channels, dtype=kind),
        x.new_empty(channels, dtype=kind),
    )


norm_input_op = define_op(
    "norm_input(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor var, Tensor starts, "
    "float eps) -> (Tensor, Tensor, Tensor)",
    _input,
    _input_fake,
)
norm_op = define_op(
    "norm(Tensor x, Tensor? weight, Tensor? bias, Tensor starts, float eps) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    _setup,
    _backward,
)


def norm_features(
    x: BlockSparseTensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    per_sample: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalises by the statistics of the active voxels of the batch, or of each sample.

    Returns:
        Packed features, and mean and biased variance `[segments, C]` (segments = 1 or B).
    """
    if current_backend() == "reference":
        dense, mask = dense_level(x)
        y, mean, var = reference.norm(dense, mask, weight, bias, eps, per_sample)
        return reference.pack(y, x.level), mean.detach(), var.detach()
    starts = x.level.segment_starts(per_sample)
    results: tuple[Tensor, Tensor, Tensor] = norm_op(x.features, weight, bias, starts, eps)
    return results


def group_norm_features(
    x: BlockSparseTensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Packed features, each sample's channel groups normalised over its active voxels.

    To the kernel a group is one channel, with a row for each voxel and channel of the group.
    """
    if current_backend() == "reference":
        y = reference.group_norm(*dense_level(x), groups, weight, bias, eps)
        return reference.pack(y, x.level)
    features, depth = x.features, x.shape[1] // groups
    rows = features.reshape(-1, groups, depth).transpose(1, 2).reshape(-1, 1, 1, 1, groups)
    starts = x.level.segment_starts(True) * depth
    normalised = norm_op(rows, None, None, starts, eps)[0]
    y = normalised.view(-1, depth, groups).transpose(1, 2).reshape(features.shape)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    result: Tensor = y.to(features.dtype)
    return result
