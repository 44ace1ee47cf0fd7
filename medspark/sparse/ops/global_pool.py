"""Mean or maximum of each sample's active voxels (`csrc/include/medspark/global_pool.h`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medspark.sparse import reference
from medspark.sparse._backend import current_backend
from medspark.sparse._ext import native
from medspark.sparse._op import Config, Saved, check, code, core_starts, define_op, launch, threads
from medspark.sparse.ops.densify import dense_level
from medspark.sparse.tensor import BlockSparseTensor


class _Fields(NamedTuple):
    starts: Tensor
    maximum: bool
    shape: Sequence[int]


class Samples(_Fields, Config):
    """First row of each sample, then the number of rows; maximum or mean; shape of the features."""


def _core(x: Tensor, config: Samples) -> Any:
    return config.core((x.dtype, x.device, threads()), lambda: _build_core(x, config))


def _build_core(x: Tensor, config: Samples) -> Any:
    address = core_starts(config.starts, x)
    batch, rows = config.starts.shape[0] - 1, math.prod(config.shape[:-1])
    return native().GlobalPool(
        code(x.dtype), batch, address, rows, x.shape[-1], config.maximum, threads()
    )


def _forward(x: Tensor, config: Samples) -> tuple[Tensor, Tensor]:
    x = check(x, "global pool: features", tuple(config.shape))
    y, argmax = _fake(x, config)
    launch("global_pool", _core(x, config), x, x.data_ptr(), y.data_ptr(), argmax.data_ptr())
    return y, argmax


def _fake(x: Tensor, config: Samples) -> tuple[Tensor, Tensor]:
    y = x.new_empty(config.starts.shape[0] - 1, x.shape[-1])
    return y, x.new_empty(y.shape if config.maximum else 0, dtype=torch.int64)


def _save(x: Tensor, config: Samples, output: tuple[Tensor, Tensor]) -> tuple[Tensor]:
    return (output[1],)


def _backward(saved: Saved, grad: Tensor, _: Tensor) -> tuple[Tensor]:
    return (global_pool_input_op(grad, *saved.tensors, saved.config),)


def _input(grad: Tensor, argmax: Tensor, config: Samples) -> Tensor:
    size = (config.starts.shape[0] - 1, config.shape[-1])
    grad = check(grad, "global pool: grad", size)
    if config.maximum:
        argmax = check(argmax, "global pool: argmax", size)
        if argmax.dtype != torch.int64 or argmax.device != grad.device:
            raise TypeError(
                f"argmax must be int64 on {grad.device}, got {argmax.dtype} on {argmax.device}"
            )
    dx = _input_fake(grad, argmax, config)
    core = _core(grad, config)
    launch("global_pool_input", core, grad, grad.data_ptr(), argmax.data_ptr(), dx.data_ptr())
    return dx


def _input_fake(grad: Tensor, argmax: Tensor, config: Samples) -> Tensor:
    return grad.new_empty(list(config.shape))


global_pool_input_op = define_op(
    "global_pool_input(Tensor grad, Tensor argmax, Tensor starts, bool maximum, SymInt[] shape) -> Tensor",
    Samples,
    _input,
    _input_fake,
)
global_pool_op = define_op(
    "global_pool(Tensor x, Tensor starts, bool maximum, SymInt[] shape) -> (Tensor, Tensor)",
    Samples,
    _forward,
    _fake,
    _save,
    _backward,
)


def global_pool(x: BlockSparseTensor, maximum: bool = False) -> Tensor:
    """Plain `[B, C]` mean (or maximum) over each sample's active voxels; 0 for a sample without any."""
    if current_backend() == "reference":
        return reference.global_pool(*dense_level(x), maximum)
    level = x.level
    features = x.features
    config = level.plan(
        ("global_pool", maximum, features.shape[-1]),
        lambda: Samples(level.segment_starts(True), maximum, list(features.shape)),
    )
    pooled: Tensor = global_pool_op(features, config)[0]
    return pooled
