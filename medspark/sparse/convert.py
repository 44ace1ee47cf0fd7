"""To and from other sparse tensors: `torch.sparse_coo`, spconv and MinkowskiEngine.

All of them list voxels one by one: a row of integers (sample, z, y, x) and a row of C features each. A
BlockSparseTensor holds the same rows, block by block, so converting means writing down the coordinates
that its mask implies, or finding the place that the mask gives to each coordinate. Gradients run through
both ways. spconv and MinkowskiEngine are imported where they are needed; torch is enough for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medspark.sparse.mask import BlockMask, Level, Semantics
from medspark.sparse.tensor import BlockSparseTensor

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def coordinates(x: BlockSparseTensor) -> Tensor:
    """Where the active voxels are.

    Args:
        x: `[B, C, D, H, W]` (or `[B, C, H, W]`).

    Returns:
        int32 `[n_voxels, 4]`, rows (sample, z, y, x) (or `[n_voxels, 3]`, rows (sample, y, x)), contiguous,
        in the packed order: row i belongs to row i of `x.features.flatten(0, 3)`.

    Raises:
        TypeError: `x` is not a BlockSparseTensor.
    """
    if not isinstance(x, BlockSparseTensor):
        raise TypeError(
            f"expected a BlockSparseTensor, got {type(x).__name__}; make one with "
            "BlockSparseTensor.from_dense(x, mask)"
        )
    level = x.level
    inside = torch.arange(level.block_voxels, device=level.blocks.device)
    offset = torch.stack(torch.unravel_index(inside, (1, *level.block)), dim=1)
    cell = torch.stack(torch.unravel_index(level.blocks.long(), level.cells.shape), dim=1)
    corner = cell * cell.new_tensor([1, *level.block])
    rows = (corner[:, None] + offset).flatten(0, 1).int()
    return rows if len(x.spatial) == 3 else rows[:, [0, 2, 3]]


def to_sparse_coo(x: BlockSparseTensor) -> Tensor:
    """A hybrid `torch.sparse_coo` tensor of the active voxels, channels last.

    Torch keeps dense axes behind sparse ones, and one row of C channels per voxel is how the features lie
    in memory; so the channels come last. `t.to_dense().movedim(-1, 1)` is `x.to_dense()`.

    Args:
        x: `[B, C, D, H, W]` (or `[B, C, H, W]`).

    Returns:
        `[B, D, H, W, C]` (or `[B, H, W, C]`) with dense axis C, coalesced: rows are sorted by sample, z, y,
        x, which is not the packed order. Differentiable in the features. Active voxels that are 0 stay.

    Raises:
        TypeError: `x` is not a BlockSparseTensor.
    """
    rows = coordinates(x).long()
    position = rows[:, 0]
    for axis, n in enumerate(x.spatial, start=1):
        position = position * n + rows[:, axis]
    order = position.argsort()
    batch, channels = x.shape[:2]
    # The invariants hold by construction: places inside the volume, each once, in order.
    return torch.sparse_coo_tensor(
        rows[order].t(),
        x.features.flatten(0, 3).index_select(0, order),
        (batch, *x.spatial, channels),
        is_coalesced=True,
        check_invariants=False,
    )


def from_sparse_coo(
    t: Tensor,
    mask: BlockMask | None = None,
    cell: Sequence[int] | None = None,
    semantics: Semantics = Semantics(),  # noqa: B008  (frozen)
) -> BlockSparseTensor:
    """The masked volume that holds the entries of a hybrid `torch.sparse_coo` tensor.

    Args:
        t: `[B, D, H, W, C]` (or `[B, H, W, C]`), all axes sparse but the last. Entries that repeat a
            coordinate are summed.
        mask: visible cells; active voxels without an entry are 0.
        cell: instead of a mask: voxels per cell and axis; cells with at least one entry are visible.
        semantics: choices for coarse levels and pools.

    Returns:
        `[B, C, D, H, W]` (or `[B, C, H, W]`), differentiable in the values of `t`.

    Raises:
        TypeError: another layout, values that are not floating point.
        ValueError: other sparse axes, an entry at a hidden or impossible place (the first is named), a NaN,
            a mask of another batch or size, not exactly one of `mask` and `cell`.
    """
    if t.layout != torch.sparse_coo:
        raise TypeError(f"expected a torch.sparse_coo tensor, got layout {t.layout}")
    if t.sparse_dim() not in (3, 4) or t.dense_dim() != 1:
        raise ValueError(
            f"expected shape [B, D, H, W, C] or [B, H, W, C] with only C dense, got {list(t.shape)} with "
            f"{t.sparse_dim()} sparse and {t.dense_dim()} dense axes; a dense volume x becomes one by "
            "x.movedim(1, -1).to_sparse(x.ndim - 1)"
        )
    t = t.coalesce()
    batch, *spatial = t.shape[:-1]
    sites = _Sites(t.indices().t(), t.values(), tuple(spatial), batch)
    return sites.pack(mask, cell, semantics)


def to_spconv(x: BlockSparseTensor) -> Any:
    """A `spconv.pytorch.SparseConvTensor` with the active voxels of `x` as its sites.

    Sites are in the packed order, rows (sample, z, y, x); the features are shared with `x`.

    Args:
        x: `[B, C, D, H, W]` (or `[B, C, H, W]`).

    Raises:
        ImportError: spconv is not installed.
        TypeError: `x` is not a BlockSparseTensor.
    """
    indices = coordinates(x)
    try:
        import spconv.pytorch as spconv
    except ImportError as error:
        raise ImportError(
            "to_spconv needs the package spconv: `pip install spconv`, or the wheel of your CUDA version "
            "(spconv-cu126 ...); see docs/conversions.md"
        ) from error
    return spconv.SparseConvTensor(x.features.flatten(0, 3), indices, list(x.spatial), x.shape[0])


def from_spconv(
    t: Any,
    mask: BlockMask | None = None,
    cell: Sequence[int] | None = None,
    semantics: Semantics = Semantics(),  # noqa: B008  (frozen)
) -> BlockSparseTensor:
    """The masked volume that holds the sites of a `spconv.pytorch.SparseConvTensor`.

    Args:
        t: sites in any order, rows (sample, z, y, x) or (sample, y, x). Repeated sites are summed.
        mask: visible cells; active voxels without a site are 0. Strided and transposed layers of spconv
            dilate: their sites may lie outside the mask of their input.
        cell: instead of a mask: voxels per cell and axis; cells with at least one site are visible.
        semantics: choices for coarse levels and pools.

    Returns:
        `[B, C, D, H, W]` (or `[B, C, H, W]`), differentiable in `t.features`.

    Raises:
        TypeError: indices that are not integers, features that are not floating point.
        ValueError: as `from_sparse_coo`.
    """
    sites = _Sites(t.indices, t.features, tuple(map(int, t.spatial_shape)), int(t.batch_size))
    return sites.pack(mask, cell, semantics)


def to_minkowski(
    x: BlockSparseTensor,
    coordinate_manager: Any = None,
    tensor_stride: int | Sequence[int] = 1,
) -> Any:
    """A `MinkowskiEngine.SparseTensor` with the active voxels of `x` (arXiv 1904.08755).

    Coordinates are (sample, z, y, x), so the engine's first spatial axis is z. It may reorder the rows:
    read them as `t.C` beside `t.F`.

    Args:
        x: `[B, C, D, H, W]` (or `[B, C, H, W]`) in float32 or float64, the engine's two types.
        coordinate_manager: shares coordinates with other tensors of the engine; a new one if None.
        tensor_stride: distance of neighbouring voxels in the engine's coordinates, for all axes or each:
            the product of the strides of the layers so far. Coordinates are multiplied by it.

    Raises:
        ImportError: MinkowskiEngine is not installed.
        TypeError: `x` is not a BlockSparseTensor, or of another type of number.
        ValueError: `x` has no active voxel, or the strides do not fit the axes.
    """
    rows = coordinates(x)
    if rows.shape[0] == 0:
        raise ValueError(
            "MinkowskiEngine crashes on tensors without voxels; this has no active voxel"
        )
    if x.features.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"MinkowskiEngine computes in float32 and float64, got {x.features.dtype}; convert "
            "x.with_features(x.features.float())"
        )
    stride = _strides(tensor_stride, len(x.spatial))
    try:
        import MinkowskiEngine
    except ImportError as error:
        raise ImportError(
            "to_minkowski needs the package MinkowskiEngine, which has to be built from its source: "
            "docs/conversions.md has the steps"
        ) from error
    return MinkowskiEngine.SparseTensor(
        features=x.features.flatten(0, 3),
        coordinates=rows * rows.new_tensor([1, *stride]),
        tensor_stride=list(stride),
        coordinate_manager=coordinate_manager,
    )


def from_minkowski(
    t: Any,
    spatial: Sequence[int],
    mask: BlockMask | None = None,
    cell: Sequence[int] | None = None,
    batch_size: int | None = None,
    semantics: Semantics = Semantics(),  # noqa: B008  (frozen)
) -> BlockSparseTensor:
    """The masked volume that holds the rows of a `MinkowskiEngine.SparseTensor`.

    Args:
        t: rows in any order, coordinates (sample, z, y, x) or (sample, y, x), multiples of its stride.
        spatial: voxels per axis of the volume at this stride (the engine's tensors have no bounds).
        mask: visible cells; active voxels without a row are 0.
        cell: instead of a mask: voxels per cell and axis; cells with at least one row are visible.
        batch_size: samples, needed where there is no mask and the last samples may have no row; by default
            those of the mask, else up to the last sample that has one.
        semantics: choices for coarse levels and pools.

    Returns:
        `[B, C, D, H, W]` (or `[B, C, H, W]`), differentiable in `t.F`.

    Raises:
        TypeError: coordinates that are not integers, features that are not floating point.
        ValueError: a coordinate that is no multiple of the stride, no way to know the batch size, and as
            `from_sparse_coo`.
    """
    rows, size = t.C, tuple(map(int, spatial))
    _check_rows(rows, t.F, size)
    stride = _strides(t.tensor_stride, len(size))
    step = rows.new_tensor([1, *stride])
    _refuse(rows, (rows % step != 0).any(1), f"is no multiple of the tensor stride {stride}")
    if batch_size is None:
        batch_size = mask.batch_size if mask is not None else _samples(rows)
    sites = _Sites(torch.div(rows, step, rounding_mode="floor"), t.F, size, batch_size)
    return sites.pack(mask, cell, semantics)


@dataclass(frozen=True)
class _Sites:
    """Voxels as another library lists them: `[N, 1 + axes]` rows (sample, z, y, x), and `[N, C]`."""

    rows: Tensor
    features: Tensor
    spatial: tuple[int, ...]
    batch_size: int

    def pack(
        self, mask: BlockMask | None, cell: Sequence[int] | None, semantics: Semantics
    ) -> BlockSparseTensor:
        """Puts each row where the mask (or the mask of the cells that are used) has its voxel."""
        self._check()
        if (mask is None) == (cell is None):
            raise ValueError(
                "give either mask= (visible cells) or cell= (voxels per cell), not both"
            )
        if mask is None:
            assert cell is not None
            mask = self._used_cells(tuple(cell))
        if mask.batch_size != self.batch_size:
            raise ValueError(f"a mask of {mask.batch_size} samples for {self.batch_size} samples")
        mask = mask.to(self.features.device)
        level = mask.level(self.spatial, semantics.coarse)
        index = self._index(level)
        # index_add, not index_copy: a site that is listed twice counts twice, as in torch.sparse_coo.
        flat = self.features.new_zeros(level.n_blocks * level.block_voxels, self.features.shape[1])
        packed = flat.index_add(0, index, self.features).unflatten(
            0, (level.n_blocks, *level.block)
        )
        return BlockSparseTensor(packed, mask, self.spatial, semantics)

    def _check(self) -> None:
        _check_rows(self.rows, self.features, self.spatial)
        size = self.rows.new_tensor([self.batch_size, *self.spatial], dtype=torch.int64)
        outside = ((self.rows < 0) | (self.rows >= size)).any(1)
        _refuse(
            self.rows,
            outside,
            f"lies outside the {self.batch_size} samples of size {self.spatial}",
        )
        _refuse(self.rows, self.features.detach().isnan().any(1).to(outside.device), "holds NaN")

    def _used_cells(self, cell: tuple[int, ...]) -> BlockMask:
        """The mask of all cells of this size that hold a site."""
        if len(cell) != len(self.spatial) or any(
            c < 1 or s % c for s, c in zip(self.spatial, cell, strict=True)
        ):
            raise ValueError(f"cells of {cell} voxels do not tile a volume of size {self.spatial}")
        grid = [s // c for s, c in zip(self.spatial, cell, strict=True)]
        visible = torch.zeros(self.batch_size, *grid, dtype=torch.bool, device=self.rows.device)
        sample, *axes = self.rows.long().unbind(1)
        visible[(sample, *(a // c for a, c in zip(axes, cell, strict=True)))] = True
        return BlockMask(visible)

    def _index(self, level: Level) -> Tensor:
        """int64 `[N]`: row of each site in the packed features."""
        sample, *axes = self.rows.to(level.cells.device).long().unbind(1)
        if len(axes) == 2:
            axes.insert(0, torch.zeros_like(sample))
        place = (a // n for a, n in zip(axes, level.block, strict=True))
        index = level.cells[(sample, *place)].long()
        _refuse(
            self.rows,
            index < 0,
            "lies in a hidden cell; hide nothing that holds a site, or give cell= instead of mask=",
        )
        for a, n in zip(axes, level.block, strict=True):
            index = index * n + a % n
        return index


def _check_rows(rows: Tensor, features: Tensor, spatial: tuple[int, ...]) -> None:
    if len(spatial) not in (2, 3):
        raise ValueError(f"expected 2 or 3 spatial axes, got {spatial}")
    if rows.dtype not in _INTEGERS:
        raise TypeError(f"coordinates must be integers, got {rows.dtype}")
    if not features.is_floating_point():
        raise TypeError(f"features must be floating point, got {features.dtype}")
    if features.ndim != 2 or tuple(rows.shape) != (features.shape[0], 1 + len(spatial)):
        raise ValueError(
            f"a volume of size {spatial} needs coordinates [N, {1 + len(spatial)}] and features [N, C], "
            f"got {list(rows.shape)} and {list(features.shape)}"
        )


def _refuse(rows: Tensor, bad: Tensor, why: str) -> None:
    """Raises for the first bad row."""
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        names = "sample, z, y, x" if rows.shape[1] == 4 else "sample, y, x"
        raise ValueError(f"row {first}, ({names}) = {tuple(rows[first].tolist())}, {why}")


def _samples(rows: Tensor) -> int:
    if rows.shape[0] == 0:
        raise ValueError("a tensor without rows does not tell its batch size; give batch_size=")
    return int(rows[:, 0].max()) + 1


def _strides(stride: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """One positive stride per axis."""
    each = (stride,) * axes if isinstance(stride, int) else tuple(map(int, stride))
    if len(each) != axes or min(each) < 1:
        raise ValueError(f"expected a positive stride for each of {axes} axes, got {stride}")
    return each
