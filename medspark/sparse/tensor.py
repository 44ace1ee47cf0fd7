"""The masked volume as a value: a `torch.Tensor` that holds only its visible cells.

A `BlockSparseTensor` reports the shape of the dense volume and stores packed blocks. Ordinary modules
call torch functions on it; `__torch_function__` runs each as its sparse counterpart (in
`convolutions.py`, `pools.py`, `norms.py`, `reductions.py`, `resize.py`, `shape.py` and `elementwise.py`), so
a CNN needs no conversion.

The object shares the memory and the autograd graph of its packed features (docs/decisions/0005): sparse
ops work on the features, while code that sees only the tensor itself (reentrant checkpointing, hooks,
DistributedDataParallel) finds the same node of the graph on it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._guards import TracingContext

from medspark.sparse._dynamo import look_into_tuples, while_tracing
from medspark.sparse.mask import BlockMask, Level, Semantics

Handler = Callable[..., Any]
# Questions that the packed tensor answers as the dense one would.
_METADATA = {
    Tensor.is_floating_point,
    torch.is_floating_point,
    Tensor.is_complex,
    torch.is_complex,
    Tensor.get_device,
    Tensor.element_size,
}
# Attributes that would show the packed memory as if it were the volume.
_FOREIGN = {getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag")}


class BlockSparseTensor(Tensor):
    """A batch of volumes `[B, C, D, H, W]` (or images `[B, C, H, W]`) of which only some cells exist.

    Make one with `from_dense`. Functions without a sparse counterpart raise NotImplementedError.

    Attributes:
        features: packed blocks `[n_blocks, bz, by, bx, C]`, part of the autograd graph.
        mask: the BlockMask.
        level: index of this tensor's resolution.
        semantics: choices for coarse levels and pools.
    """

    _handlers: ClassVar[dict[Any, Handler]] = {}
    _advice: ClassVar[str] = (
        "Work on `x.features` [n_blocks, bz, by, bx, C] and `x.with_features(...)`, or leave the sparse "
        "world with `x.to_dense()` or `medspark.sparse.densify(x, token)`"
    )
    _features: Tensor
    _mask: BlockMask
    _level: Level
    _spatial: tuple[int, ...]
    _semantics: Semantics
    _size: torch.Size

    @staticmethod
    def __new__(
        cls,
        features: Tensor,
        mask: BlockMask,
        spatial: tuple[int, ...],
        semantics: Semantics = Semantics(),  # noqa: B008  (frozen)
    ) -> BlockSparseTensor:
        """Wraps packed features; `from_dense` is the usual way.

        Args:
            cls: this class.
            features: `[n_blocks, bz, by, bx, C]` in the order of the level's active cells.
            mask: visible cells.
            spatial: voxels per axis of the dense volume.
            semantics: choices for coarse levels and pools.

        Raises:
            ValueError: the features do not fit the mask at this size.
        """
        spatial = tuple(spatial)
        level = mask.level(spatial, semantics.coarse)
        if features.ndim != 5 or tuple(features.shape[:4]) != (level.n_blocks, *level.block):
            raise ValueError(
                f"features of a {spatial} level must be [{level.n_blocks}, "
                f"{', '.join(map(str, level.block))}, C], got {list(features.shape)}"
            )
        return block_sparse(features, mask, level, spatial, semantics)

    @classmethod
    def from_dense(
        cls,
        x: Tensor,
        mask: BlockMask,
        semantics: Semantics = Semantics(),  # noqa: B008
    ) -> BlockSparseTensor:
        """Keeps the active voxels of a dense `[B, C, D, H, W]` (or `[B, C, H, W]`) tensor.

        Raises:
            ValueError: batch size or spatial size does not fit the mask.
        """
        from medspark.sparse.ops.densify import gather

        if x.ndim != mask.visible.ndim + 1 or x.shape[0] != mask.batch_size:
            raise ValueError(
                f"a mask of batch {mask.batch_size} and grid {mask.grid} does not fit "
                f"a tensor of shape {tuple(x.shape)}"
            )
        mask = mask.to(x.device)
        spatial = tuple(x.shape[2:])
        if not torch.compiler.is_dynamo_compiling():
            mask.prepare(semantics.coarse)
        level = mask.level(spatial, semantics.coarse)
        return block_sparse(gather(x, level), mask, level, spatial, semantics)

    def with_features(self, features: Tensor) -> BlockSparseTensor:
        """Other features on the same active voxels (any number of channels).

        Raises:
            ValueError: they do not have a row for each active voxel.
        """
        level = self._level
        if features.ndim != 5 or tuple(features.shape[:4]) != (level.n_blocks, *level.block):
            raise ValueError(
                f"features must be [{level.n_blocks}, {', '.join(map(str, level.block))}, C] like those "
                f"of {self!r}, got {list(features.shape)}"
            )
        return like(self, features)

    @property
    def features(self) -> Tensor:
        """Packed blocks `[n_blocks, bz, by, bx, C]`; gradients run through them."""
        packed = self._features
        if packed.requires_grad or not torch.is_grad_enabled():
            return packed
        with torch._C.DisableTorchFunctionSubclass():
            # True of a leaf, and of what came out of a foreign autograd.Function (checkpointing): the
            # graph continues at this object.
            if self.requires_grad:
                return torch.ops.aten.alias(self) if _tracing() else self.as_subclass(Tensor)
        return packed

    @property
    def mask(self) -> BlockMask:
        """The visible cells."""
        return self._mask

    @property
    def level(self) -> Level:
        """Index of this tensor's resolution."""
        return self._level

    @property
    def semantics(self) -> Semantics:
        """Choices for coarse levels and pools."""
        return self._semantics

    @property
    def spatial(self) -> tuple[int, ...]:
        """Voxels per axis of the dense volume."""
        return self._spatial

    # Metadata without the detour through __torch_function__.
    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """Shape of the dense volume."""
        return packed_memory(self).shape if _compiler_looks() else self._size

    @property
    def ndim(self) -> int:  # type: ignore[override]
        """Axes of the dense volume."""
        return packed_memory(self).ndim if _compiler_looks() else len(self._size)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Type of the features."""
        return self._features.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the features are."""
        return self._features.device

    @property
    def data(self) -> BlockSparseTensor:  # type: ignore[override]
        """The same memory outside the graph, as `detach()`; it cannot be assigned."""
        return like(self, self._features.detach())

    def __len__(self) -> int:
        return self._size[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockSparseTensor:
        twin = like(self, copy.deepcopy(self._features, memo))
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is not BlockSparseTensor:
            raise NotImplementedError(f"a {type(self).__name__} cannot be stored. {self._advice}")
        rules = (self._semantics.coarse, self._semantics.max_pool, self._semantics.avg_divisor)
        return rebuild, (self._features.detach(), self._mask.visible, self._spatial, *rules)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"{type(self).__name__}(shape={tuple(self._size)}, dtype={self._features.dtype}, "
            f"active={self._level.n_blocks} blocks of {self._level.block}, mask={self._mask})"
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the sparse counterpart of a torch function."""
        handler = cls._handlers.get(func)
        if handler is None:
            # Operators that torch writes in Python (`**`, `1 - x`): Dynamo knows them by name only.
            handler = cls._handlers.get(getattr(func, "__name__", ""))
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        attribute = getattr(func, "__name__", "") in ("__get__", "__set__", "__delete__")
        if func in _METADATA or (attribute and func not in _FOREIGN):  # dtype, device, ...
            return super().__torch_function__(func, types, args, kwargs or {})
        if _compiler_looks():
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise NotImplementedError(_unsupported(cls, func, args))


class ChannelsLastView(BlockSparseTensor):
    """What `x.permute(0, 2, 3, 4, 1)` gives: shape `[B, D, H, W, C]`, for linear layers and layer norms."""

    _handlers: ClassVar[dict[Any, Handler]] = {}
    _advice = "Only elementwise functions, linear and layer_norm work here; permute the channels back first"


class PaddedView(BlockSparseTensor):
    """What `F.pad(x, ...)` with zeros gives: a promise that the next convolution redeems.

    Attributes:
        pads: voxels added below and above, per axis (z, y, x).
    """

    _handlers: ClassVar[dict[Any, Handler]] = {}
    _advice = "Zero padding must be followed by a convolution, which takes it into account"
    pads: tuple[tuple[int, int], ...]


def implements(
    *functions: Any, on: type[BlockSparseTensor] = BlockSparseTensor
) -> Callable[[Handler], Handler]:
    """Decorator: this handler runs when one of the torch functions meets a BlockSparseTensor."""

    def register(handler: Handler) -> Handler:
        for function in functions:
            on._handlers[function] = handler
        return handler

    return register


def block_sparse(
    features: Tensor,
    mask: BlockMask,
    level: Level,
    spatial: tuple[int, ...],
    semantics: Semantics,
    cls: type[BlockSparseTensor] = BlockSparseTensor,
) -> BlockSparseTensor:
    """A BlockSparseTensor of features that are known to fit the level."""
    size = (mask.batch_size, features.shape[-1], *spatial)
    if cls is ChannelsLastView:
        size = (size[0], *spatial, size[1])
    return shell(cls, features, mask, level, spatial, semantics, torch.Size(size))


def like(x: BlockSparseTensor, features: Tensor) -> BlockSparseTensor:
    """A tensor like `x` with other features, which are known to fit its level."""
    size = x._size
    if features.shape[-1] != x._features.shape[-1]:
        channels = features.shape[-1]
        last = isinstance(x, ChannelsLastView)
        size = torch.Size((*size[:-1], channels) if last else (size[0], channels, *size[2:]))
    # Named here, as Dynamo must see where the class comes from.
    cls = ChannelsLastView if isinstance(x, ChannelsLastView) else BlockSparseTensor
    if isinstance(x, PaddedView):
        cls = PaddedView
    twin = shell(cls, features, x._mask, x._level, x._spatial, x._semantics, size)
    if isinstance(x, PaddedView):
        twin.pads = x.pads  # type: ignore[attr-defined]
    return twin


def shell(
    cls: type[BlockSparseTensor],
    features: Tensor,
    mask: BlockMask,
    level: Level,
    spatial: tuple[int, ...],
    semantics: Semantics,
    size: torch.Size,
) -> BlockSparseTensor:
    """The object itself, on the memory and the graph of its features."""
    if _tracing():
        while_tracing()
        x = features.as_subclass(cls)
    elif torch.is_grad_enabled():
        x = features.as_subclass(cls)
    else:
        # Neither in the graph nor a view: what a foreign autograd.Function makes without gradients must
        # be able to carry the node that torch gives to its outputs, and to be changed in place then.
        features = features.detach() if features.requires_grad else features
        x = Tensor._make_subclass(cls, features)
    x._features = features
    x._mask = mask
    x._level = level
    x._spatial = spatial
    x._semantics = semantics
    x._size = size
    return x


def rebuild(
    features: Tensor,
    visible: Tensor,
    spatial: tuple[int, ...],
    coarse: Any,
    pool: Any,
    divisor: Any,
) -> BlockSparseTensor:
    """Unpickles a BlockSparseTensor; `torch.load(weights_only=True)` may call it."""
    semantics = Semantics(coarse, pool, divisor)
    return BlockSparseTensor(features, BlockMask(visible), tuple(spatial), semantics)


torch.serialization.add_safe_globals([rebuild, BlockMask])


def _tracing() -> bool:
    """Whether Dynamo is reading this code, rather than Python running it."""
    return torch.compiler.is_dynamo_compiling()


def _compiler_looks() -> bool:
    """Whether the compiler asks for the memory layout of an input, which is the packed one."""
    if torch.compiler.is_dynamo_compiling() or TracingContext.try_get() is None:
        return False
    look_into_tuples()
    return True


def packed_memory(x: Tensor) -> Tensor:
    """The tensor as torch's C++ code sees it: packed blocks, with its place in the graph."""
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)


def _unsupported(cls: type[BlockSparseTensor], func: Any, args: Any) -> str:
    name = torch.overrides.resolve_name(func) or getattr(func, "__name__", str(func))
    shapes = [str(tuple(a.shape)) for a in args if isinstance(a, Tensor)]
    on = f" (arguments {', '.join(shapes)})" if shapes else ""
    what = (
        "block-sparse counterpart"
        if cls is BlockSparseTensor
        else f"counterpart on a {cls.__name__}"
    )
    return f"{name}{on} has no {what}. {cls._advice}"
