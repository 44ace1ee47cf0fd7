"""Change of the active set: `restrict` to fewer voxels, `densify_onto` others with a token."""

from __future__ import annotations

import math
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
    define_op,
    launch,
    tables,
    threads,
)
from medspark.sparse.mask import BlockMask, Level, _coarsen, _three_axes, break_graph
from medspark.sparse.tensor import BlockSparseTensor

_LEVELS = (
    "Tensor in_cells, Tensor in_blocks, int[] in_block, "
    "Tensor out_cells, Tensor out_blocks, int[] out_block"
)


class _Fields(NamedTuple):
    in_cells: Tensor
    in_blocks: Tensor
    in_block: Sequence[int]
    out_cells: Tensor
    out_blocks: Tensor
    out_block: Sequence[int]


class Levels(_Fields, Config):
    """From which level to which other of the same size."""

    @classmethod
    def between(cls, level: Level, out: Level) -> Levels:
        """The levels of a transfer."""
        return cls(*tables(level), level.block, *tables(out), out.block)

    def swap(self) -> Levels:
        """The way back."""
        return Levels(*self[3:], *self[:3])


def _core(x: Tensor, v: Levels) -> Any:
    shapes = [
        (cells.shape[0], *(g * n for g, n in zip(cells.shape[1:], block, strict=True)))
        for cells, block in ((v.in_cells, v.in_block), (v.out_cells, v.out_block))
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"both levels must have the same batch and size, got {shapes[0]} and {shapes[1]}"
        )
    return native().Transfer(
        code(x.dtype),
        core_level(v.in_cells, v.in_blocks, v.in_block, x),
        core_level(v.out_cells, v.out_blocks, v.out_block, x),
        x.shape[-1],
        threads(),
    )


def _transfer(x: Tensor, token: Tensor | None, levels: Levels) -> Tensor:
    x = check(x, "transfer: features", (levels.in_blocks.shape[0], *levels.in_block, None))
    if token is not None:
        token = check(token, "transfer: token", (x.shape[-1],), like=x)
    y = _transfer_fake(x, token, levels)
    address = token.data_ptr() if token is not None else 0
    launch("transfer", _core(x, levels), x, x.data_ptr(), address, y.data_ptr())
    return y


def _transfer_fake(x: Tensor, token: Tensor | None, levels: Levels) -> Tensor:
    return x.new_empty(levels.out_blocks.shape[0], *levels.out_block, x.shape[-1])


def _transfer_save(
    x: Tensor, token: Tensor | None, levels: Levels, y: Tensor
) -> tuple[Tensor | None, ...]:
    return ()


