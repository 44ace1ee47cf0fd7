"""Questions about shape and graph, channel slicing, the channels-last view and zero padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from medspark.sparse.elementwise import _operand
from medspark.sparse.tensor import (
    BlockSparseTensor,
    ChannelsLastView,
    PaddedView,
    block_sparse,
    implements,
    like,
    packed_memory,
)

_EVERY_VIEW: tuple[type[BlockSparseTensor], ...] = (BlockSparseTensor, ChannelsLastView, PaddedView)


def _on_all(*functions: Any) -> Any:
    """Decorator: the handler serves BlockSparseTensors and both of their views."""

    def register(handler: Any) -> Any:
        for cls in _EVERY_VIEW:
            implements(*functions, on=cls)(handler)
        return handler

    return register


@_on_all(Tensor.size)
def _size(x: BlockSparseTensor, dim: int | None = None) -> Any:
    shape = x.shape
    return shape if dim is None else shape[dim]


@_on_all(Tensor.dim, Tensor.ndimension)
def _dim(x: BlockSparseTensor) -> int:
    return len(x.shape)


@_on_all(Tensor.numel, torch.numel, Tensor.nelement)
def _numel(x: BlockSparseTensor) -> int:
    return x.shape.numel()


@_on_all(Tensor.is_contiguous)
def _is_contiguous(x: BlockSparseTensor, **_: Any) -> bool:
    return True


@_on_all(Tensor.stride)
def _stride(x: BlockSparseTensor, dim: int | None = None) -> Any:
    # Of the packed memory, for whom only a guard of a compiled graph asks.
    strides = packed_memory(x).stride()
    return strides if dim is None else strides[dim]


@_on_all(torch.is_same_size, Tensor.is_same_size)
def _is_same_size(x: BlockSparseTensor, other: Tensor) -> bool:
    return tuple(x.shape) == tuple(other.shape)


@_on_all(Tensor.to_dense)
def _to_dense(x: BlockSparseTensor) -> Tensor:
    from medspark.sparse.ops.densify import densify

    if type(x) is not BlockSparseTensor:
        raise NotImplementedError(f"to_dense of a {type(x).__name__}. {x._advice}")
    return densify(x)


@_on_all(Tensor.requires_grad_)
def _requires_grad_(x: BlockSparseTensor, requires_grad: bool = True) -> BlockSparseTensor:
    x.requires_grad = requires_grad
    return x


@_on_all(Tensor.register_hook)
def _register_hook(x: BlockSparseTensor, hook: Any) -> Any:
    return _carrier(x).register_hook(hook)


@_on_all(Tensor.retain_grad)
def _retain_grad(x: BlockSparseTensor) -> None:
    _carrier(x).retain_grad()


@_on_all(Tensor.grad.__get__)  # type: ignore[union-attr]
def _grad(x: BlockSparseTensor) -> Tensor | None:
    grad: Tensor | None = _carrier(x).grad
    return grad


class _Plain:
    """The tensor itself, without its torch function."""

    def __init__(self, x: BlockSparseTensor) -> None:
        self.x = x

    def __getattr__(self, name: str) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return getattr(self.x, name)


def _carrier(x: BlockSparseTensor) -> Any:
    """What carries the graph: the features, or the tensor itself (see `BlockSparseTensor.features`)."""
    return x._features if x._features.requires_grad else _Plain(x)


def _plain(value: Any) -> Any:
    """Packed tensors in place of sparse ones, with the same place in the graph."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if not isinstance(value, BlockSparseTensor):
        return value
    with torch.enable_grad():  # backward passes of autograd Functions run without
        return packed_memory(value)


@_on_all(torch.autograd.backward)
def _backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
    torch.autograd.backward(_plain(tensors), _plain(grad_tensors), *args, **kwargs)


@_on_all(Tensor.backward)
def _backward_of(x: BlockSparseTensor, gradient: Any = None, *args: Any, **kwargs: Any) -> None:
    _plain(x).backward(_plain(gradient), *args, **kwargs)


@_on_all(Tensor.view_as)
def _view_as(x: BlockSparseTensor, other: Tensor) -> BlockSparseTensor:
    # torch asks for this where an autograd.Function returns its input, as module hooks do.
    packed = packed_memory(x)
    return like(x, packed.view_as(packed))


@implements(torch.cat, torch.concat, torch.concatenate)
def _cat(tensors: Sequence[Any], dim: int = 0) -> BlockSparseTensor:
    first = next(t for t in tensors if isinstance(t, BlockSparseTensor))
    if dim % first.ndim != 1:
        raise NotImplementedError(
            f"cat joins BlockSparseTensors along the channels (dim 1) only, got dim {dim}"
        )
    parts = [_operand(first, _masked_as(first, t)) for t in tensors]
    return like(first, torch.cat(parts, dim=-1))


def _masked_as(first: BlockSparseTensor, volume: Tensor) -> BlockSparseTensor:
    """A dense volume at the active voxels of `first`: MONAI's ResNets fill up channels with zeros."""
    if isinstance(volume, BlockSparseTensor):
        return volume
    if volume.shape[:1] + volume.shape[2:] != first.shape[:1] + first.shape[2:]:
        raise ValueError(
            f"cat: a dense tensor of shape {tuple(volume.shape)} does not fit {tuple(first.shape)}"
        )
    return BlockSparseTensor.from_dense(volume, first.mask, first.semantics)


def _channels(x: BlockSparseTensor, dim: int, what: str) -> None:
    if dim % x.ndim != 1:
        raise NotImplementedError(f"{what} of a BlockSparseTensor goes along channels (dim 1) only")


