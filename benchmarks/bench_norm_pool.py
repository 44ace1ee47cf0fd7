"""Norms, pooling, densify and elementwise functions of masked volumes, against copy bandwidth.

None of these computes much: what counts is memory. The bytes of a row are those that it cannot avoid, each
tensor read or written once, and for norms in training one reading more (statistics come before the first
result; backward likewise reads x and dy twice). `share` is the time of those bytes at the copy bandwidth,
measured between the rounds of the same row, over the time taken; the goal is 0.75. `dense` is torch's
function on the whole volume (times the mask where hidden voxels would not stay 0), in both layouts; norms
then normalise by other statistics, so that only their time can be compared.

    error   of native, relative, against the oracle of medspark.sparse in float64

    python benchmarks/bench_norm_pool.py --quick
    python benchmarks/bench_norm_pool.py --only norm --dtypes float32 --threads 1 2
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from harness import (
    add_timing_options,
    cache_bytes,
    chosen,
    counted,
    keep_memory,
    parser,
    print_table,
    reason,
    save,
    show_errors,
    time_interleaved,
)
from roof import Roof, show_roofs
from torch import Tensor

from medspark.sparse import BlockMask, BlockSparseTensor, densify, reference, restrict, use_backend

GOAL = 0.75
IDENTITY = ("function", "size", "channels", "hidden", "dtype", "pass", "engine", "threads")
SIZES = [(96, 32, 32), (64, 8, 64)]  # volume, cell, channels
COLUMNS = {
    "function": "function", "size": "size", "channels": "C", "hidden": "hidden", "dtype": "dtype",
    "pass": "pass", "threads": "threads", "engine": "engine", "median_ms": "ms", "iqr_ms": "iqr",
    "gbs": "GB/s", "roof_share": "share", "vs_dense": "vs_dense", "error": "error", "short": "short",
}  # fmt: skip


@dataclass
class Parameters:
    """What functions need beside the volume."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    var: Tensor
    other: Any  # a second volume
    half: BlockMask  # half of the visible cells


@dataclass(frozen=True)
class Function:
    """A function of a volume, and the bytes it cannot avoid as multiples of those of input and output."""

    call: Callable[[Any, Parameters], Any]
    forward: tuple[int, int] = (1, 1)
    backward: tuple[int, int] | None = (1, 1)
    masked: bool = True  # whether the dense one needs the mask behind it
    dense: bool = True  # whether there is a dense one


FUNCTIONS: dict[str, Function] = {
    "batch_norm": Function(
        lambda x, p: F.batch_norm(x, p.mean, p.var, p.scale, p.shift, training=True), (2, 1), (3, 2)
    ),
    "instance_norm": Function(
        lambda x, p: F.instance_norm(x, None, None, p.scale, p.shift), (2, 1), (3, 2)
    ),
    "group_norm": Function(lambda x, p: F.group_norm(x, 8, p.scale, p.shift), (2, 1), (3, 2)),
    "max_pool3d k3 s2": Function(lambda x, p: F.max_pool3d(x, 3, 2, 1)),
    "avg_pool3d k2 s2": Function(lambda x, p: F.avg_pool3d(x, 2)),
    "global mean": Function(lambda x, p: F.adaptive_avg_pool3d(x, 1), masked=False),
    "relu": Function(lambda x, p: F.relu(x), backward=(2, 1), masked=False),
    # A slope near 1: repeated calls must not end in subnormal numbers.
    "leaky_relu in place": Function(
        lambda x, p: F.leaky_relu(x, 0.999, inplace=True), backward=None, masked=False
    ),
    "add": Function(lambda x, p: x + p.other, (2, 1), None, masked=False),
    "interpolate 2x nearest": Function(lambda x, p: F.interpolate(x, scale_factor=2.0)),
    "densify": Function(lambda x, p: densify(x, p.shift), backward=(2, 0), dense=False),
    "restrict": Function(lambda x, p: restrict(x, p.half), (0, 2), (1, 1), dense=False),
}
QUICK = ("batch_norm", "instance_norm", "max_pool", "relu", "add", "densify")


