"""What the machine can do at best, and how much of an operation is useful.

The roof of an operation is the lower of two bounds: its useful floating-point operations at the measured
peak of the instruction set in use, and its compulsory bytes (each input read once, each output written
once) at the measured copy bandwidth. Both are measured in the same run, between the rounds, and so that
other work on the machine does not lower them: it can make a share too small, never too large. Useful are
multiply-adds of an active input with an active output: a tap that reads a hidden or outside voxel counts
for nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from harness import print_table
from torch import Tensor

from medspark.sparse import BlockMask, Level
from medspark.sparse._ext import native

COPY_BYTES = 256 * 2**20  # of a copy; more than the caches of present processors


def three(value: int | Sequence[int]) -> tuple[int, int, int]:
    """One number per axis (z, y, x)."""
    values = [value] * 3 if isinstance(value, int) else list(value)
    z, y, x = values
    return z, y, x


def _axis_pairs(fine: Level, coarse: Level, axis: int, window: tuple[int, int, int]) -> Tensor:
    """int64 `[fine cells, coarse cells]`: pairs (output voxel, tap) along one axis that join two cells."""
    kernel, stride, padding = window
    size = fine.grid[axis] * fine.block[axis]
    output = torch.arange(coarse.grid[axis] * coarse.block[axis])[:, None]
    source = output * stride - padding + torch.arange(kernel)
    inside = (source >= 0) & (source < size)
    pairs = torch.zeros(fine.grid[axis], coarse.grid[axis], dtype=torch.int64)
    cells = source.div(fine.block[axis], rounding_mode="floor")
    there = output.div(coarse.block[axis], rounding_mode="floor").expand_as(source)
    pairs.index_put_(
        (cells[inside], there[inside]), torch.ones((), dtype=torch.int64), accumulate=True
    )
    return pairs


def count_pairs(
    fine: Level,
    coarse: Level,
    kernel: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | None = None,
) -> int:
    """Pairs (active output voxel, active input voxel) of a convolution from one level to another.

    Separable per pair of cells, so that the cost depends on the number of cells alone.

    Args:
        fine: level that the convolution reads (a transposed one writes it).
        coarse: level that it writes.
        kernel: voxels per axis, one number or (z, y, x); like the next two.
        stride: of the window.
        padding: zeros below each axis; (kernel - 1) // 2 if None, which is half of an odd kernel.
    """
    sizes, steps = three(kernel), three(stride)
    pads = three(padding) if padding is not None else [(k - 1) // 2 for k in sizes]
    windows = list(zip(sizes, steps, pads, strict=True))
    reached = fine.visible.cpu().long()
    for axis, window in enumerate(windows):
        pairs = _axis_pairs(fine, coarse, axis, window)
        moved = reached.movedim(axis + 1, -1)
        # CPU matmul of int64 is exact.
        reached = (moved.reshape(-1, moved.shape[-1]) @ pairs).view(*moved.shape[:-1], -1)
        reached = reached.movedim(-1, axis + 1)
    return int((reached * coarse.visible.cpu()).sum())


def present_pairs(
    mask: BlockMask,
    level: tuple[int, ...],
    kernel: int | Sequence[int],
    stride: int | Sequence[int] = 1,
) -> int:
    """Pairs (active output, active input) of a padded convolution of a masked volume.

    Args:
        mask: visible cells.
        level: voxels per axis of the input.
        kernel: voxels per axis; padded by half of it.
        stride: of the window; must divide the size of the level.
    """
    out = tuple(n // s for n, s in zip(level, three(stride), strict=True))
    return count_pairs(mask.level(level), mask.level(out), kernel, stride)


@dataclass
class Roof:
    """Peaks of one device and number of threads; `sample` measures them once more."""

    device: str = "cpu"
    threads: int = 1
    seconds: float = 0.02
    flops: dict[str, list[float]] = field(default_factory=dict)
    bandwidth: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._memory: list[Tensor] = []

    def since(self, start: int) -> Roof:
        """The samples from number `start` on: the machine as it was then."""
        part = Roof(self.device, self.threads, self.seconds)
        part.flops = {dtype: rates[start:] for dtype, rates in self.flops.items()}
        part.bandwidth = self.bandwidth[start:]
        return part

    def sample(self) -> None:
        """One sample of each peak: operations per second, and bytes read and written per second."""
        for dtype in ("float32", "bfloat16"):
            measure = self._flops if self.device == "cpu" else self._cuda_flops
            self.flops.setdefault(dtype, []).append(measure(dtype))
        streams = (True, False) if self.device == "cpu" else (True,)
        self.bandwidth.append(max(self._copy(streaming) for streaming in streams))

    def _flops(self, dtype: str) -> float:
        rate: float = native().peak_flops(dtype, self.threads, self.seconds)
        return rate

    def _cuda_flops(self, dtype: str) -> float:
        """Of a large matrix product: the vendor's library is the best that is known."""
        n = 8192
        a = torch.ones(n, n, device=self.device, dtype=getattr(torch, dtype))
        a @ a
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        torch.cuda.synchronize()
        return 2.0 * n**3 / (time.perf_counter() - start)

    def _copy(self, streaming: bool) -> float:
        if not self._memory:
            # ones, not zeros: untouched memory is all one page
            self._memory = [
                torch.ones(COPY_BYTES, dtype=torch.uint8, device=self.device) for _ in range(2)
            ]
        source, target = self._memory
        if self.device == "cpu":
            addresses = source.data_ptr(), target.data_ptr()
            start = time.perf_counter()
            native().stream_copy(*addresses, COPY_BYTES, streaming, self.threads)
        else:
            torch.cuda.synchronize()
            start = time.perf_counter()
            target.copy_(source)
            torch.cuda.synchronize()
        return 2.0 * COPY_BYTES / (time.perf_counter() - start)

    def peak(self, dtype: str) -> float:
        """Operations per second, median of the samples; float16 is computed as float32 on a CPU.

        On a CPU per second of processor time, so that other work on the machine does not lower it.
        """
        known = dtype if dtype in self.flops else "float32"
        return statistics.median(self.flops[known])

    def copy(self) -> float:
        """Bytes per second, the best of the samples: what disturbs a copy must not lower the roof."""
        return max(self.bandwidth)

    def bound_ms(self, dtype: str, flops: float, bytes_moved: float) -> float:
        """The least time that the roof allows."""
        return max(flops / self.peak(dtype), bytes_moved / self.copy()) * 1e3

    def bound_by(self, dtype: str, flops: float, bytes_moved: float) -> str:
        """Which of the two bounds it is: "compute" or "memory"."""
        return "compute" if flops / self.peak(dtype) > bytes_moved / self.copy() else "memory"

    def record(self) -> dict[str, Any]:
        """For the record: medians, best and all samples."""
        cpu = self.device == "cpu"
        return {
            "device": self.device,
            "threads": self.threads,
            "instruction": {d: native().peak_instruction(d) if cpu else "matmul" for d in self.flops},
            "gflops": {d: self.peak(d) / 1e9 for d in self.flops},
            "gflops_best": {d: max(v) / 1e9 for d, v in self.flops.items()},
            "copy_gbs": self.copy() / 1e9,
            "copy_gbs_median": statistics.median(self.bandwidth) / 1e9,
            "samples_gflops": {d: [x / 1e9 for x in v] for d, v in self.flops.items()},
            "samples_gbs": [x / 1e9 for x in self.bandwidth],
        }  # fmt: skip


def show_roofs(roofs: list[dict[str, Any]]) -> None:
    """A line for each number of threads."""
    rows = []
    for roof in roofs:
        row = {"threads": roof["threads"], "copy GB/s": roof["copy_gbs"]}
        for dtype, rate in roof["gflops"].items():
            row[f"{dtype} GFLOP/s"] = rate
            row[f"{dtype} by"] = roof["instruction"][dtype]
        rows.append(row)
    if rows:
        print("\nroof, measured between the rounds")
        print_table(rows, list(rows[0]))
