"""Block masks: which cells of a volume are visible, and the tables that index them at every level.

A mask is drawn on a coarse grid of cells. At a level with spatial size S, a cell covers S / grid voxels
per axis; where S is smaller than the grid, the level has cells of its own, one voxel each, made active by
the coarse rule. Packed features of a level are stored block by block in the row-major order of its
active cells, so one table (cell -> block) is the whole index of a level.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor

CoarseRule = Literal["any", "all", "majority", "every"]
Size = tuple[int, int, int]


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


@dataclass(frozen=True, eq=False)
class Level:
    """Index of one level: its grid of cells, the voxels per cell, and the tables of active cells.

    Attributes:
        cells: int32 `[B, gz, gy, gx]`, block of each cell, -1 where hidden.
        blocks: int32 `[n_blocks]`, flat index of each block's cell in `cells`.
        visible: bool `[B, gz, gy, gx]`.
        first_block: CPU int64 `[B + 1]`, first block of each sample, then the number of blocks.
        block: voxels per cell along (z, y, x).
    """

    cells: Tensor
    blocks: Tensor
    visible: Tensor
    first_block: Tensor
    block: Size
    _starts: dict[bool, Tensor] = field(default_factory=dict, repr=False)

    @property
    def n_blocks(self) -> int:
        """Active cells of the whole batch."""
        return self.blocks.shape[0]

    @property
    def grid(self) -> Size:
        """Cells per axis (z, y, x)."""
        _, z, y, x = self.cells.shape
        return z, y, x

    @property
    def block_voxels(self) -> int:
        """Voxels of one cell."""
        return self.block[0] * self.block[1] * self.block[2]

    def segment_starts(self, per_sample: bool) -> Tensor:
        """int64 first row of each segment (sample, or the whole batch), then the number of rows.

        Computed on the CPU and copied once to the mask's device, where the kernels read it.
        """
        starts = self._starts.get(per_sample)
        if starts is None:
            rows = self.first_block * self.block_voxels
            chosen = rows if per_sample else rows[[0, -1]].contiguous()
            starts = self._starts[per_sample] = chosen.to(self.cells.device)
        return starts

    def sample_of_block(self) -> Tensor:
        """int64 `[n_blocks]`: the sample to which each block belongs."""
        cells_per_sample = self.cells[0].numel()
        return torch.div(self.blocks, cells_per_sample, rounding_mode="floor").long()


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
        self.visible = visible
        self._host = visible.detach().cpu()
        self._levels: dict[tuple[Size, Size, CoarseRule], Level] = {}

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
        return self if moved is self.visible else BlockMask(moved)

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
        size = _three_axes(tuple(spatial))
        cells = _three_axes(self.grid)
        if len(spatial) != len(self.grid) or any(
            s < 1 or (s % g and g % s) for s, g in zip(size, cells, strict=True)
        ):
            raise ValueError(
                f"a level of size {tuple(spatial)} does not map onto the {self.grid} cells of the mask: "
                "each axis must hold a whole number of voxels per cell, or of cells per voxel "
                "(check padding, stride and crop size)"
            )
        grid = cast("Size", tuple(map(min, size, cells)))
        block = cast("Size", tuple(s // g for s, g in zip(size, grid, strict=True)))
        key = (grid, block, rule)
        if key not in self._levels:
            self._levels[key] = self._build(grid, block, rule)
        return self._levels[key]

    def _build(self, grid: Size, block: Size, rule: CoarseRule) -> Level:
        for (known_grid, _, known_rule), level in self._levels.items():
            if known_grid == grid and known_rule == rule:
                return Level(level.cells, level.blocks, level.visible, level.first_block, block)
        visible = _coarsen(self._host.view(-1, *_three_axes(self.grid)), grid, rule)
        blocks = visible.flatten().nonzero().flatten().to(torch.int32)
        cells = torch.full((visible.numel(),), -1, dtype=torch.int32)
        cells[blocks.long()] = torch.arange(blocks.numel(), dtype=torch.int32)
        counts = visible.flatten(1).sum(1)
        first_block = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return Level(
            cells.view(visible.shape).to(self.device),
            blocks.to(self.device),
            visible.to(self.device),
            first_block,
            block,
        )


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
    if rule == "majority":
        return shown * 2 > total
    raise ValueError(f"unknown coarse rule {rule!r}: use any, all, majority or every")