class Case:
    """A volume with its mask, sparse and dense."""

    def __init__(
        self, size: int, cell: int, channels: int, hidden: float, args: Any, dtype: str
    ) -> None:
        self.size, self.channels, self.hidden, self.dtype = size, channels, hidden, dtype
        kind, draw = getattr(torch, dtype), torch.Generator().manual_seed(0)
        self.mask = BlockMask.random(1, (size // cell,) * 3, hidden, draw).to(args.device)
        level = self.mask.level((size,) * 3)
        shape = (level.n_blocks, *level.block, channels)
        two = [torch.randn(shape, generator=draw).to(args.device, kind) for _ in range(2)]
        self.sparse = [BlockSparseTensor(t, self.mask, (size,) * 3) for t in two]
        self.shown = reference.voxel_mask(level)
        visible = self.mask.visible.flatten()
        kept = visible & (visible.cumsum(0) % 2 == 0)
        ones = torch.ones(channels, device=args.device, dtype=kind)
        running = torch.zeros(channels, device=args.device)
        self.parameters = Parameters(
            ones.clone(), ones * 0.1, running, running + 1, None, BlockMask(kept.view_as(self.mask.visible))
        )  # fmt: skip

    def inputs(self, engine: str) -> tuple[Tensor, Parameters]:
        """The volume and the parameters for one engine."""
        if engine == "native":
            first, second = self.sparse
        else:
            last = "channels_last" in engine
            layout = torch.channels_last_3d if last else torch.contiguous_format
            first, second = (t.to_dense().contiguous(memory_format=layout) for t in self.sparse)
        p = self.parameters
        # Running statistics of its own: a step of one engine must not touch the graph of another.
        return first, Parameters(p.scale, p.shift, p.mean.clone(), p.var.clone(), second, p.half)

    def closure(self, name: str, which: str, engine: str) -> Callable[[], Any]:
        """What is timed."""
        function = FUNCTIONS[name]
        x, parameters = self.inputs(engine)
        shown = None
        if engine != "native" and function.masked:
            shown = self.shown
            if name != "batch_norm" and self._output_size(name) != self.size:
                n = self._output_size(name)
                shown = reference.voxel_mask(self.mask.level((n, n, n)))

        def call(volume: Any) -> Tensor:
            y = function.call(volume, parameters)
            y = y if shown is None else y * shown
            return y.features if isinstance(y, BlockSparseTensor) else y

        if which == "forward":

            def forward() -> Tensor:
                with torch.no_grad():
                    return call(x)

            return forward
        leaf = (x.features if isinstance(x, BlockSparseTensor) else x).detach().requires_grad_()
        y = call(x.with_features(leaf) if isinstance(x, BlockSparseTensor) else leaf)
        draw = torch.Generator().manual_seed(1)
        dy = torch.empty_like(y).copy_(torch.randn(y.shape, generator=draw))  # laid out like y
        return lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0]

    def _output_size(self, name: str) -> int:
        return {"m": self.size // 2, "a": self.size // 2, "i": self.size * 2}[name[0]] if (
            "pool" in name or "interpolate" in name
        ) else self.size  # fmt: skip

    def exact(self, name: str, which: str) -> Tensor:
        """float64 result of the oracle, from the same numbers."""
        exact = Case.__new__(Case)
        exact.__dict__ |= self.__dict__
        exact.sparse = [t.with_features(t.features.double()) for t in self.sparse]
        p = self.parameters
        exact.parameters = Parameters(
            p.scale.double(), p.shift.double(), p.mean.double(), p.var.double(), None, p.half
        )
        with use_backend("reference"):
            result: Tensor = exact.closure(name, which, "native")()
        return result


def moved_bytes(case: Case, name: str, which: str) -> float:
    """Bytes that the pass cannot avoid."""
    function = FUNCTIONS[name]
    inputs, outputs = function.forward if which == "forward" else function.backward or (0, 0)
    x, parameters = case.inputs("native")
    with torch.no_grad():
        y = function.call(x.with_features(x.features.clone()), parameters)
    out = y.features if isinstance(y, BlockSparseTensor) else y
    return float(inputs * x.features.nbytes + outputs * out.nbytes)


def measure(case: Case, name: str, which: str, args: Any, roof: Roof) -> list[dict[str, Any]]:
    """One row for each engine."""
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], Any]] = {}
    engines = ["native", "dense", "dense channels_last"] if FUNCTIONS[name].dense else ["native"]
    for engine in engines:
        try:
            run = case.closure(name, which, engine)
            result, launched = counted(run)
            rows[engine] = {"launches": launched}
            if engine == "native" and "in place" not in name:
                exact = case.exact(name, which)
                difference = (result.double() - exact).norm() / exact.norm()
                rows[engine]["error"] = difference.item()
            runs[engine] = run
        except Exception as error:
            rows[engine] = {"status": "error", "reason": reason(error)}
    start, moved = len(roof.bandwidth), moved_bytes(case, name, which)
    timed = time_interleaved(
        runs, args.rounds, 1, args.sample_ms, args.retakes, between=roof.sample
    )
    local = roof.since(start)
    for engine, row in timed.items():
        rows[engine] |= row
        if row["status"] == "ok":
            ms = row["median_ms"]
            rows[engine] |= {
                "moved_bytes": moved,
                "gbs": moved / ms / 1e6,
                "copy_gbs": local.copy() / 1e9,
            }
            rows[engine] |= {
                "roof_share": moved / local.copy() * 1e3 / ms,
                "cached": moved <= cache_bytes(),
            }
    return finish(case, name, which, rows)


