"""Max and average pooling over active voxels (`csrc/include/medspark/pool3d.h`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medspark.sparse import reference
from medspark.sparse._backend import current_backend
from medspark.sparse._ext import native
from medspark.sparse._op import (
    Config,
    Saved,
    check,
    code,
    core_level,
    core_window,
    define_op,
    launch,
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
MOST_TAPS = torch.iinfo(torch.int16).max


class _MaxFields(NamedTuple):
    in_cells: Tensor
    in_blocks: Tensor
    in_block: Sequence[int]
    out_cells: Tensor
    out_blocks: Tensor
    out_block: Sequence[int]
    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    hidden_is_zero: bool


class MaxPool(_MaxFields, Config):
    """Levels and window of a max pool, and what hidden voxels are."""

    def window_and_flags(self) -> tuple[Any, tuple[Any, ...]]:
        """As the core takes them."""
        window = core_window(self.kernel, self.stride, self.padding, self.dilation)
        return window, (self.hidden_is_zero, False, True, 0)


class _AvgFields(NamedTuple):
    in_cells: Tensor
    in_blocks: Tensor
    in_block: Sequence[int]
    out_cells: Tensor
    out_blocks: Tensor
    out_block: Sequence[int]
    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    divide_by_active: bool
    count_padding: bool
    divisor_override: int


class AvgPool(_AvgFields, Config):
    """Levels and window of an average pool, and its divisor."""

    def window_and_flags(self) -> tuple[Any, tuple[Any, ...]]:
        """As the core takes them."""
        window = core_window(self.kernel, self.stride, self.padding, (1, 1, 1))
        return window, (True, self.divide_by_active, self.count_padding, self.divisor_override)


def _core(x: Tensor, config: MaxPool | AvgPool) -> Any:
    return config.core((x.dtype, x.device, x.shape[-1], threads()), lambda: _build_core(x, config))


def _build_core(x: Tensor, config: MaxPool | AvgPool) -> Any:
    in_cells, in_blocks, in_block, out_cells, out_blocks, out_block = config[:6]
    window, flags = config.window_and_flags()
    return native().Pool3d(
        code(x.dtype),
        core_level(in_cells, in_blocks, in_block, x),
        core_level(out_cells, out_blocks, out_block, x),
        window,
        x.shape[-1],
        *flags,
        threads(),
    )


def _in_shape(config: MaxPool | AvgPool, channels: int) -> tuple[int, ...]:
    return (config.in_blocks.shape[0], *config.in_block, channels)


def _out_shape(config: MaxPool | AvgPool, channels: int) -> tuple[int, ...]:
    return (config.out_blocks.shape[0], *config.out_block, channels)


def _max(x: Tensor, config: MaxPool) -> tuple[Tensor, Tensor]:
    x = check(x, "pool: features", _in_shape(config, x.shape[-1]))
    y, argmax = _max_fake(x, config)
    launch("max_pool3d", _core(x, config), x, x.data_ptr(), y.data_ptr(), argmax.data_ptr())
    return y, argmax


def _max_fake(x: Tensor, config: MaxPool) -> tuple[Tensor, Tensor]:
    y = x.new_empty(_out_shape(config, x.shape[-1]))
    return y, torch.empty_like(y, dtype=torch.int16)


def _max_save(x: Tensor, config: MaxPool, output: tuple[Tensor, Tensor]) -> tuple[Tensor]:
    return (output[1],)


def _max_backward(saved: Saved, grad: Tensor, _: Tensor) -> tuple[Tensor]:
    return (max_pool3d_input_op(grad, *saved.tensors, saved.config),)


def _max_input(grad: Tensor, argmax: Tensor, config: MaxPool) -> Tensor:
    shape = _out_shape(config, argmax.shape[-1])
    grad, argmax = check(grad, "pool: grad", shape), check(argmax, "pool: argmax", shape)
    if argmax.dtype != torch.int16 or argmax.device != grad.device:
        raise TypeError(
            f"argmax must be int16 on {grad.device}, got {argmax.dtype} on {argmax.device}"
        )
    dx = grad.new_empty(_in_shape(config, grad.shape[-1]))
    core = _core(grad, config)
    launch("max_pool3d_input", core, grad, grad.data_ptr(), argmax.data_ptr(), dx.data_ptr())
    return dx


def _max_input_fake(grad: Tensor, argmax: Tensor, config: MaxPool) -> Tensor:
    return grad.new_empty(_in_shape(config, grad.shape[-1]))


def _avg(x: Tensor, config: AvgPool) -> Tensor:
    x = check(x, "pool: features", _in_shape(config, x.shape[-1]))
    y = _avg_fake(x, config)
    launch("avg_pool3d", _core(x, config), x, x.data_ptr(), y.data_ptr())
    return y


def _avg_fake(x: Tensor, config: AvgPool) -> Tensor:
    return x.new_empty(_out_shape(config, x.shape[-1]))


def _avg_save(x: Tensor, config: AvgPool, output: Tensor) -> tuple[Tensor, ...]:
    return ()


def _avg_backward(saved: Saved, grad: Tensor) -> tuple[Tensor]:
    return (avg_pool3d_input_op(grad, saved.config),)


def _avg_input(grad: Tensor, config: AvgPool) -> Tensor:
    grad = check(grad, "pool: grad", _out_shape(config, grad.shape[-1]))
    dx = _avg_input_fake(grad, config)
    launch("avg_pool3d_input", _core(grad, config), grad, grad.data_ptr(), dx.data_ptr())
    return dx


def _avg_input_fake(grad: Tensor, config: AvgPool) -> Tensor:
    return grad.new_empty(_in_shape(config, grad.shape[-1]))


max_pool3d_input_op = define_op(
    f"max_pool3d_input(Tensor grad, Tensor argmax, {_MAX}) -> Tensor",
    MaxPool,
    _max_input,
    _max_input_fake,
)
avg_pool3d_input_op = define_op(
    f"avg_pool3d_input(Tensor grad, {_AVG}) -> Tensor", AvgPool, _avg_input, _avg_input_fake
)
max_pool3d_op = define_op(
    f"max_pool3d(Tensor x, {_MAX}) -> (Tensor, Tensor)",
    MaxPool,
    _max,
    _max_fake,
    _max_save,
    _max_backward,
)
avg_pool3d_op = define_op(
    f"avg_pool3d(Tensor x, {_AVG}) -> Tensor", AvgPool, _avg, _avg_fake, _avg_save, _avg_backward
)


def max_pool3d_features(x: BlockSparseTensor, out: Level, config: MaxPool) -> Tensor:
    """Packed features of max pooling on the level `out`; hidden voxels as `x.semantics.max_pool` says."""
    if current_backend() == "reference":
        dense, mask = dense_level(x)
        kernel, stride, padding, dilation = (reference.three(n) for n in config[6:10])
        window, hidden = (kernel, stride, padding, dilation), x.semantics.max_pool
        out_mask = reference.voxel_mask(out)
        return reference.pack(reference.max_pool3d(dense, mask, out_mask, window, hidden), out)
    features: Tensor = max_pool3d_op(x.features, config)[0]
    return features


def avg_pool3d_features(x: BlockSparseTensor, out: Level, config: AvgPool) -> Tensor:
    """Packed features of average pooling on `out`; the divisor as `x.semantics.avg_divisor` says."""
    if current_backend() == "reference":
        dense, mask = dense_level(x)
        kernel, stride, padding = (reference.three(n) for n in config[6:9])
        args = ((kernel, stride, padding), config.count_padding)
        override, divisor = config.divisor_override or None, x.semantics.avg_divisor
        y = reference.avg_pool3d(dense, mask, reference.voxel_mask(out), *args, override, divisor)
        return reference.pack(y, out)
    features: Tensor = avg_pool3d_op(x.features, config)
    return features
