"""Convolution from the active voxels of one level to those of another (`csrc/include/medspark/conv3d.h`)."""

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

GEOMETRY = (
    "Tensor in_cells, Tensor in_blocks, int[] in_block, Tensor out_cells, Tensor out_blocks, "
    "int[] out_block, int[] stride, int[] padding, int[] dilation, int groups"
)


class _Fields(NamedTuple):
    in_cells: Tensor
    in_blocks: Tensor
    in_block: Sequence[int]
    out_cells: Tensor
    out_blocks: Tensor
    out_block: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


class Geometry(_Fields, Config):
    """From which voxels to which others, and through which window (z, y, x)."""

    @classmethod
    def between(
        cls,
        level: Level,
        out: Level,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Geometry:
        """The geometry of a convolution from one level to another."""
        return cls(
            *tables(level), level.block, *tables(out), out.block, stride, padding, dilation, groups
        )


class _Call(NamedTuple):
    """What one type and weight shape make of a geometry: the core's description, and both shapes."""

    core: Any
    inside: tuple[int, ...]
    outside: tuple[int, ...]


def _call(x: Tensor, weight_shape: torch.Size, geometry: Geometry) -> _Call:
    key = (x.dtype, x.device, weight_shape, threads())
    call: _Call = geometry.core(key, lambda: _build_call(x, weight_shape, geometry))
    return call


def _build_call(x: Tensor, weight_shape: torch.Size, geometry: Geometry) -> _Call:
    g = geometry
    out_channels, in_group, *kernel = weight_shape
    if g.groups < 1 or out_channels % g.groups:
        raise ValueError(f"{out_channels} output channels do not divide into {g.groups} groups")
    core = native().Conv3d(
        code(x.dtype),
        core_level(g.in_cells, g.in_blocks, g.in_block, x),
        core_level(g.out_cells, g.out_blocks, g.out_block, x),
        core_window(kernel, g.stride, g.padding, g.dilation),
        in_group * g.groups,
        out_channels,
        g.groups,
        threads(),
    )
    return _Call(core, in_shape(g, weight_shape), out_shape(g, weight_shape))


def in_shape(g: Geometry, weight_shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of packed features on the level that a convolution with this weight reads."""
    return (g.in_blocks.shape[0], *g.in_block, weight_shape[1] * g.groups)


def out_shape(g: Geometry, weight_shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of packed features on the level that it writes."""
    return (g.out_blocks.shape[0], *g.out_block, weight_shape[0])


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    shape = weight.shape
    call = _call(x, shape, geometry)
    x = check(x, "conv: features", call.inside)
    weight = check(weight, "conv: weight", shape, like=x)
    address = 0
    if bias is not None:
        bias = check(bias, "conv: bias", (shape[0],), like=x)
        address = bias.data_ptr()
    y = x.new_empty(call.outside)
    launch("conv3d", call.core, x, x.data_ptr(), weight.data_ptr(), address, y.data_ptr())
    return y


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    return x.new_empty(out_shape(geometry, weight.shape))


def save_input_and_weight(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, y: Tensor
) -> tuple[Tensor, Tensor]:
    """What the backward of a convolution and of its transpose need."""
    return x, weight


def bias_gradient(saved: Saved, grad: Tensor) -> Tensor | None:
    """Sum of the output gradient over all rows, where there is a bias that wants it."""
    if not saved.needs[2]:
        return None
    return grad.flatten(0, 3).sum(0, dtype=accumulation(grad.dtype)).to(grad.dtype)


def _backward(saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = saved.tensors
    dx = dw = None
    if saved.needs[0]:
        dx = conv3d_input_op(grad, weight, saved.config)
    if saved.needs[1]:
        dw = conv3d_weight_op(x, grad, weight, saved.config).to(weight.dtype)
    return dx, dw, bias_gradient(saved, grad)


def _input(grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    call = _call(grad, weight.shape, geometry)
    grad = check(grad, "conv: grad", call.outside)
    weight = check(weight, "conv: weight", weight.shape, like=grad)
    dx = grad.new_empty(call.inside)
    launch("conv3d_input", call.core, grad, grad.data_ptr(), weight.data_ptr(), dx.data_ptr())
    return dx


def _input_fake(grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return grad.new_empty(in_shape(geometry, weight.shape))


def _weight(x: Tensor, grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    shape = weight.shape
    call = _call(x, shape, geometry)
    x = check(x, "conv: features", call.inside)
    grad = check(grad, "conv: grad", call.outside, like=x)
    dw = x.new_empty(shape, dtype=accumulation(x.dtype))
    launch("conv3d_weight", call.core, x, x.data_ptr(), grad.data_ptr(), dw.data_ptr())
    return dw


def _weight_fake(x: Tensor, grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    return x.new_empty(weight.shape, dtype=accumulation(x.dtype))


conv3d_input_op = define_op(
    f"conv3d_input(Tensor grad, Tensor weight, {GEOMETRY}) -> Tensor", Geometry, _input, _input_fake
)
conv3d_weight_op = define_op(
    f"conv3d_weight(Tensor x, Tensor grad, Tensor weight, {GEOMETRY}) -> Tensor",
    Geometry,
    _weight,
    _weight_fake,
)
conv3d_op = define_op(
    f"conv3d(Tensor x, Tensor weight, Tensor? bias, {GEOMETRY}) -> Tensor",
    Geometry,
    _forward,
    _fake,
    save_input_and_weight,
    _backward,
)


def conv3d_features(
    features: Tensor,
    level: Level,
    out: Level,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
) -> Tensor:
    """Packed features, on the level `out`, of the convolution of a volume.

    Args:
        features: packed blocks of the volume.
        level: its level.
        out: level of the output; its size decides how many zeros there are above the volume.
        weight: `[C_out, C_in / groups, kz, ky, kx]`.
        bias: `[C_out]` or None.
        geometry: between the two levels, with the zeros below the volume as padding.
    """
    if current_backend() == "reference":
        dense, mask = reference.dense_level(features, level)
        stride, padding, dilation = (reference.three(n) for n in geometry[6:9])
        out_mask = reference.voxel_mask(out)
        y = reference.conv3d(
            dense, mask, out_mask, weight, bias, stride, padding, dilation, geometry.groups
        )
        return reference.pack(y, out)
    result: Tensor = conv3d_op(features, weight, bias, geometry)
    return result
