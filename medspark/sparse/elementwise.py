"""Elementwise functions, sums and conversions of BlockSparseTensors.

They run torch's own kernels on the packed features: only active voxels exist there, so nothing more is
needed (docs/decisions/0002).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medspark.sparse.tensor import BlockSparseTensor, implements


def _unary(function: Callable[..., Tensor]) -> None:
    """Registers an elementwise function of one tensor; in-place forms change the tensor they are given."""

    def handler(x: BlockSparseTensor, *args: Any, **kwargs: Any) -> BlockSparseTensor:
        features = function(x.features, *args, **kwargs)
        if features is x.features:
            return x
        return x.with_features(features)

    implements(function)(handler)


# fmt: off
for _function in (
    F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.leaky_relu,
    torch._C._nn.leaky_relu_, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.hardtanh, F.hardswish,
    F.hardsigmoid, F.softplus, torch.sigmoid, F.sigmoid, Tensor.sigmoid,
    torch.tanh, F.tanh, Tensor.tanh, torch.clamp, Tensor.clamp, torch.neg, Tensor.neg, Tensor.__neg__,
    F.dropout, torch.dropout, F.alpha_dropout, Tensor.clone, torch.clone, Tensor.detach, torch.detach,
    Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, torch.abs,
    Tensor.abs, torch.exp, Tensor.exp, torch.sqrt, Tensor.sqrt,
):
    _unary(_function)
# fmt: on


@implements(F.prelu, torch.prelu)
def _prelu(x: BlockSparseTensor, weight: Tensor) -> BlockSparseTensor:
    # Packed features carry channels last, where one weight per channel broadcasts by itself.
    features = x.features
    return x.with_features(features.clamp(min=0) + weight.flatten() * features.clamp(max=0))


@implements(F.dropout2d, F.dropout3d)
def _channel_dropout(
    x: BlockSparseTensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> BlockSparseTensor:
    scale = F.dropout(x.features.new_ones(x.shape[:2]), p, training)
    return x.with_features(x.features * _operand(x, scale.view(*x.shape[:2], *(1,) * (x.ndim - 2))))


@implements(Tensor.contiguous)
def _contiguous(x: BlockSparseTensor, **_: Any) -> BlockSparseTensor:
    return x


@implements(Tensor.requires_grad_)
def _requires_grad(x: BlockSparseTensor, requires_grad: bool = True) -> BlockSparseTensor:
    x.features.requires_grad_(requires_grad)
    return x


@implements(Tensor.to, Tensor.cpu, Tensor.cuda)
def _to(x: BlockSparseTensor, *args: Any, **kwargs: Any) -> BlockSparseTensor:
    features = x.features.to(*args, **kwargs)
    mask = x.mask.to(features.device)
    return BlockSparseTensor(features, mask, x.spatial, x.semantics)


def _operand(x: BlockSparseTensor, other: Any) -> Any:
    """The other side of a binary op, in the layout of the packed features of `x`."""
    if isinstance(other, BlockSparseTensor):
        if other.spatial != x.spatial or not x.mask.equals(other.mask):
            raise ValueError(
                f"both sides must have the same active voxels, got {x!r} and {other!r}; "
                "change one of them with densify"
            )
        return other.features
    if not isinstance(other, Tensor) or other.numel() == 1:
        return other
    shape = (1,) * (x.ndim - other.ndim) + tuple(other.shape)
    if len(shape) != x.ndim or any(n != 1 for n in shape[2:]):
        raise ValueError(
            f"a dense operand must be a scalar or [B, C, 1, ...], got {tuple(other.shape)} "
            f"for {tuple(x.shape)}"
        )
    per_sample = other.reshape(shape[:2])
    if shape[0] != 1:
        per_sample = per_sample[x.level.sample_of_block()]
    return per_sample[:, None, None, None, :]


def _binary(function: Callable[..., Tensor]) -> None:
    """Registers an elementwise function of two tensors."""

    def handler(a: Any, b: Any, *args: Any, **kwargs: Any) -> BlockSparseTensor:
        x = a if isinstance(a, BlockSparseTensor) else b
        left = a.features if isinstance(a, BlockSparseTensor) else _operand(x, a)
        right = _operand(x, b) if x is a else b.features
        features = function(left, right, *args, **kwargs)
        return x if features is x.features else x.with_features(features)

    implements(function)(handler)


# fmt: off
for _two in (
    torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__,
    torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__rsub__, Tensor.__isub__,
    torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__,
    torch.div, Tensor.div, Tensor.div_, Tensor.__truediv__, Tensor.__itruediv__, Tensor.__rtruediv__,
    torch.pow, Tensor.pow, Tensor.__pow__, torch.maximum, torch.minimum,
):
    _binary(_two)
# fmt: on


@implements(torch.cat, torch.concat)
def _cat(tensors: Sequence[Any], dim: int = 0) -> BlockSparseTensor:
    first = next(t for t in tensors if isinstance(t, BlockSparseTensor))
    if dim % first.ndim != 1 or not all(isinstance(t, BlockSparseTensor) for t in tensors):
        raise NotImplementedError("cat joins BlockSparseTensors along the channel axis only")
    return first.with_features(torch.cat([_operand(first, t) for t in tensors], dim=-1))
