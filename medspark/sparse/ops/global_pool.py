"""Mean or maximum of each sample's active voxels (`csrc/include/medspark/global_pool.h`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from medspark.sparse import reference
from medspark.sparse._backend import current_backend
from medspark.sparse._ext import native
from medspark.sparse._op import check, code, core_starts, define_op, launch, threads
from medspark.sparse.ops.densify import dense_level
from medspark.sparse.tensor import BlockSparseTensor


def _core(x: Tensor, starts: Tensor, rows: int, maximum: bool) -> Any:
    address = core_starts(starts, x)
    return native().GlobalPool(
        code(x.dtype), starts.shape[0] - 1, address, rows, x.shape[-1], maximum, threads()
    )


def _forward(x: Tensor, starts: Tensor, maximum: bool) -> tuple[Tensor, Tensor]:
    x = check(x, "features", (None,) * 5)
    y = x.new_empty(starts.shape[0] - 1, x.shape[-1])
    argmax = (
        torch.empty_like(y, dtype=torch.int64) if maximum else x.new_empty(0, dtype=torch.int64)
    )
    core = _core(x, starts, x.shape[:-1].numel(), maximum)
    launch("global_pool", core, x, x.data_ptr(), y.data_ptr(), argmax.data_ptr())
    return y, argmax


def _forward_fake(x: Tensor, starts: Tensor, maximum: bool) -> tuple[Tensor, Tensor]:
    y = x.new_empty(starts.shape[0] - 1, x.shape[-1])
    return y, torch.empty_like(y, dtype=torch.int64) if maximum else x.new_empty(
        0, dtype=torch.int64
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, starts, maximum = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(starts, output[1])
    ctx.maximum, ctx.shape = maximum, list(x.shape)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    starts, argmax = ctx.saved_tensors
    return global_pool_input_op(grad, argmax, starts, ctx.maximum, ctx.shape), None, None


def _input(grad: Tensor, argmax: Tensor, starts: Tensor, maximum: bool, shape: list[int]) -> Tensor:
    size = (starts.shape[0] - 1, shape[-1])
    grad = check(grad, "grad", size)
    if maximum:
        argmax = check(argmax, "argmax", size)
        if argmax.dtype != torch.int64 or argmax.device != grad.device:
            raise TypeError(
                f"argmax must be int64 on {grad.device}, got {argmax.dtype} on {argmax.device}"
            )
    dx = grad.new_empty(shape)
    core = _core(grad, starts, dx.shape[:-1].numel(), maximum)
    launch("global_pool_input", core, grad, grad.data_ptr(), argmax.data_ptr(), dx.data_ptr())
    return dx


def _input_fake(
    grad: Tensor, argmax: Tensor, starts: Tensor, maximum: bool, shape: list[int]
) -> Tensor:
    return grad.new_empty(shape)


global_pool_input_op = define_op(
    "global_pool_input(Tensor grad, Tensor argmax, Tensor starts, bool maximum, int[] shape) -> Tensor",
    _input,
    _input_fake,
)
global_pool_op = define_op(
    "global_pool(Tensor x, Tensor starts, bool maximum) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _setup,
    _backward,
)


def global_pool(x: BlockSparseTensor, maximum: bool = False) -> Tensor:
    """Plain `[B, C]` mean (or maximum) over each sample's active voxels; 0 for a sample without any."""
    if current_backend() == "reference":
        return reference.global_pool(*dense_level(x), maximum)
    pooled: Tensor = global_pool_op(x.features, x.level.segment_starts(True), maximum)[0]
    return pooled
