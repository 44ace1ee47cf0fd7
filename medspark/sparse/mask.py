"""Block masks: which cells of a volume are visible, and the tables that index them at every level.

A mask is drawn on a coarse grid of cells. At a level with spatial size S, a cell covers S / grid voxels
per axis; where S is smaller than the grid, the level has cells of its own, one voxel each, made active by
the coarse rule. Packed features of a level are stored block by block in the row-major order of its
active cells, so one table (cell -> block) is the whole index of a level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

CoarseRule = Literal["any", "all", "majority", "every"]
Size = tuple[int, int, int]
T = TypeVar("T")
_RULES = get_args(CoarseRule)


@dataclass(frozen=True)
class Semantics:
    """Choices that an unmodified network cannot pass along; they travel with the tensor.

    Attributes:
        coarse: which voxels are active at a level coarser than the cell: those with `any` visible cell
            (default), with `all` cells visible, with a `majority` of them, or `every` voxel (nnssl).
        max_pool: hidden voxels count as `"zero"` (SparK, arXiv 2301.03580) or are `"ignore"`d.
        avg_divisor: averages divide by the full `"kernel"` (SparK) or by the `"active"` voxels only.
    """

    coarse: CoarseRule = "any"
    max_pool: Literal["zero", "ignore"] = "zero"
    avg_divisor: Literal["kernel", "active"] = "kernel"


class Tables:
    """Index of the active cells of one grid under one coarse rule, shared by its levels.

    Attributes:
        cells: int32 `[B, gz, gy, gx]`, block of each cell, -1 where hidden.
        blocks: int32 `[n_blocks]`, flat index of each block's cell in `cells`.
        visible: bool `[B, gz, gy, gx]`.
        first_block: CPU int64 `[B + 1]`, first block of each sample, then the number of blocks.
        first_block_there: the same on the mask's device.
    """

    def __init__(self, visible: Tensor, device: torch.device) -> None:
        blocks = visible.flatten().nonzero().flatten().to(torch.int32)
        cells = torch.full((visible.numel(),), -1, dtype=torch.int32)
        cells[blocks.long()] = torch.arange(blocks.numel(), dtype=torch.int32)
        counts = visible.flatten(1).sum(1)
        self.cells = cells.view(visible.shape).to(device)
        self.blocks = blocks.to(device)
        self.visible = visible.to(device)
        self.first_block = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self.first_block_there = self.first_block.to(device)


class Level:
    """Index of one level: the tables of its grid of cells, and the voxels per cell.

    Attributes:
        tables: index of the active cells; `cells`, `blocks` and `visible` are short for its own.
        block: voxels per cell along (z, y, x).
    """

    def __init__(self, tables: Tables, block: Size) -> None:
        self.tables = tables
        self.block = block
        self._plans: dict[Any, Any] = {}

    def plan(self, key: Any, build: Callable[[], T]) -> T:
        """What `build` returned for this key when first asked; a traced graph keeps nothing."""
        if not torch.compiler.is_dynamo_compiling():
            plan = self._plans.get(key)
            if plan is None:
                plan = self._plans[key] = build()
            return plan
        return build()

    @property
    def cells(self) -> Tensor:
        """int32 `[B, gz, gy, gx]`, block of each cell, -1 where hidden."""
        return self.tables.cells

    @property
    def blocks(self) -> Tensor:
        """int32 `[n_blocks]`, flat index of each block's cell in `cells`."""
        return self.tables.blocks

    @property
    def visible(self) -> Tensor:
        """Bool `[B, gz, gy, gx]`: the active cells."""
        return self.tables.visible

    @property
    def first_block(self) -> Tensor:
        """CPU int64 `[B + 1]`, first block of each sample, then the number of blocks."""
        return self.tables.first_block

    @property
    def n_blocks(self) -> int:
        """Active cells of the whole batch."""
        return self.tables.blocks.shape[0]

    @property
    def grid(self) -> Size:
        """Cells per axis (z, y, x)."""
        _, z, y, x = self.tables.cells.shape
        return z, y, x

    @property
    def block_voxels(self) -> int:
        """Voxels of one cell."""
        return self.block[0] * self.block[1] * self.block[2]

    def segment_starts(self, per_sample: bool) -> Tensor:
        """int64 first row of each segment (sample, or the whole batch), then the number of rows.

        Lives on the mask's device, where the kernels read it.
        """
        return self.plan(("starts", per_sample), lambda: self._segment_starts(per_sample))

    def _segment_starts(self, per_sample: bool) -> Tensor:
        rows = self.tables.first_block_there * self.block_voxels
        return rows if per_sample else rows[:: max(rows.shape[0] - 1, 1)].contiguous()

    def sample_of_block(self) -> Tensor:
        """int64 `[n_blocks]`: the sample to which each block belongs."""
        z, y, x = self.grid
        return torch.div(self.blocks, z * y * x, rounding_mode="floor").long()


