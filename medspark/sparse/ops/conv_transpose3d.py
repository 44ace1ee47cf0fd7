"""Transposed convolution: the input gradient of a convolution, run forward.

A transposed convolution from a coarse level to a fine one is the adjoint of the convolution from the
fine level to the coarse one with the same weight `[C_in, C_out / groups, kz, ky, kx]`, so all three
passes are kernels of `conv3d.h`: its `input` pass forward, and its forward and `weight` passes backward.
In the geometry, "in" is therefore the fine level and "out" the coarse one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from medspark.sparse import reference
from medspark.sparse._backend import current_backend
from medspark.sparse._op import define_op, tables
from medspark.sparse.mask import Level
from medspark.sparse.ops.conv3d import (
    GEOMETRY,
    bias_gradient,
    conv3d_input_op,
    conv3d_op,
    conv3d_weight_op,
    saved,
    setup_context,
)
from medspark.sparse.ops.densify import dense_level
from medspark.sparse.tensor import BlockSparseTensor


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    y: Tensor = conv3d_input_op(x, weight, *geometry)
    return y if bias is None else y.add_(bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    return x.new_empty(geometry[1].shape[0], *geometry[2], weight.shape[1] * geometry[-1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, geometry = saved(ctx)
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dx = conv3d_op(grad, weight, None, *geometry)
    if ctx.needs_input_grad[1]:
        dw = conv3d_weight_op(grad, x, list(weight.shape), *geometry).to(weight.dtype)
    return dx, dw, bias_gradient(ctx, grad), *(None,) * len(geometry)


conv_transpose3d_op = define_op(
    f"conv_transpose3d(Tensor x, Tensor weight, Tensor? bias, {GEOMETRY}) -> Tensor",
    _forward,
    _fake,
    setup_context,
    _backward,
)


def conv_transpose3d_features(
    x: BlockSparseTensor,
    out: Level,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Packed features of the transposed convolution of `x` on the finer level `out`.

    Args:
        x: input volume.
        out: level of the output.
        weight: `[C_in, C_out / groups, kz, ky, kx]`.
        bias: `[C_out]` or None.
        stride: per axis (z, y, x), like the rest.
        padding: of the convolution that this one is the adjoint of.
        output_padding: voxels added to one side of the output.
        dilation: distance of taps.
        groups: channel groups.
    """
    if current_backend() == "reference":
        dense, mask = dense_level(x)
        out_mask = reference.voxel_mask(out)
        four: Any = map(tuple, (stride, padding, output_padding, dilation))
        steps, pads, extra, spread = four
        y = reference.conv_transpose3d(
            dense,
            mask,
            out_mask,
            weight,
            bias,
            steps,
            pads,
            extra,
            groups,
            spread,
        )
        return reference.pack(y, out)
    fine, coarse = (*tables(out), list(out.block)), (*tables(x.level), list(x.level.block))
    window = (stride, padding, dilation, groups)
    features: Tensor = conv_transpose3d_op(x.features, weight, bias, *fine, *coarse, *window)
    return features