def finish(
    case: Case, name: str, which: str, rows: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Adds what was measured, the ratio to dense and the goal."""
    dense = [r["median_ms"] for e, r in rows.items() if e != "native" and "median_ms" in r]
    found = []
    for engine, row in rows.items():
        row = {
            "function": name, "size": case.size, "channels": case.channels, "hidden": case.hidden,
            "dtype": case.dtype, "pass": which, "engine": engine, "threads": torch.get_num_threads(), **row,
        }  # fmt: skip
        if row["status"] == "ok" and dense:
            row["vs_dense"] = min(dense) / row["median_ms"]
        if row["status"] == "ok" and engine == "native":
            share = row["roof_share"]
            row |= {
                "goals": {"roof_share": GOAL},
                "short": "met" if share >= GOAL else f"{share:.2f} < {GOAL}",
            }
        found.append(row)
    return found


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    add_timing_options(options)
    options.add_argument("--hidden", type=float, nargs="*", default=[0.6, 0.75], help="mask ratios")
    options.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    args = options.parse_args()
    if args.quick:
        args.rounds, args.sample_ms, args.retakes = min(args.rounds, 3), 20.0, 1
        args.only, args.hidden, args.dtypes = args.only or list(QUICK), [0.6], args.dtypes[:1]
    return args


def main() -> None:
    args = arguments()
    if not args.default_memory and args.device == "cpu":
        keep_memory()
    rows, roofs = [], []
    for threads in args.threads or [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        roof = Roof(args.device, threads)
        cases = [
            Case(*size, hidden, args, dtype)
            for size in SIZES[: 1 if args.quick else None]
            for hidden in args.hidden
            for dtype in args.dtypes
        ]
        for name, function in FUNCTIONS.items():
            passes = ["forward", "backward"] if function.backward else ["forward"]
            if chosen(name, args.only):
                rows += [r for c in cases for p in passes for r in measure(c, name, p, args, roof)]
        if roof.bandwidth:
            roofs.append(roof.record())
    print_table([{COLUMNS[k]: v for k, v in r.items() if k in COLUMNS}
                 for r in rows if r["status"] == "ok"],
                list(COLUMNS.values()))  # fmt: skip
    show_errors(rows)
    show_roofs(roofs)
    save(args, "norm_pool", rows, identity=IDENTITY, roof=roofs)


if __name__ == "__main__":
    main()
