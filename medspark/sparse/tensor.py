"""The masked volume as a value: a `torch.Tensor` that holds only its visible cells.

A `BlockSparseTensor` reports the shape of the dense volume and stores packed blocks. Ordinary modules
call torch functions on it; `__torch_function__` runs each as its sparse counterpart (`handlers.py`,
`elementwise.py`), so a 3D CNN needs no conversion. Autograd runs through the packed features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from medspark.sparse.mask import BlockMask, Level, Semantics

Handler = Callable[..., Any]
_HANDLERS: dict[Any, Handler] = {}
# Questions about the dense shape and type, which the wrapper itself can answer.
_METADATA = {
    Tensor.is_floating_point,
    torch.is_floating_point,
    Tensor.is_complex,
    torch.is_complex,
    Tensor.numel,
    torch.numel,
    Tensor.get_device,
    Tensor.element_size,
}


def implements(*functions: Any) -> Callable[[Handler], Handler]:
    """Decorator: this handler runs when one of the torch functions meets a BlockSparseTensor."""

    def register(handler: Handler) -> Handler:
        for function in functions:
            _HANDLERS[function] = handler
        return handler

    return register


class BlockSparseTensor(Tensor):
    """A batch of volumes `[B, C, D, H, W]` (or images `[B, C, H, W]`) of which only some cells exist.

    Make one with `from_dense`. Functions without a sparse counterpart raise NotImplementedError.

    Attributes:
        features: packed blocks `[n_blocks, bz, by, bx, C]`, part of the autograd graph.
        mask: the BlockMask.
        level: index of this tensor's resolution.
        semantics: choices for coarse levels and pools.
    """

    _features: Tensor
    _mask: BlockMask
    _level: Level
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
        level = mask.level(spatial, semantics.coarse)
        expected = (level.n_blocks, *level.block)
        if features.ndim != 5 or tuple(features.shape[:4]) != expected:
            raise ValueError(
                f"features of a {tuple(spatial)} level must be [{level.n_blocks}, "
                f"{', '.join(map(str, level.block))}, C], got {list(features.shape)}"
            )
        size = torch.Size((mask.batch_size, features.shape[-1], *spatial))
        self: BlockSparseTensor = Tensor._make_wrapper_subclass(
            cls, size, dtype=features.dtype, device=features.device, requires_grad=False
        )
        self._features, self._mask, self._level = features, mask, level
        self._semantics, self._size = semantics, size
        return self

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
        return cls(gather(x, mask.level(spatial, semantics.coarse)), mask, spatial, semantics)

    def to_dense(self) -> Tensor:  # type: ignore[override]
        """The plain dense tensor, 0 at hidden voxels; differentiable."""
        from medspark.sparse.ops.densify import densify

        return densify(self)

    def with_features(self, features: Tensor) -> BlockSparseTensor:
        """Other features on the same active voxels (any number of channels)."""
        return BlockSparseTensor(features, self._mask, self.spatial, self._semantics)

    @property
    def features(self) -> Tensor:
        """Packed blocks `[n_blocks, bz, by, bx, C]`; gradients run through them."""
        return self._features

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
        return tuple(self._size[2:])

    # Metadata without the detour through __torch_function__.
    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        """Shape of the dense volume."""
        return self._size

    @property
    def ndim(self) -> int:  # type: ignore[override]
        """Axes of the dense volume."""
        return len(self._size)

    @property
    def requires_grad(self) -> bool:
        """Whether the packed features take part in autograd."""
        return self._features.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self._features.requires_grad_(value)

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        """Autograd node of the packed features."""
        return self._features.grad_fn

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        """Whether the packed features are a leaf of the graph."""
        return self._features.is_leaf

    def dim(self) -> int:
        """Axes of the dense volume."""
        return len(self._size)

    def size(self, dim: int | None = None) -> Any:
        """Shape of the dense volume, or one axis of it."""
        return self._size if dim is None else self._size[dim]

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockSparseTensor:
        twin = BlockSparseTensor(
            copy.deepcopy(self._features, memo), self._mask, self.spatial, self._semantics
        )
        memo[id(self)] = twin
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        return BlockSparseTensor, (self._features, self._mask, self.spatial, self._semantics)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"BlockSparseTensor(shape={tuple(self._size)}, dtype={self._features.dtype}, "
            f"active={self._level.n_blocks} blocks of {self._level.block}, mask={self._mask})"
        )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the sparse counterpart of a torch function."""
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        if func in _METADATA or getattr(func, "__name__", "") == "__get__":  # attributes: dtype ...
            return super().__torch_function__(func, types, args, kwargs or {})
        raise NotImplementedError(_unsupported(func))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Reached only by calls that bypass `__torch_function__`; there is nothing sparse to run."""
        raise NotImplementedError(_unsupported(func))


def _unsupported(func: Any) -> str:
    name = torch.overrides.resolve_name(func) or getattr(func, "__name__", str(func))
    return (
        f"{name} has no block-sparse counterpart. Work on `x.features` "
        "[n_blocks, bz, by, bx, C] and `x.with_features(...)`, or leave the sparse world with "
        "`x.to_dense()` or `medspark.sparse.densify(x, token)`"
    )
