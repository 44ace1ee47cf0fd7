"""The convolutions that are measured, their useful work, and their exact results.

A `Case` is a workload with a mask and a type: packed inputs in our order (block by block, channels last),
which every engine brings into its own layout, and the numbers that do not depend on the engine. Results
are checked against float64 at a sample of voxels (of taps, for the weight's gradient), computed from the
definition by look-up in the mask's tables; no kernel takes part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from roof import count_pairs, three
from torch import Tensor

from medspark.sparse import BlockMask, Level

PASSES = ("forward", "grad_input", "grad_weight", "backward")  # the last: both gradients
GOALS = {  # share of the roof: float32, bfloat16
    "3x3x3, blocks 32 to 8": {"float32": 0.85, "bfloat16": 0.80},
    "3x3x3, blocks 4": {"float32": 0.75, "bfloat16": 0.75},
    "3x3x3, blocks 2 and 1": {"float32": 0.60, "bfloat16": 0.60},
    "strided": {"float32": 0.75, "bfloat16": 0.75},
    "memory": {"float32": 0.75, "bfloat16": 0.75},
    "other": {},
}
_SAMPLED, _SAMPLED_TAPS = 256, 3


@dataclass(frozen=True)
class Workload:
    """One convolution; sizes are those of the input. A cell has `cell` voxels per axis there."""

    name: str
    size: int
    cell: int
    channels_in: int
    channels_out: int
    kernel: int | tuple[int, int, int] = 3
    stride: int = 1
    groups: int = 1
    transposed: bool = False
    batch: int = 1
    kind: str = "other"

    @property
    def out_size(self) -> int:
        """Voxels per axis of the output."""
        return self.size * self.stride if self.transposed else self.size // self.stride

    @property
    def padding(self) -> tuple[int, int, int]:
        """Zeros below each axis: half the kernel; none where windows do not overlap."""
        z, y, x = three(self.kernel)
        return (z - 1) // 2, (y - 1) // 2, (x - 1) // 2


def _fine(name: str, *sizes: int, **options: int) -> Workload:
    return Workload(name, *sizes, kind="3x3x3, blocks 32 to 8", **options)


WORKLOADS = [
    _fine("W1 32^3 C32", 96, 32, 32, 32),
    _fine("W2 16^3 C64", 48, 16, 64, 64),
    _fine("W3 8^3 C128", 24, 8, 128, 128),
    _fine("W5 8^3 C64", 32, 8, 64, 64),
    Workload("W4 4^3 C256", 12, 4, 256, 256, kind="3x3x3, blocks 4"),
    Workload("4^3 C320", 16, 4, 320, 320, kind="3x3x3, blocks 4"),
    Workload("2^3 C320", 12, 2, 320, 320, kind="3x3x3, blocks 2 and 1"),
    Workload("1^3 C512", 6, 1, 512, 512, kind="3x3x3, blocks 2 and 1", batch=2),
    Workload("W6 k3 s2", 96, 32, 32, 64, stride=2, kind="strided"),
    Workload("k3 s2 C128", 24, 8, 128, 256, stride=2, kind="strided"),
    Workload("k2 s2 C64", 48, 16, 64, 128, kernel=2, stride=2, kind="strided"),
    Workload(
        "transposed k2 s2", 24, 8, 128, 64, kernel=2, stride=2, transposed=True, kind="strided"
    ),
    Workload("k1 C64 to 256", 48, 16, 64, 256, kernel=1, kind="memory"),
    Workload("k1 C256 to 64", 48, 16, 256, 64, kernel=1, kind="memory"),
    Workload("stem k7 s2", 96, 32, 1, 64, kernel=7, stride=2, kind="memory"),
    Workload("stem k3", 96, 32, 1, 32, kind="memory"),
    Workload("depthwise k3", 96, 32, 32, 32, groups=32, kind="memory"),
    Workload("depthwise k7", 48, 16, 64, 64, kernel=7, groups=64, kind="memory"),
    Workload("k5 C32", 48, 16, 32, 32, kernel=5),
    Workload("k1x3x3 C64", 48, 16, 64, 64, kernel=(1, 3, 3)),
    Workload("groups 4 C128", 24, 8, 128, 128, groups=4),
]
QUICK = ("W2", "W3", "W4", "2^3 C320", "k3 s2 C128", "k1 C64 to 256", "stem k3", "depthwise k3")


class Case:
    """A workload with its mask, packed inputs and exact results.

    Attributes:
        mask: visible cells.
        in_level: level of the input; `out_level` of the output.
        x: `[rows, C_in]`, `dy`: `[rows, C_out]`, packed; `weight` as torch keeps it.
        pairs: of active input and active output; `flops` of one pass over them, `dense_flops` of the
            whole volume, border taps included; `moved` the bytes of input, output and weight.
    """

    def __init__(
        self, work: Workload, hidden: float, dtype: torch.dtype, device: str = "cpu", seed: int = 0
    ) -> None:
        self.work, self.hidden, self.dtype, self.device = work, hidden, dtype, device
        draw = torch.Generator().manual_seed(seed)
        grid = (work.size // work.cell,) * 3
        self.mask = BlockMask.random(work.batch, grid, hidden, draw).to(device)
        self.in_level = self.mask.level((work.size,) * 3)
        self.out_level = self.mask.level((work.out_size,) * 3)
        first, second = work.channels_in, work.channels_out
        shape = (second, first // work.groups, *three(work.kernel))
        if work.transposed:
            shape = (first, second // work.groups, *three(work.kernel))

        def numbers(*size: int) -> Tensor:
            return torch.randn(*size, generator=draw).to(device, dtype)

        self.x = numbers(row_count(self.in_level), first)
        self.dy = numbers(row_count(self.out_level), second)
        self.weight = numbers(*shape) * (self.taps * first // work.groups) ** -0.5
        self._count()

    def _count(self) -> None:
        work, fine, coarse = self.work, self.in_level, self.out_level
        if work.transposed:
            fine, coarse = coarse, fine
        self.fine, self.coarse = fine, coarse
        self.pairs = count_pairs(fine, coarse, work.kernel, work.stride, work.padding)
        multiply = 2 * work.channels_in * work.channels_out // work.groups
        voxels = coarse.grid[0] * coarse.grid[1] * coarse.grid[2] * coarse.block_voxels
        self.flops = float(multiply * self.pairs)
        self.dense_flops = float(multiply * self.taps * voxels * work.batch)
        self.moved = float(self.x.nbytes + self.dy.nbytes + self.weight.nbytes)

    @property
    def taps(self) -> int:
        """Of the kernel."""
        z, y, x = three(self.work.kernel)
        return z * y * x

    def useful(self, which: str) -> tuple[float, float, float]:
        """Useful operations, those of the whole volume, and bytes that must move, of one pass."""
        if which == "backward":
            moved = 2 * self.moved - self.dy.nbytes  # dy is read once
            return 2 * self.flops, 2 * self.dense_flops, moved
        return self.flops, self.dense_flops, self.moved

    @property
    def window(self) -> tuple[tuple[int, int, int], ...]:
        """Kernel, stride and padding per axis."""
        return three(self.work.kernel), three(self.work.stride), self.work.padding

    def error(self, which: str, result: Tensor, seed: int = 0) -> float:
        """Relative error (2-norm) of a result against float64, on a sample.

        Args:
            which: of `PASSES`.
            result: packed rows, or the weight's gradient as torch keeps it.
            seed: of the sample.
        """
        draw = torch.Generator().manual_seed(seed)
        x, dy = self.x, self.dy
        if self.work.transposed:  # the adjoint of a convolution from the output to the input
            x, dy = dy, x
        if which == "grad_weight":
            taps = torch.randperm(self.taps, generator=draw)[:_SAMPLED_TAPS]
            exact = exact_grad_weight(self, x, dy, taps)
            found = result.flatten(2)[:, :, taps.to(result.device)]
        else:
            forward = (which == "forward") != self.work.transposed
            level = self.coarse if forward else self.fine
            rows = torch.randperm(row_count(level), generator=draw)[:_SAMPLED].to(self.device)
            exact = exact_rows(self, x if forward else dy, rows, forward)
            found = result[rows]
        difference = (found.double() - exact).norm()
        return (difference / exact.norm().clamp_min(1e-300)).item()


def row_count(level: Level) -> int:
    """Active voxels of a level."""
    return level.n_blocks * level.block_voxels


def places(level: Level, rows: Tensor) -> Tensor:
    """`[n, 4]` (sample, z, y, x) of packed rows."""
    block, inside = rows // level.block_voxels, rows % level.block_voxels
    cell = torch.stack(torch.unravel_index(level.blocks.long()[block], level.cells.shape), 1)
    offset = torch.stack(torch.unravel_index(inside, (1, *level.block)), 1)
    return cell * cell.new_tensor([1, *level.block]) + offset


def rows_at(level: Level, sample: Tensor, place: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Packed rows of voxels `[n, 3]`, and which of them exist: inside the volume and active."""
    block = place.new_tensor(level.block)
    size = place.new_tensor(level.grid) * block
    valid = valid & ((place >= 0) & (place < size)).all(1)
    place = torch.where(valid[:, None], place, 0)
    cell = place.div(block, rounding_mode="floor")
    row = level.cells[(sample, *cell.unbind(1))].long()
    for axis in range(3):
        row = row * level.block[axis] + (place[:, axis] % level.block[axis])
    return torch.where(valid & (row >= 0), row, 0), valid & (row >= 0)


