"""Transposed convolution: the input gradient of a convolution, run forward.

A transposed convolution from a coarse level to a fine one is the adjoint of the convolution from the
fine level to the coarse one with the same weight `[C_in, C_out / groups, kz, ky, kx]`, so all three
passes are kernels of `conv3d.h`: its `input` pass forward, and its forward and `weight` passes backward.
In the geometry, "in" is therefore the fine level and "out" the coarse one.
"""

from __future__ import annotations

from torch import Tensor

from medspark.sparse import reference
from medspark.sparse._backend import current_backend
from medspark.sparse._op import Saved, define_op
from medspark.sparse.mask import Level
from medspark.sparse.ops.conv3d import (
    GEOMETRY,
    Geometry,
    bias_gradient,
    conv3d_input_op,
    conv3d_op,
    conv3d_weight_op,
    in_shape,
    save_input_and_weight,
)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    y: Tensor = conv3d_input_op(x, weight, geometry)
    return y if bias is None else y.add_(bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    return x.new_empty(in_shape(geometry, weight.shape))


def _backward(saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = saved.tensors
    dx = dw = None
    if saved.needs[0]:
        dx = conv3d_op(grad, weight, None, saved.config)
    if saved.needs[1]:
        dw = conv3d_weight_op(grad, x, weight, saved.config).to(weight.dtype)
    return dx, dw, bias_gradient(saved, grad)


conv_transpose3d_op = define_op(
    f"conv_transpose3d(Tensor x, Tensor weight, Tensor? bias, {GEOMETRY}) -> Tensor",
    Geometry,
    _forward,
    _fake,
    save_input_and_weight,
    _backward,
)


def conv_transpose3d_features(
    features: Tensor,
    level: Level,
    out: Level,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    output_padding: tuple[int, ...],
) -> Tensor:
    """Packed features, on the finer level `out`, of the transposed convolution of a volume.

    Args:
        features: packed blocks of the volume.
        level: its level.
        out: level of the output.
        weight: `[C_in, C_out / groups, kz, ky, kx]`.
        bias: `[C_out]` or None.
        geometry: of the convolution from `out` to `level`.
        output_padding: voxels added to one side of the output, per axis (z, y, x).
    """
    if current_backend() == "reference":
        dense, mask = reference.dense_level(features, level)
        numbers = (*geometry[6:8], output_padding, geometry.dilation)
        stride, padding, extra, dilation = (reference.three(n) for n in numbers)
        y = reference.conv_transpose3d(
            dense, mask, reference.voxel_mask(out), weight, bias,
            stride, padding, extra, geometry.groups, dilation,
        )  # fmt: skip
        return reference.pack(y, out)
    result: Tensor = conv_transpose3d_op(features, weight, bias, geometry)
    return result
