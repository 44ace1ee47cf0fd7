"""Sparse convolution against dense convolution times mask, forward and forward + backward.

Backends: `native` (our kernels on packed blocks), `dense` and `dense channels_last` (torch's conv3d on
the whole volume, then the mask), `reference` (the oracle of medspark.sparse). Every row carries the
relative error against float64, measured before timing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from harness import print_table, time_interleaved, write_record
from torch import Tensor

from medspark.sparse import BlockMask, BlockSparseTensor, reference, use_backend


@dataclass(frozen=True)
class Problem:
    """One convolution on a cubic volume, batch 1."""

    name: str
    size: int
    cell: int
    channels_in: int
    channels_out: int
    kernel: int = 3
    stride: int = 1


PROBLEMS = [
    Problem("W1", 96, 32, 32, 32),
    Problem("W2", 48, 16, 64, 64),
    Problem("W3", 24, 8, 128, 128),
    Problem("W4", 12, 4, 256, 256),
    Problem("W6 stride 2", 96, 32, 32, 64, stride=2),
    Problem("stem", 96, 32, 1, 64, kernel=7, stride=2),
]


class Case:
    """Inputs of a problem and one closure per backend."""

    def __init__(self, problem: Problem, hidden: float, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        p = problem
        self.stride, self.padding = p.stride, p.kernel // 2
        self.mask = BlockMask.random(1, (p.size // p.cell,) * 3, hidden, device=device)
        self.x = torch.randn(1, p.channels_in, *(p.size,) * 3, device=device).to(dtype)
        shape = (p.channels_out, p.channels_in, *(p.kernel,) * 3)
        self.weight = torch.randn(shape, device=device).to(dtype).requires_grad_()
        out = (p.size // p.stride,) * 3
        self.in_mask = reference.voxel_mask(self.mask.level((p.size,) * 3))
        self.out_mask = reference.voxel_mask(self.mask.level(out))

    def sparse(self, backward: bool) -> Callable[[], Tensor]:
        packed = BlockSparseTensor.from_dense(self.x, self.mask)
        features = packed.features.detach().requires_grad_(backward)

        def run() -> Tensor:
            y = F.conv3d(
                packed.with_features(features), self.weight, None, self.stride, self.padding
            )
            if backward:
                torch.autograd.grad(
                    y.features, (features, self.weight), torch.ones_like(y.features)
                )
            return y

        return run

    def dense(self, backward: bool, last: bool) -> Callable[[], Tensor]:
        layout = torch.channels_last_3d if last else torch.contiguous_format
        x = torch.where(self.in_mask, self.x, 0).contiguous(memory_format=layout)
        x.requires_grad_(backward)
        weight = self.weight.detach().contiguous(memory_format=layout).requires_grad_()

        def run() -> Tensor:
            y = F.conv3d(x, weight, None, self.stride, self.padding) * self.out_mask
            if backward:
                torch.autograd.grad(y, (x, weight), torch.ones_like(y))
            return y

        return run

    def exact(self) -> Tensor:
        args = (None, (self.stride,) * 3, (self.padding,) * 3, (1, 1, 1), 1)
        x, weight = self.x.double(), self.weight.detach().double()
        return reference.conv3d(x, self.in_mask, self.out_mask, weight, *args)


def on_reference(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same call on the reference backend."""

    def call() -> Tensor:
        with use_backend("reference"):
            return run()

    return call


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Rows of all backends for one case: forward, then forward + backward."""
    rows = []
    exact = case.exact()
    for backward in (False, True):
        runs = {
            "native": case.sparse(backward),
            "reference": on_reference(case.sparse(backward)),
            "dense": case.dense(backward, last=False),
            "dense channels_last": case.dense(backward, last=True),
        }
        results = time_interleaved(runs, rounds)
        times = [
            r["median_ms"] for n, r in results.items() if n.startswith("dense") and "median_ms" in r
        ]
        for name, row in results.items():
            row.update(backend=name, passes="fwd+bwd" if backward else "fwd")
            if row["status"] == "ok":
                row["speed_up"] = min(times) / row["median_ms"] if times else None
            if row["status"] == "ok" and not backward:
                y = runs[name]()  # leaving the sparse world is not part of the timed op
                y = y.to_dense() if isinstance(y, BlockSparseTensor) else y
                error = (y.detach().double() - exact).norm() / exact.norm()
                row["error"] = error.item()
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--problems", nargs="*", default=None, help="names, e.g. W1 stem; default: all"
    )
    parser.add_argument("--hidden", type=float, nargs="*", default=[0.6, 0.75], help="mask ratios")
    parser.add_argument(
        "--dtypes", nargs="*", default=["float32"], help="float32, bfloat16, float64"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per backend")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    rows = []
    for problem in PROBLEMS:
        if args.problems and problem.name not in args.problems:
            continue
        for hidden in args.hidden:
            for dtype in args.dtypes:
                case = Case(problem, hidden, getattr(torch, dtype), args.device)
                head = {**asdict(problem), "hidden": hidden, "dtype": dtype}
                rows += [{**head, **row} for row in measure(case, args.rounds)]
    print_table(
        rows,
        [
            "name",
            "hidden",
            "dtype",
            "passes",
            "backend",
            "status",
            "median_ms",
            "speed_up",
            "error",
        ],
    )
    print("speed_up: against the faster dense layout, which computes the whole volume")
    print(f"record: benchmarks/results/{write_record('conv3d', rows).name}")


if __name__ == "__main__":
    main()
