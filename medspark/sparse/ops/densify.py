"""Between packed blocks and dense volumes: `densify` fills hidden voxels with a token, `gather` undoes it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from medspark.sparse import reference
from medspark.sparse._backend import current_backend
from medspark.sparse._ext import native
from medspark.sparse._op import (
    accumulation,
    check,
    check_device,
    code,
    core_level,
    define_op,
    launch,
    tables,
    threads,
)
from medspark.sparse.mask import Level
from medspark.sparse.tensor import BlockSparseTensor


def _core(cells: Tensor, blocks: Tensor, block: list[int], dense: Tensor) -> Any:
    level = core_level(cells, blocks, block, dense)
    return native().Densify(code(dense.dtype), level, dense.shape[1], dense.stride(), threads())


def _dense_like(features: Tensor, cells: Tensor, block: list[int]) -> Tensor:
    """Uninitialised dense tensor of the level, channels last: rows of channels stay together."""
    batch, *grid = cells.shape
    size = [g * n for g, n in zip(grid, block, strict=True)]
    return features.new_empty(batch, *size, features.shape[-1]).permute(0, 4, 1, 2, 3)


def _densify(
    features: Tensor, token: Tensor | None, cells: Tensor, blocks: Tensor, block: list[int]
) -> Tensor:
    features = check(features, "features", (blocks.shape[0], *block, None))
    dense = _dense_like(features, cells, block)
    if token is not None:
        token = check(token, "token", (features.shape[-1],), like=features)
    launch(
        "densify",
        _core(cells, blocks, block, dense),
        dense,
        features.data_ptr(),
        token.data_ptr() if token is not None else 0,
        dense.data_ptr(),
    )
    return dense


def _densify_fake(
    features: Tensor, token: Tensor | None, cells: Tensor, blocks: Tensor, block: list[int]
) -> Tensor:
    return _dense_like(features, cells, block)


def _densify_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, token, cells, blocks, block = inputs
    ctx.save_for_backward(cells, blocks)
    ctx.block, ctx.has_token = block, token is not None


def _densify_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cells, blocks = ctx.saved_tensors
    features = token = None
    if ctx.needs_input_grad[0]:
        features = gather_op(grad, cells, blocks, ctx.block)
    if ctx.has_token and ctx.needs_input_grad[1]:
        token = sum_hidden_op(grad, cells, blocks, ctx.block).to(grad.dtype)
    return features, token, None, None, None


def _check_dense(dense: Tensor, cells: Tensor, block: list[int]) -> None:
    """The kernels take dense tensors with any strides."""
    batch, *grid = cells.shape
    size = [g * n for g, n in zip(grid, block, strict=True)]
    if tuple(dense.shape) != (batch, dense.shape[1], *size):
        raise ValueError(f"dense must have shape [{batch}, C, {size}], got {tuple(dense.shape)}")
    check_device(dense, "dense")


def _gather(dense: Tensor, cells: Tensor, blocks: Tensor, block: list[int]) -> Tensor:
    _check_dense(dense, cells, block)
    features = dense.new_empty(blocks.shape[0], *block, dense.shape[1])
    core = _core(cells, blocks, block, dense)
    launch("gather", core, dense, dense.data_ptr(), features.data_ptr())
    return features


def _gather_fake(dense: Tensor, cells: Tensor, blocks: Tensor, block: list[int]) -> Tensor:
    return dense.new_empty(blocks.shape[0], *block, dense.shape[1])


def _gather_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])
    ctx.block = inputs[3]


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cells, blocks = ctx.saved_tensors
    return densify_op(grad, None, cells, blocks, ctx.block), None, None, None


def _sum_hidden(dense: Tensor, cells: Tensor, blocks: Tensor, block: list[int]) -> Tensor:
    _check_dense(dense, cells, block)
    token = dense.new_empty(dense.shape[1], dtype=accumulation(dense.dtype))
    core = _core(cells, blocks, block, dense)
    launch("sum_hidden", core, dense, dense.data_ptr(), token.data_ptr())
    return token


def _sum_hidden_fake(dense: Tensor, cells: Tensor, blocks: Tensor, block: list[int]) -> Tensor:
    return dense.new_empty(dense.shape[1], dtype=accumulation(dense.dtype))


sum_hidden_op = define_op(
    "sum_hidden(Tensor dense, Tensor cells, Tensor blocks, int[] block) -> Tensor",
    _sum_hidden,
    _sum_hidden_fake,
)
gather_op = define_op(
    "gather(Tensor dense, Tensor cells, Tensor blocks, int[] block) -> Tensor",
    _gather,
    _gather_fake,
    _gather_setup,
    _gather_backward,
)
densify_op = define_op(
    "densify(Tensor features, Tensor? token, Tensor cells, Tensor blocks, int[] block) -> Tensor",
    _densify,
    _densify_fake,
    _densify_setup,
    _densify_backward,
)


def gather(x: Tensor, level: Level) -> Tensor:
    """Packed blocks `[n_blocks, bz, by, bx, C]` of a dense `[B, C, D, H, W]` (or 2D) tensor."""
    volume = x if x.ndim == 5 else x.unsqueeze(2)
    if current_backend() == "reference":
        return reference.pack(volume, level)
    features: Tensor = gather_op(volume, *tables(level), list(level.block))
    return features


def densify(x: BlockSparseTensor, token: Tensor | None = None) -> Tensor:
    """Leaves the sparse world: the dense volume with `token` at hidden voxels.

    SparK (arXiv 2301.03580), "densifying": hidden places of each level take a learned mask token.

    Args:
        x: `[B, C, D, H, W]` (or `[B, C, H, W]`).
        token: `[C]` (or any shape with C elements); 0 if None.

    Returns:
        A plain tensor of the same shape, channels last in memory; differentiable in features and token.

    Raises:
        ValueError: the token does not have C elements.
    """
    channels = x.shape[1]
    if token is not None:
        if token.numel() != channels:
            raise ValueError(f"the token must have {channels} elements, got {tuple(token.shape)}")
        token = token.reshape(channels).to(x.features.dtype)
    if current_backend() == "reference":
        dense = reference.unpack(x.features, x.level)
        dense = reference.densify(dense, reference.voxel_mask(x.level), token)
    else:
        dense = densify_op(x.features, token, *tables(x.level), list(x.level.block))
    return dense if x.ndim == 5 else dense.squeeze(2)


def dense_level(x: BlockSparseTensor) -> tuple[Tensor, Tensor]:
    """Dense 5-axis tensor and voxel mask of `x`: how the reference backend sees it."""
    return reference.unpack(x.features, x.level), reference.voxel_mask(x.level)
