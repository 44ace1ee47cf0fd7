"""Batch and instance normalisation over active voxels (`csrc/include/medspark/norm.h`)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from medspark.sparse import reference
from medspark.sparse._backend import current_backend
from medspark.sparse._ext import native
from medspark.sparse._op import (
    Config,
    Saved,
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


class _Fields(NamedTuple):
    starts: Tensor
    eps: float


class Segments(_Fields, Config):
    """First row of each segment, then the number of rows; and what is added to variances."""


def _core(x: Tensor, segments: Segments) -> Any:
    key = (x.dtype, x.device, x.shape, threads())
    return segments.core(key, lambda: _build_core(x, segments))


def _build_core(x: Tensor, segments: Segments) -> Any:
    starts, eps = segments
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
    kind = accumulation(x.dtype)
    if tensor.dtype is not kind:
        tensor = tensor.to(kind)
    if tensor.device != x.device:
        check_device(tensor, name, like=x)
    if tensor.shape != (x.shape[-1],) or not tensor.is_contiguous():
        tensor = check(tensor, name, (x.shape[-1],))
    return tensor


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, segments: Segments
) -> tuple[Tensor, Tensor]:
    if x.ndim != 5 or not x.is_contiguous() or not x.is_cpu:
        x = check(x, "norm: features", (None,) * 5)
    weight, bias = _parameter(weight, "norm: weight", x), _parameter(bias, "norm: bias", x)
    y, stats = _fake(x, weight, bias, segments)
    mean, var = _addresses(stats)
    launch(
        "norm", _core(x, segments), x, x.data_ptr(), _address(weight), _address(bias),
        y.data_ptr(), mean, var,
    )  # fmt: skip
    return y, stats


def _addresses(stats: Tensor) -> tuple[int, int]:
    """Of the means and of the variances."""
    first = stats.data_ptr()
    return first, first + stats.numel() // 2 * stats.element_size()


def _fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, segments: Segments
) -> tuple[Tensor, Tensor]:
    size = (2, segments.starts.shape[0] - 1, x.shape[-1])
    return x.new_empty(x.shape), x.new_empty(size, dtype=accumulation(x.dtype))


def _save(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, segments: Segments, output: Any
) -> tuple[Tensor | None, ...]:
    return x, weight, output[1]


def _backward(saved: Saved, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx, dw, db = norm_input_op(grad, *saved.tensors, saved.config)
    return dx, dw if saved.needs[1] else None, db if saved.needs[2] else None


def _input(
    grad: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    grad = check(grad, "norm: grad", x.shape, like=x)
    x, weight = check(x, "norm: features", x.shape), _parameter(weight, "norm: weight", x)
    check_device(stats, "norm: stats", like=x)
    size = (2, segments.starts.shape[0] - 1, x.shape[-1])
    mean, var = _addresses(check(stats.to(accumulation(x.dtype)), "norm: stats", size))
    dx, dw, db = _input_fake(grad, x, weight, stats, segments)
    launch(
        "norm_input", _core(x, segments), x, grad.data_ptr(), x.data_ptr(), _address(weight),
        mean, var, dx.data_ptr(), dw.data_ptr(), db.data_ptr(),
    )  # fmt: skip
    return dx, dw, db


def _input_fake(
    grad: Tensor, x: Tensor, weight: Tensor | None, stats: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    kind, channels = accumulation(x.dtype), x.shape[-1]
    return (
        x.new_empty(x.shape),
        x.new_empty(channels, dtype=kind),
        x.new_empty(channels, dtype=kind),
    )


norm_input_op = define_op(
    "norm_input(Tensor grad, Tensor x, Tensor? weight, Tensor stats, Tensor starts, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    Segments,
    _input,
    _input_fake,
)
norm_op = define_op(
    "norm(Tensor x, Tensor? weight, Tensor? bias, Tensor starts, float eps) -> (Tensor, Tensor)",
    Segments,
    _forward,
    _fake,
    _save,
    _backward,
)


def norm_features(
    x: BlockSparseTensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    per_sample: bool,
) -> tuple[Tensor, Tensor]:
    """Normalises by the statistics of the active voxels of the batch, or of each sample.

    Returns:
        Packed features, and means and biased variances `[2, segments, C]` (segments = 1 or B).
    """
    if current_backend() == "reference":
        dense, mask = dense_level(x)
        y, mean, var = reference.norm(dense, mask, weight, bias, eps, per_sample)
        return reference.pack(y, x.level), torch.stack([mean, var]).detach()
    level = x.level
    segments = level.plan(
        ("norm", per_sample, eps), lambda: Segments(level.segment_starts(per_sample), eps)
    )
    results: tuple[Tensor, Tensor] = norm_op(x.features, weight, bias, segments)
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
    level = x.level
    segments = level.plan(
        ("group_norm", depth, eps), lambda: Segments(level.segment_starts(True) * depth, eps)
    )
    normalised = norm_op(rows, None, None, segments)[0]
    y = normalised.view(-1, depth, groups).transpose(1, 2).reshape(features.shape)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    result: Tensor = y.to(features.dtype)
    return result
