"""Between packed blocks and dense volumes: `densify` fills hidden voxels with a token, `gather` undoes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from medspark.sparse import reference
from medspark.sparse._backend import current_backend
from medspark.sparse._ext import native
from medspark.sparse._op import (
    Config,
    Saved,
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
from medspark.sparse.mask import BlockMask, Level
from medspark.sparse.tensor import BlockSparseTensor


class _Fields(NamedTuple):
    cells: Tensor
    blocks: Tensor
    block: Sequence[int]


class Place(_Fields, Config):
    """The level on which packed blocks lie."""


def _place(level: Level) -> Place:
    return level.plan("place", lambda: Place(*tables(level), level.block))


def _core(place: Place, dense: Tensor) -> Any:
    level = core_level(place.cells, place.blocks, place.block, dense)
    return native().Densify(code(dense.dtype), level, dense.shape[1], dense.stride(), threads())


def _size(place: Place) -> list[int]:
    batch, *grid = place.cells.shape
    return [batch, *(g * n for g, n in zip(grid, place.block, strict=True))]


def _dense_like(features: Tensor, place: Place) -> Tensor:
    """Uninitialised dense tensor of the level, channels last: rows of channels stay together.

    Not a permuted view: what an autograd.Function returns must not be one, or it cannot be changed in place.
    """
    batch, depth, height, width = _size(place)
    channels = features.shape[-1]
    row, plane = width * channels, height * width * channels
    return features.new_empty_strided(
        (batch, channels, depth, height, width), (depth * plane, 1, plane, row, channels)
    )


def _packed_like(dense: Tensor, place: Place) -> Tensor:
    return dense.new_empty(place.blocks.shape[0], *place.block, dense.shape[1])


def _densify(features: Tensor, token: Tensor | None, place: Place) -> Tensor:
    features = check(
        features, "densify: features", (place.blocks.shape[0], *place.block, features.shape[-1])
    )
    dense = _dense_like(features, place)
    if token is not None:
        token = check(token, "densify: token", (features.shape[-1],), like=features)
    launch(
        "densify",
        _core(place, dense),
        dense,
        features.data_ptr(),
        token.data_ptr() if token is not None else 0,
        dense.data_ptr(),
    )
    return dense


def _densify_fake(features: Tensor, token: Tensor | None, place: Place) -> Tensor:
    return _dense_like(features, place)


def _save_nothing(*_: Any) -> tuple[Tensor, ...]:
    return ()


def _densify_backward(saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
    features = gather_op(grad, saved.config) if saved.needs[0] else None
    token = sum_hidden_op(grad, saved.config).to(grad.dtype) if saved.needs[1] else None
    return features, token


def _check_dense(dense: Tensor, place: Place) -> None:
    """The kernels take dense tensors with any strides."""
    batch, *size = _size(place)
    if tuple(dense.shape) != (batch, dense.shape[1], *size):
        raise ValueError(f"dense must have shape [{batch}, C, {size}], got {tuple(dense.shape)}")
    check_device(dense, "densify: dense")


def _gather(dense: Tensor, place: Place) -> Tensor:
    _check_dense(dense, place)
    features = _packed_like(dense, place)
    launch("gather", _core(place, dense), dense, dense.data_ptr(), features.data_ptr())
    return features


def _gather_backward(saved: Saved, grad: Tensor) -> tuple[Tensor]:
    return (densify_op(grad, None, saved.config),)


def _sum_hidden(dense: Tensor, place: Place) -> Tensor:
    _check_dense(dense, place)
    token = _sum_hidden_fake(dense, place)
    launch("sum_hidden", _core(place, dense), dense, dense.data_ptr(), token.data_ptr())
    return token


def _sum_hidden_fake(dense: Tensor, place: Place) -> Tensor:
    return dense.new_empty(dense.shape[1], dtype=accumulation(dense.dtype))


sum_hidden_op = define_op(
    "sum_hidden(Tensor dense, Tensor cells, Tensor blocks, int[] block) -> Tensor",
    Place,
    _sum_hidden,
    _sum_hidden_fake,
)
gather_op = define_op(
    "gather(Tensor dense, Tensor cells, Tensor blocks, int[] block) -> Tensor",
    Place,
    _gather,
    _packed_like,
    _save_nothing,
    _gather_backward,
)
densify_op = define_op(
    "densify(Tensor features, Tensor? token, Tensor cells, Tensor blocks, int[] block) -> Tensor",
    Place,
    _densify,
    _densify_fake,
    _save_nothing,
    _densify_backward,
)


def gather(x: Tensor, level: Level) -> Tensor:
    """Packed blocks `[n_blocks, bz, by, bx, C]` of a dense `[B, C, D, H, W]` (or 2D) tensor."""
    volume = x if x.ndim == 5 else x.unsqueeze(2)
    if current_backend() == "reference":
        return reference.pack(volume, level)
    features: Tensor = gather_op(volume, _place(level))
    return features


def densify(
    x: BlockSparseTensor, token: Tensor | None = None, out_mask: BlockMask | None = None
) -> Tensor:
    """Fills hidden voxels with `token`: the dense volume, or the active voxels of another mask.

    SparK (arXiv 2301.03580), "densifying": hidden places of each level take a learned mask token.

    Args:
        x: `[B, C, D, H, W]` (or `[B, C, H, W]`).
        token: `[C]` (or any shape with C elements); 0 if None.
        out_mask: the voxels to fill, on any grid that fits the volume; all of them if None.

    Returns:
        Differentiable in features and token, of the same shape: a plain tensor, channels last in memory, or
        with `out_mask` a BlockSparseTensor of that mask.

    Raises:
        ValueError: the token does not have C elements, or the mask does not fit.
    """
    if out_mask is not None:
        from medspark.sparse.ops.transfer import densify_onto

        return densify_onto(x, token, out_mask)
    channels = x.shape[1]
    if token is not None:
        if token.numel() != channels:
            raise ValueError(f"the token must have {channels} elements, got {tuple(token.shape)}")
        token = token.reshape(channels).to(x.features.dtype)
    if current_backend() == "reference":
        dense = reference.unpack(x.features, x.level)
        dense = reference.densify(dense, reference.voxel_mask(x.level), token)
    else:
        dense = densify_op(x.features, token, _place(x.level))
    return dense if x.ndim == 5 else dense.squeeze(2)


def dense_level(x: BlockSparseTensor) -> tuple[Tensor, Tensor]:
    """Dense 5-axis tensor and voxel mask of `x`: how the reference backend sees it."""
    return reference.dense_level(x.features, x.level)