@implements(torch.chunk, Tensor.chunk)
def _chunk(x: BlockSparseTensor, chunks: int, dim: int = 0) -> tuple[BlockSparseTensor, ...]:
    _channels(x, dim, "chunk")
    return tuple(like(x, part.contiguous()) for part in x.features.chunk(chunks, dim=-1))


@implements(torch.split, Tensor.split)
def _split(x: BlockSparseTensor, size: Any, dim: int = 0) -> tuple[BlockSparseTensor, ...]:
    _channels(x, dim, "split")
    return tuple(like(x, part.contiguous()) for part in x.features.split(size, dim=-1))


@implements(Tensor.__getitem__)
def _getitem(x: BlockSparseTensor, index: Any) -> BlockSparseTensor:
    parts = index if isinstance(index, tuple) else (index,)
    parts = tuple(p for p in parts if p is not Ellipsis)
    whole = [i for i, p in enumerate(parts) if not (isinstance(p, slice) and p == slice(None))]
    if whole not in ([], [1]) or (whole and not isinstance(parts[1], slice)):
        raise NotImplementedError(
            f"getitem of a BlockSparseTensor takes slices of channels only, x[:, a:b], got {index}"
        )
    return like(x, x.features[..., parts[1]].contiguous()) if whole else x


@implements(Tensor.repeat)
def _repeat(x: BlockSparseTensor, *sizes: Any) -> BlockSparseTensor:
    times = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
    if len(times) != x.ndim or any(n != 1 for i, n in enumerate(times) if i != 1):
        raise NotImplementedError(
            f"repeat of a BlockSparseTensor repeats channels only, got {times}"
        )
    return like(x, x.features.repeat(1, 1, 1, 1, times[1]))


@implements(torch.permute, Tensor.permute)
def _permute(x: BlockSparseTensor, *dims: Any) -> BlockSparseTensor:
    order = tuple(dims[0]) if len(dims) == 1 and not isinstance(dims[0], int) else dims
    order = tuple(d % x.ndim for d in order)
    if order == tuple(range(x.ndim)):
        return x
    if order != (0, *range(2, x.ndim), 1):
        raise NotImplementedError(
            f"permute moves the channels of a BlockSparseTensor to the end and back only, got {order}"
        )
    return _as(ChannelsLastView, x)


@implements(torch.permute, Tensor.permute, on=ChannelsLastView)
def _permute_back(x: ChannelsLastView, *dims: Any) -> BlockSparseTensor:
    order = tuple(dims[0]) if len(dims) == 1 and not isinstance(dims[0], int) else dims
    order = tuple(d % x.ndim for d in order)
    if order == tuple(range(x.ndim)):
        return x
    if order != (0, x.ndim - 1, *range(1, x.ndim - 1)):
        raise NotImplementedError(
            f"permute brings the channels of a channels-last view back to axis 1 only, got {order}"
        )
    return _as(BlockSparseTensor, x)


@implements(torch.movedim, Tensor.movedim, torch.moveaxis, Tensor.moveaxis)
def _movedim(x: BlockSparseTensor, source: int, destination: int) -> BlockSparseTensor:
    axes = list(range(x.ndim))
    axes.insert(destination % x.ndim, axes.pop(source % x.ndim))
    moved: BlockSparseTensor = _permute(x, axes)
    return moved


@implements(torch.movedim, Tensor.movedim, torch.moveaxis, Tensor.moveaxis, on=ChannelsLastView)
def _movedim_back(x: ChannelsLastView, source: int, destination: int) -> BlockSparseTensor:
    axes = list(range(x.ndim))
    axes.insert(destination % x.ndim, axes.pop(source % x.ndim))
    moved: BlockSparseTensor = _permute_back(x, axes)
    return moved


def _as(cls: type[BlockSparseTensor], x: BlockSparseTensor) -> BlockSparseTensor:
    return block_sparse(x.features, x.mask, x.level, x.spatial, x.semantics, cls)


@implements(F.linear, on=ChannelsLastView)
def _linear(x: ChannelsLastView, weight: Tensor, bias: Tensor | None = None) -> BlockSparseTensor:
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"linear: weight {tuple(weight.shape)} does not fit input {tuple(x.shape)}"
        )
    return like(x, F.linear(x.features, weight, bias))


@implements(F.pad, torch._C._nn.pad)
def _pad(
    x: BlockSparseTensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> BlockSparseTensor:
    if not any(pad):
        return x
    axes = x.ndim - 2
    if (
        mode != "constant"
        or value not in (None, 0)
        or len(pad) > 2 * axes
        or min(pad, default=0) < 0
    ):
        raise NotImplementedError(
            f"pad of a BlockSparseTensor adds zeros around the volume only, got {tuple(pad)}, mode {mode!r}, "
            f"value {value}; pad the volume before it becomes sparse"
        )
    # torch counts from the last axis.
    pairs = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)][::-1]
    pads = [(0, 0)] * (3 - len(pairs)) + pairs
    before = x.pads if isinstance(x, PaddedView) else ((0, 0),) * 3
    view = _as(PaddedView, x)
    assert isinstance(view, PaddedView)
    view.pads = tuple((a + c, b + d) for (a, b), (c, d) in zip(before, pads, strict=True))
    grown = [n + a + b for n, (a, b) in zip(x.spatial, view.pads[3 - axes :], strict=True)]
    view._size = torch.Size((*x.shape[:2], *grown))
    return view


implements(F.pad, torch._C._nn.pad, on=PaddedView)(_pad)