def _transfer_backward(saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
    x = token = None
    if saved.needs[0]:
        x = transfer_op(grad, None, saved.config.swap())
    if saved.needs[1]:
        token = sum_untransferred_op(grad, saved.config).to(grad.dtype)
    return x, token


def _sum_untransferred(grad: Tensor, levels: Levels) -> Tensor:
    grad = check(grad, "transfer: grad", (levels.out_blocks.shape[0], *levels.out_block, None))
    token = _sum_untransferred_fake(grad, levels)
    launch("sum_untransferred", _core(grad, levels), grad, grad.data_ptr(), token.data_ptr())
    return token


def _sum_untransferred_fake(grad: Tensor, levels: Levels) -> Tensor:
    return grad.new_empty(grad.shape[-1], dtype=accumulation(grad.dtype))


sum_untransferred_op = define_op(
    f"sum_untransferred(Tensor grad, {_LEVELS}) -> Tensor",
    Levels,
    _sum_untransferred,
    _sum_untransferred_fake,
)
transfer_op = define_op(
    f"transfer(Tensor x, Tensor? token, {_LEVELS}) -> Tensor",
    Levels,
    _transfer,
    _transfer_fake,
    _transfer_save,
    _transfer_backward,
)


def transfer_features(x: BlockSparseTensor, out: Level, token: Tensor | None) -> Tensor:
    """Packed features on the level `out` of the same size: those of `x`, the token where `x` has none.

    Args:
        x: `[B, C, D, H, W]` (or `[B, C, H, W]`).
        out: a level of x's spatial size and batch, of any mask.
        token: `[C]` (or any shape with C elements); 0 if None.

    Raises:
        ValueError: the token does not have C elements, or `out` has another size.
    """
    channels = x.shape[1]
    if token is not None:
        if token.numel() != channels:
            raise ValueError(f"the token must have {channels} elements, got {tuple(token.shape)}")
        token = token.reshape(channels).to(x.features.dtype)
    if current_backend() == "reference":
        dense, mask = reference.dense_level(x.features, x.level)
        y = reference.transfer(dense, mask, reference.voxel_mask(out), token)
        return reference.pack(y, out)
    features: Tensor = transfer_op(x.features, token, Levels.between(x.level, out))
    return features


def _level_of(x: BlockSparseTensor, mask: BlockMask) -> tuple[BlockMask, Level]:
    """The mask on x's device, and its level of x's size."""
    if mask.batch_size != x.shape[0]:
        raise ValueError(f"a mask of batch {mask.batch_size} does not fit {tuple(x.shape)}")
    mask = mask.to(x.device)
    return mask, mask.level(x.spatial, x.semantics.coarse)


def _check_all_active(x: BlockSparseTensor, mask: BlockMask, level: Level) -> None:
    """Compares the CPU copies of both masks on the coarsest grid that refines both of theirs."""
    if torch.compiler.is_dynamo_compiling():
        break_graph("whether a mask can be restricted to another depends on the masks")
    grid = tuple(math.lcm(a, b) for a, b in zip(x.level.grid, level.grid, strict=True))
    shown = []
    for own, cells in ((x.mask, x.level.grid), (mask, level.grid)):
        visible = own._host.view(-1, *_three_axes(own.grid))
        visible = _coarsen(visible, cells, x.semantics.coarse)
        for axis, n in enumerate(grid):
            visible = visible.repeat_interleave(n // cells[axis], axis + 1)
        shown.append(visible)
    missing = int((shown[1] & ~shown[0]).sum()) * math.prod(x.spatial) // math.prod(grid)
    if missing:
        wanted = level.n_blocks * level.block_voxels
        raise ValueError(
            f"restrict() only removes active voxels, but {missing} of the {wanted} that {mask} asks "
            f"for at size {x.spatial} are not active in the tensor; fill them with a token: "
            "densify(x, token, mask)"
        )


def restrict(x: BlockSparseTensor, mask: BlockMask) -> BlockSparseTensor:
    """`x` on the active voxels of another mask, all of which must be active in `x`.

    The check reads the CPU copies of the masks and never waits for a device.

    Args:
        x: `[B, C, D, H, W]` (or `[B, C, H, W]`).
        mask: any grid onto which x's spatial size maps.

    Returns:
        A tensor of the same shape with the mask `mask`; differentiable.

    Raises:
        ValueError: an active voxel of `mask` is not active in `x`, or the mask does not fit it.
    """
    mask, level = _level_of(x, mask)
    _check_all_active(x, mask, level)
    return BlockSparseTensor(transfer_features(x, level, None), mask, x.spatial, x.semantics)


def densify_onto(
    x: BlockSparseTensor, token: Tensor | None, out_mask: BlockMask
) -> BlockSparseTensor:
    """The active voxels of `out_mask`: the values of `x` where it is active, the token elsewhere.

    Args:
        x: `[B, C, D, H, W]` (or `[B, C, H, W]`).
        token: `[C]` (or any shape with C elements); 0 if None.
        out_mask: any grid onto which x's spatial size maps.

    Returns:
        A tensor of the same shape with the mask `out_mask`; differentiable in features and token.

    Raises:
        ValueError: the token does not have C elements, or the mask does not fit `x`.
    """
    mask, level = _level_of(x, out_mask)
    return BlockSparseTensor(transfer_features(x, level, token), mask, x.spatial, x.semantics)