class BlockMask:
    """Visible cells of a batch of volumes.

    Args:
        visible: bool `[B, Gz, Gy, Gx]` (or `[B, Gy, Gx]` for images), True where the cell is kept. Samples
            may have any number of visible cells, none included.

    Raises:
        TypeError: `visible` is not a boolean tensor.
        ValueError: `visible` has the wrong number of axes or an empty grid.

    The tables are built on the CPU from a copy of the mask; a mask on another device is copied once.
    """

    def __init__(self, visible: Tensor) -> None:
        if not isinstance(visible, Tensor) or visible.dtype != torch.bool:
            kind = visible.dtype if isinstance(visible, Tensor) else type(visible).__name__
            raise TypeError(f"BlockMask needs a boolean tensor of visible cells, got {kind}")
        if visible.ndim not in (3, 4) or 0 in visible.shape[1:]:
            raise ValueError(
                "BlockMask needs visible cells [B, Gz, Gy, Gx] or [B, Gy, Gx] with at least one cell, "
                f"got shape {tuple(visible.shape)}"
            )
        self._set_up(visible, visible.detach().cpu())

    def _set_up(self, visible: Tensor, host: Tensor) -> None:
        self.visible = visible
        self._host = host
        self._tables: dict[tuple[Size, CoarseRule], Tables] = {}
        self._levels: dict[tuple[tuple[int, ...], CoarseRule], Level] = {}
        self._table(_three_axes(self.grid), "any")

    @classmethod
    def random(
        cls,
        batch_size: int,
        grid: tuple[int, ...],
        ratio: float,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> BlockMask:
        """Hides a share of the cells, the same number in each sample, drawn independently per sample.

        SparK (arXiv 2301.03580): keeps `round(n * (1 - ratio))` of the n cells, those with the smallest
        of n uniform numbers drawn on the CPU.

        Args:
            batch_size: samples.
            grid: cells per axis, (z, y, x) or (y, x).
            ratio: share of hidden cells, 0 to 1.
            generator: CPU generator; the default one if None.
            device: of `visible`.
        """
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(f"the mask ratio must lie between 0 and 1, got {ratio}")
        cells = 1
        for n in grid:
            cells *= n
        keep = round(cells * (1.0 - ratio))
        order = torch.rand(batch_size, cells, generator=generator).argsort(dim=1)
        visible = torch.zeros(batch_size, cells, dtype=torch.bool)
        visible.scatter_(1, order[:, :keep], True)
        return cls(visible.view(batch_size, *grid).to(device or "cpu"))

    @property
    def batch_size(self) -> int:
        """Samples."""
        return self.visible.shape[0]

    @property
    def grid(self) -> tuple[int, ...]:
        """Cells per spatial axis, as many axes as the mask has."""
        return tuple(self.visible.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where `visible` and the tables are."""
        return self.visible.device

    def invert(self) -> BlockMask:
        """The mask with visible and hidden cells exchanged."""
        return BlockMask(~self.visible)

    def to(self, device: torch.device | str) -> BlockMask:
        """The mask on `device`; itself if it is there already."""
        moved = self.visible.to(device)
        if moved is self.visible:
            return self
        mask = BlockMask.__new__(BlockMask)
        mask._set_up(moved, self._host)  # what a device holds is not asked back
        return mask

    def equals(self, other: BlockMask) -> bool:
        """Whether both masks show the same cells."""
        return self is other or torch.equal(self._host, other._host)

    def __reduce__(self) -> tuple[type[BlockMask], tuple[Tensor]]:
        return BlockMask, (self.visible,)  # tables are rebuilt

    def __repr__(self) -> str:
        shown = int(self._host.sum())
        share = f"{shown}/{self._host.numel()}"
        return f"BlockMask(batch_size={self.batch_size}, grid={self.grid}, visible={share})"

    def level(self, spatial: tuple[int, ...], rule: CoarseRule = "any") -> Level:
        """Index of the level with this spatial size, cached.

        Args:
            spatial: voxels per axis, as many axes as the mask has.
            rule: which voxels are active where the level is coarser than the cell.

        Raises:
            ValueError: the size does not map onto the cells (neither a multiple nor a divisor per axis).
        """
        tracing = torch.compiler.is_dynamo_compiling()  # a graph keeps no caches
        level = None if tracing else self._levels.get((spatial, rule))
        if level is None:
            grid, block = self._cells_at(spatial)
            if rule not in _RULES:
                raise ValueError(f"unknown coarse rule {rule!r}: use any, all, majority or every")
            # All rules agree where a level is not coarser than the cell.
            fine = grid == _three_axes(self.grid)
            level = Level(self._table(grid, "any" if fine else rule), block)
            if not tracing:
                self._levels[spatial, rule] = level
        return level

    def _cells_at(self, spatial: tuple[int, ...]) -> tuple[Size, Size]:
        """Grid of cells and voxels per cell of a level.

        Raises:
            ValueError: the size does not map onto the cells.
        """
        size, cells = _three_axes(spatial), _three_axes(self.grid)
        if len(spatial) != len(self.grid) or any(
            s < 1 or (s % g != 0 and g % s != 0) for s, g in zip(size, cells, strict=True)
        ):
            raise ValueError(
                f"a level of size {tuple(spatial)} does not map onto the {self.grid} cells of the mask: "
                "each axis must hold a whole number of voxels per cell, or of cells per voxel "
                "(check padding, stride and crop size)"
            )
        grid = min(size[0], cells[0]), min(size[1], cells[1]), min(size[2], cells[2])
        return grid, (size[0] // grid[0], size[1] // grid[1], size[2] // grid[2])

    def _table(self, grid: Size, rule: CoarseRule) -> Tables:
        """Tables of a grid: of the mask itself, or coarser."""
        if (grid, rule) not in self._tables:
            if torch.compiler.is_dynamo_compiling():
                break_graph("a level on a grid of cells for which no tables were prepared")
            self._build(grid, rule)
        return self._tables[grid, rule]

    def _build(self, grid: Size, rule: CoarseRule) -> None:
        fine = self._host.view(-1, *_three_axes(self.grid))
        self._tables[grid, rule] = Tables(_coarsen(fine, grid, rule), self.device)

    def prepare(self, rule: CoarseRule = "any") -> None:
        """Builds the tables of the grids that halving leads to, down to one cell.

        Otherwise they are built when a level first needs them, which a compiled graph cannot do.
        """
        grid = _three_axes(self.grid)
        while max(grid) > 1 and all(n % 2 == 0 or n == 1 for n in grid):
            grid = max(grid[0] // 2, 1), max(grid[1] // 2, 1), max(grid[2] // 2, 1)
            self._table(grid, rule)


def break_graph(reason: str) -> None:
    """Ends the graph that Dynamo traces, where sizes depend on data."""
    # torch.compiler.disable would say the same, but imports Dynamo, for a second, with this module.
    torch._dynamo.graph_break(msg=reason)


def _three_axes(size: tuple[int, ...]) -> Size:
    """(z, y, x); images get depth 1."""
    if len(size) == 2:
        return 1, size[0], size[1]
    if len(size) == 3:
        return size[0], size[1], size[2]
    raise ValueError(f"expected 2 or 3 spatial axes, got {size}")


def _coarsen(visible: Tensor, grid: Size, rule: CoarseRule) -> Tensor:
    """Mask [B, Gz, Gy, Gx] on a coarser grid, under the coarse rule."""
    batch, *fine = visible.shape
    if tuple(fine) == grid:
        return visible
    if rule == "every":
        return visible.new_ones((batch, *grid))
    f = [n // g for n, g in zip(fine, grid, strict=True)]
    parts = visible.view(batch, grid[0], f[0], grid[1], f[1], grid[2], f[2])
    shown = parts.sum(dim=(2, 4, 6))
    total = f[0] * f[1] * f[2]
    if rule == "any":
        return shown > 0
    if rule == "all":
        return shown == total
    return shown * 2 > total
