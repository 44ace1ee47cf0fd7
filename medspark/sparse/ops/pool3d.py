"""Max and average pooling over active voxels (`csrc/include/medspark/pool3d.h`)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from medspark.sparse import reference
from medspark.sparse._backend import current_backend
from medspark.sparse._ext import native
from medspark.sparse._op import (
    check,
    code,
    core_level,
    core_window,
    define_op,
    launch,
    tables,
    threads,
)
from medspark.sparse.mask import Level
from medspark.sparse.ops.densify import dense_level
from medspark.sparse.tensor import BlockSparseTensor

_LEVELS = (
    "Tensor in_cells, Tensor in_blocks, int[] in_block, "
    "Tensor out_cells, Tensor out_blocks, int[] out_block"
)
_MAX = f"{_LEVELS}, int[] kernel, int[] stride, int[] padding, int[] dilation, bool hidden_is_zero"
_AVG = (
    f"{_LEVELS}, int[] kernel, int[] stride, int[] padding, "
    "bool divide_by_active, bool count_padding, int divisor_override"
)
_MOST_TAPS = torch.iinfo(torch.int16).max


def _core(x: Tensor, levels: tuple[Any, ...], window: Any, flags: tuple[Any, ...]) -> Any:
    in_cells, in_blocks, in_block, out_cells, out_blocks, out_block = levels
    return native().Pool3d(
        code(x.dtype),
        core_level(in_cells, in_blocks, in_block, x),
        core_level(out_cells, out_blocks, out_block, x),
        window,
        x.shape[-1],
        *flags,
        threads(),
    )


def _max_core(x: Tensor, args: tuple[Any, ...]) -> Any:
    kernel, stride, padding, dilation, hidden_is_zero = args[6:]
    window = core_window(kernel, stride, padding, dilation)
    return _core(x, args[:6], window, (hidden_is_zero, False, True, 0))


def _avg_core(x: Tensor, args: tuple[Any, ...]) -> Any:
    kernel, stride, padding, by_active, count_padding, override = args[6:]
    window = core_window(kernel, stride, padding, (1, 1, 1))
    return _core(x, args[:6], window, (True, by_active, count_padding, override))


def _in_shape(args: tuple[Any, ...], channels: int | None) -> tuple[int | None, ...]:
    return (args[1].shape[0], *args[2], channels)


def _out_shape(args: tuple[Any, ...], channels: int) -> tuple[int, ...]:
    return (args[4].shape[0], *args[5], channels)


def _max(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    x = check(x, "features", _in_shape(args, None))
    y = x.new_empty(_out_shape(args, x.shape[-1]))
    argmax = torch.empty_like(y, dtype=torch.int16)
    launch("max_pool3d", _max_core(x, args), x, x.data_ptr(), y.data_ptr(), argmax.data_ptr())
    return y, argmax


def _max_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    y = x.new_empty(_out_shape(args, x.shape[-1]))
    return y, torch.empty_like(y, dtype=torch.int16)


def _max_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, *args = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], args[0], args[1], args[3], args[4])
    ctx.rest = (args[2], args[5], args[6:])


def _max_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    argmax, *index = ctx.saved_tensors
    in_block, out_block, rest = ctx.rest
    dx = max_pool3d_input_op(
        grad, argmax, index[0], index[1], in_block, index[2], index[3], out_block, *rest
    )
    return dx, *(None,) * 11


def _max_input(grad: Tensor, argmax: Tensor, *args: Any) -> Tensor:
    shape = _out_shape(args, argmax.shape[-1])
    grad, argmax = check(grad, "grad", shape), check(argmax, "argmax", shape)
    if argmax.dtype != torch.int16 or argmax.device != grad.device:
        raise TypeError(
            f"argmax must be int16 on {grad.device}, got {argmax.dtype} on {argmax.device}"
        )
    dx = grad.new_empty(cast("list[int]", _in_shape(args, grad.shape[-1])))
    core = _max_core(grad, args)
    launch("max_pool3d_input", core, grad, grad.data_ptr(), argmax.data_ptr(), dx.data_ptr())
    return dx


def _input_fake(grad: Tensor, *args: Any) -> Tensor:
    levels = args if args[0].dtype == torch.int32 else args[1:]
    return grad.new_empty(cast("list[int]", _in_shape(levels, grad.shape[-1])))


def _avg(x: Tensor, *args: Any) -> Tensor:
    x = check(x, "features", _in_shape(args, None))
    y = x.new_empty(_out_shape(args, x.shape[-1]))
    launch("avg_pool3d", _avg_core(x, args), x, x.data_ptr(), y.data_ptr())
    return y


def _avg_fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(_out_shape(args, x.shape[-1]))


def _avg_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *args = inputs
    ctx.save_for_backward(args[0], args[1], args[3], args[4])
    ctx.rest = (args[2], args[5], args[6:])


def _avg_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    index = ctx.saved_tensors
    in_block, out_block, rest = ctx.rest
    dx = avg_pool3d_input_op(
        grad, index[0], index[1], in_block, index[2], index[3], out_block, *rest
    )
    return dx, *(None,) * 12


def _avg_input(grad: Tensor, *args: Any) -> Tensor:
    grad = check(grad, "grad", _out_shape(args, grad.shape[-1]))
    dx = grad.new_empty(cast("list[int]", _in_shape(args, grad.shape[-1])))
    launch("avg_pool3d_input", _avg_core(grad, args), grad, grad.data_ptr(), dx.data_ptr())
    return dx


max_pool3d_input_op = define_op(
    f"max_pool3d_input(Tensor grad, Tensor argmax, {_MAX}) -> Tensor", _max_input, _input_fake
)
avg_pool3d_input_op = define_op(
    f"avg_pool3d_input(Tensor grad, {_AVG}) -> Tensor", _avg_input, _input_fake
)
max_pool3d_op = define_op(
    f"max_pool3d(Tensor x, {_MAX}) -> (Tensor, Tensor)", _max, _max_fake, _max_setup, _max_backward
)
avg_pool3d_op = define_op(
    f"avg_pool3d(Tensor x, {_AVG}) -> Tensor", _avg, _avg_fake, _avg_setup, _avg_backward
)


def _level_args(x: BlockSparseTensor, out: Level) -> tuple[Any, ...]:
    return (*tables(x.level), list(x.level.block), *tables(out), list(out.block))


def max_pool3d_features(
    x: BlockSparseTensor,
    out: Level,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> Tensor:
    """Packed features of max pooling on the level `out`; hidden voxels as `x.semantics.max_pool` says.

    Raises:
        ValueError: the kernel has more taps than the stored argmax can name (32,767).
    """
    if kernel[0] * kernel[1] * kernel[2] > _MOST_TAPS:
        raise ValueError(f"max pooling kernel {kernel} has more than {_MOST_TAPS} voxels")
    hidden = x.semantics.max_pool
    if current_backend() == "reference":
        dense, mask = dense_level(x)
        window = cast("Any", tuple(map(tuple, (kernel, stride, padding, dilation))))
        out_mask = reference.voxel_mask(out)
        return reference.pack(
            reference.max_pool3d(dense, mask, out_mask, window, ceil_mode, hidden), out
        )
    args = (kernel, stride, padding, dilation, hidden == "zero")
    features: Tensor = max_pool3d_op(x.features, *_level_args(x, out), *args)[0]
    return features


def avg_pool3d_features(
    x: BlockSparseTensor,
    out: Level,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Packed features of average pooling on `out`; the divisor as `x.semantics.avg_divisor` says."""
    divisor = x.semantics.avg_divisor
    if current_backend() == "reference":
        dense, mask = dense_level(x)
        window = cast("Any", tuple(map(tuple, (kernel, stride, padding))))
        args = (window, ceil_mode, count_include_pad, divisor_override, divisor)
        return reference.pack(
            reference.avg_pool3d(dense, mask, reference.voxel_mask(out), *args), out
        )
    flags = (divisor == "active", count_include_pad, divisor_override or 0)
    features: Tensor = avg_pool3d_op(
        x.features, *_level_args(x, out), kernel, stride, padding, *flags
    )
    return features
