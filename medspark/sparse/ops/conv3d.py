"""Convolution from the active voxels of one level to those of another (`csrc/include/medspark/conv3d.h`)."""

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

GEOMETRY = (
    "Tensor in_cells, Tensor in_blocks, int[] in_block, Tensor out_cells, Tensor out_blocks, "
    "int[] out_block, int[] stride, int[] padding, int[] dilation, int groups"
)


def _core(x: Tensor, weight_shape: torch.Size, geometry: tuple[Any, ...]) -> Any:
    in_cells, in_blocks, in_block, out_cells, out_blocks, out_block, stride, pad, dil, groups = (
        geometry
    )
    out_channels, in_group, *kernel = weight_shape
    if groups < 1 or out_channels % groups:
        raise ValueError(f"{out_channels} output channels do not divide into {groups} groups")
    return native().Conv3d(
        code(x.dtype),
        core_level(in_cells, in_blocks, in_block, x),
        core_level(out_cells, out_blocks, out_block, x),
        core_window(kernel, stride, pad, dil),
        in_group * groups,
        out_channels,
        groups,
        threads(),
    )


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    _, in_blocks, in_block, _, out_blocks, out_block, *_, groups = geometry
    out_channels, in_group = weight.shape[:2]
    x = check(x, "features", (in_blocks.shape[0], *in_block, in_group * groups))
    weight = check(weight, "weight", (None, None, None, None, None), like=x)
    if bias is not None:
        bias = check(bias, "bias", (out_channels,), like=x)
    y = x.new_empty(out_blocks.shape[0], *out_block, out_channels)
    launch(
        "conv3d",
        _core(x, weight.shape, geometry),
        x,
        x.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr() if bias is not None else 0,
        y.data_ptr(),
    )
    return y


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    return x.new_empty(geometry[4].shape[0], *geometry[5], weight.shape[0])


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Saves input, weight and geometry for a backward; see `saved`."""
    x, weight, bias, *geometry = inputs
    ctx.save_for_backward(x, weight, geometry[0], geometry[1], geometry[3], geometry[4])
    ctx.has_bias = bias is not None
    ctx.sizes = (geometry[2], *geometry[5:])


def saved(ctx: Any) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Input, weight and geometry that `setup_context` saved."""
    x, weight, in_cells, in_blocks, out_cells, out_blocks = ctx.saved_tensors
    in_block, *rest = ctx.sizes
    return x, weight, (in_cells, in_blocks, in_block, out_cells, out_blocks, *rest)


def bias_gradient(ctx: Any, grad: Tensor) -> Tensor | None:
    """Sum of the output gradient over all rows, where there is a bias that wants it."""
    if not (ctx.has_bias and ctx.needs_input_grad[2]):
        return None
    return grad.flatten(0, 3).sum(0, dtype=accumulation(grad.dtype)).to(grad.dtype)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, geometry = saved(ctx)
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dx = conv3d_input_op(grad, weight, *geometry)
    if ctx.needs_input_grad[1]:
        dw = conv3d_weight_op(x, grad, list(weight.shape), *geometry).to(weight.dtype)
    return dx, dw, bias_gradient(ctx, grad), *(None,) * len(geometry)


def _input(grad: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
    _, in_blocks, in_block, _, out_blocks, out_block, *_, groups = geometry
    grad = check(grad, "grad", (out_blocks.shape[0], *out_block, weight.shape[0]))
    weight = check(weight, "weight", tuple(weight.shape), like=grad)
    dx = grad.new_empty(in_blocks.shape[0], *in_block, weight.shape[1] * groups)
    core = _core(grad, weight.shape, geometry)
    launch("conv3d_input", core, grad, grad.data_ptr(), weight.data_ptr(), dx.data_ptr())
    return dx


def _input_fake(grad: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
    return grad.new_empty(geometry[1].shape[0], *geometry[2], weight.shape[1] * geometry[-1])


def _weight(x: Tensor, grad: Tensor, weight_shape: list[int], *geometry: Any) -> Tensor:
    _, in_blocks, in_block, _, out_blocks, out_block, *_, groups = geometry
    x = check(x, "features", (in_blocks.shape[0], *in_block, weight_shape[1] * groups))
    grad = check(grad, "grad", (out_blocks.shape[0], *out_block, weight_shape[0]), like=x)
    dw = x.new_empty(weight_shape, dtype=accumulation(x.dtype))
    core = _core(x, dw.shape, geometry)
    launch("conv3d_weight", core, x, x.data_ptr(), grad.data_ptr(), dw.data_ptr())
    return dw


def _weight_fake(x: Tensor, grad: Tensor, weight_shape: list[int], *geometry: Any) -> Tensor:
    return x.new_empty(weight_shape, dtype=accumulation(x.dtype))


conv3d_input_op = define_op(
    f"conv3d_input(Tensor grad, Tensor weight, {GEOMETRY}) -> Tensor", _input, _input_fake
)
conv3d_weight_op = define_op(
    f"conv3d_weight(Tensor x, Tensor grad, int[] weight_shape, {GEOMETRY}) -> Tensor",
    _weight,
    _weight_fake,
)
conv3d_op = define_op(
    f"conv3d(Tensor x, Tensor weight, Tensor? bias, {GEOMETRY}) -> Tensor",
    _forward,
    _forward_fake,
    setup_context,
    _backward,
)


def conv3d_features(
    x: BlockSparseTensor,
    out: Level,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Packed features of the convolution of `x` on the level `out`.

    Args:
        x: input volume.
        out: level of the output.
        weight: `[C_out, C_in / groups, kz, ky, kx]`.
        bias: `[C_out]` or None.
        stride: per axis (z, y, x), like padding and dilation.
        padding: zeros added on both sides.
        dilation: distance of taps.
        groups: channel groups.
    """
    if current_backend() == "reference":
        dense, mask = dense_level(x)
        three = (tuple(stride), tuple(padding), tuple(dilation))
        y = reference.conv3d(dense, mask, reference.voxel_mask(out), weight, bias, *three, groups)  # type: ignore[arg-type]
        return reference.pack(y, out)
    features: Tensor = conv3d_op(
        x.features,
        weight,
        bias,
        *tables(x.level),
        list(x.level.block),
        *tables(out),
        list(out.block),
        stride,
        padding,
        dilation,
        groups,
    )
    return features
