"""Elementwise functions, sums and conversions of BlockSparseTensors.

They run torch's own kernels on the packed features: only active voxels exist there, so nothing more is
needed (docs/decisions/0002).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medspark.sparse.casts import autocast
from medspark.sparse.tensor import (
    BlockSparseTensor,
    ChannelsLastView,
    block_sparse,
    implements,
    like,
)


def _everywhere(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the handler serves BlockSparseTensors and their channels-last views."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        implements(*functions)(handler)
        return implements(*functions, on=ChannelsLastView)(handler)

    return register


def _unary(function: Callable[..., Tensor]) -> None:
    """Registers an elementwise function of one tensor; in-place forms change the tensor they are given."""

    def handler(x: BlockSparseTensor, *args: Any, **kwargs: Any) -> BlockSparseTensor:
        features = x.features
        result = function(features, *args, **kwargs)
        return x if result is features else like(x, result)

    _everywhere(function)(handler)


# fmt: off
for _function in (
    F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.leaky_relu,
    torch._C._nn.leaky_relu_, F.elu, F.selu, F.celu, F.gelu,
    F.silu, F.mish, F.hardtanh,
    F.hardswish, F.hardsigmoid, F.softplus, torch.sigmoid, F.sigmoid,
    torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_, F.tanhshrink, F.softsign, F.logsigmoid, F.rrelu,
    torch.tanh, F.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_, torch.clamp, Tensor.clamp,
    Tensor.clamp_, torch.neg, Tensor.neg, Tensor.__neg__, F.dropout, torch.dropout, F.alpha_dropout,
    Tensor.clone, torch.clone, Tensor.detach, torch.detach, Tensor.float, Tensor.half,
    Tensor.bfloat16, Tensor.double, torch.abs, Tensor.abs, torch.exp, Tensor.exp, torch.sqrt,
    Tensor.sqrt, torch.rsqrt, Tensor.rsqrt, torch.square, Tensor.square, torch.zeros_like,
    torch.ones_like, torch.empty_like, torch.rand_like, torch.randn_like,
):
    _unary(_function)
# fmt: on


@implements(F.prelu, torch.prelu)
def _prelu(x: BlockSparseTensor, weight: Tensor) -> BlockSparseTensor:
    # Packed features carry channels last, where one weight per channel broadcasts by itself.
    features, dtype = x.features, autocast(x)
    if dtype is not None:
        features, weight = features.to(dtype), weight.to(dtype)
    return like(x, features.clamp(min=0) + weight.flatten() * features.clamp(max=0))


@implements(F.dropout1d, F.dropout2d, F.dropout3d, F.feature_alpha_dropout)
def _channel_dropout(
    x: BlockSparseTensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> BlockSparseTensor:
    features = x.features
    scale = F.dropout(features.new_ones(x.shape[:2]), p, training)
    factor = _operand(x, scale.view(*x.shape[:2], *(1,) * (x.ndim - 2)))
    if inplace:
        features.mul_(factor)
        return x
    return like(x, features * factor)


def _maker(function: Callable[..., Tensor]) -> None:
    """Registers a function that makes a plain tensor of the same type, as drop path does."""
    _everywhere(function)(lambda x, *args, **kwargs: function(x.features, *args, **kwargs))


# fmt: off
for _make in (
    Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor,
):
    _maker(_make)
# fmt: on


@_everywhere(Tensor.contiguous)
def _contiguous(x: BlockSparseTensor, **_: Any) -> BlockSparseTensor:
    return x


def _moving(function: Callable[..., Tensor]) -> None:
    """Registers a function that changes type, device or memory; the mask goes along."""

    def handler(x: BlockSparseTensor, *args: Any, **kwargs: Any) -> BlockSparseTensor:
        features = x.features
        plain = [a.features if isinstance(a, BlockSparseTensor) else a for a in args]
        kwargs.pop("memory_format", None)
        plain = [a for a in plain if not isinstance(a, torch.memory_format)]
        moved = function(features, *plain, **kwargs)
        if moved is features:
            return x
        if moved.device == features.device:
            return like(x, moved)
        mask = x.mask.to(moved.device)
        level = mask.level(x.spatial, x.semantics.coarse)
        return block_sparse(moved, mask, level, x.spatial, x.semantics, type(x))

    _everywhere(function)(handler)


for _move in (Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.type_as, Tensor.pin_memory, Tensor.type):
    _moving(_move)


def _operand(x: BlockSparseTensor, other: Any) -> Any:
    """The other side of a binary op, in the layout of the packed features of `x`.

    Raises:
        ValueError: other active voxels, or a dense tensor that varies in space.
    """
    if isinstance(other, BlockSparseTensor):
        if type(other) is not type(x):
            raise ValueError(f"both sides must have the same layout, got {x!r} and {other!r}")
        if other.spatial != x.spatial or not x.mask.equals(other.mask):
            raise ValueError(
                f"both sides must have the same active voxels, got {x!r} and {other!r}; change one of "
                "them with medspark.sparse.restrict(x, mask) or densify(x, token, out_mask)"
            )
        return other.features
    if not isinstance(other, Tensor) or other.numel() == 1:
        return other
    shape = (1,) * (x.ndim - other.ndim) + tuple(other.shape)
    last = isinstance(x, ChannelsLastView)
    space = shape[1:-1] if last else shape[2:]
    if len(shape) != x.ndim or any(n != 1 for n in space):
        raise ValueError(
            f"a dense operand must be a scalar or {'[B, 1, ..., C]' if last else '[B, C, 1, ...]'}, got "
            f"{tuple(other.shape)} for {tuple(x.shape)}; a volume becomes sparse with "
            "BlockSparseTensor.from_dense(volume, x.mask)"
        )
    per_sample = other.reshape(shape[0], shape[-1] if last else shape[1])
    if shape[0] != 1:
        per_sample = per_sample[x.level.sample_of_block()]
    return per_sample[:, None, None, None, :]


def _binary(function: Callable[..., Tensor], *names: Any, swapped: bool = False) -> None:
    """Registers an elementwise function of two tensors, or under other names."""

    def handler(a: Any, b: Any, *args: Any, **kwargs: Any) -> BlockSparseTensor:
        if isinstance(a, BlockSparseTensor):
            features = a.features
            result = function(features, _operand(a, b), *args, **kwargs)
            return a if result is features else like(a, result)
        return like(b, function(_operand(b, a), b.features, *args, **kwargs))

    def swap(a: Any, b: Any) -> BlockSparseTensor:
        return handler(b, a)

    _everywhere(*(names or (function,)))(swap if swapped else handler)


# fmt: off
for _two in (
    torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__,
    torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__,
    torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__,
    torch.div, Tensor.div, Tensor.div_, Tensor.__truediv__, Tensor.__itruediv__,
    torch.true_divide, Tensor.true_divide, torch.pow, Tensor.pow,
    torch.maximum, torch.minimum,
):
    _binary(_two)
# fmt: on
# Operators that torch writes in Python, by the names under which Dynamo knows them.
_binary(torch.pow, "pow", "__pow__")
_binary(torch.sub, "__rsub__", swapped=True)
_binary(torch.div, "__rdiv__", "__rtruediv__", swapped=True)