def meet(case: Case, rows: Tensor, tap: int, forward: bool) -> tuple[Tensor, Tensor]:
    """The rows of the other level that `rows` meet through one tap, and whether they are there."""
    mine, other = (case.coarse, case.fine) if forward else (case.fine, case.coarse)
    here = places(mine, rows)
    _, stride, padding = (here.new_tensor(n) for n in case.window)
    offset = torch.stack(torch.unravel_index(here.new_tensor(tap), case.window[0])) - padding
    if forward:
        there = here[:, 1:] * stride + offset
        return rows_at(other, here[:, 0], there, there.new_ones(len(there), dtype=torch.bool))
    there = here[:, 1:] - offset
    whole = (there % stride == 0).all(1)
    return rows_at(other, here[:, 0], there.div(stride, rounding_mode="floor"), whole)


def exact_rows(case: Case, source: Tensor, rows: Tensor, forward: bool) -> Tensor:
    """float64 rows of the convolution of `source`, or of its adjoint, by definition."""
    groups, weight = case.work.groups, case.weight.double().flatten(2)
    weight = weight.unflatten(0, (groups, -1))  # [g, out, in, taps] of the convolution
    equation = "ngi,goi->ngo" if forward else "ngo,goi->ngi"
    total: Tensor | float = 0.0
    for tap in range(case.taps):
        index, there = meet(case, rows, tap, forward)
        read = torch.where(there[:, None], source[index].double(), 0).unflatten(1, (groups, -1))
        total = total + torch.einsum(equation, read, weight[..., tap])
    assert isinstance(total, Tensor)
    return total.flatten(1)


def exact_grad_weight(case: Case, x: Tensor, dy: Tensor, taps: Tensor) -> Tensor:
    """float64 `[C_out, C_in / groups, taps]`: the weight's gradient at some taps."""
    groups, rows = case.work.groups, torch.arange(row_count(case.coarse), device=case.device)
    parts = []
    for tap in taps.tolist():
        index, there = meet(case, rows, tap, forward=True)
        read = torch.where(there[:, None], x[index], 0).double().unflatten(1, (groups, -1))
        grad = dy.double().unflatten(1, (groups, -1))
        parts.append(torch.einsum("ngo,ngi->goi", grad, read).flatten(0, 1))
    return torch.stack(parts, dim=2)
