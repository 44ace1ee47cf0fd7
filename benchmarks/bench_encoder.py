"""Whole encoders on masked volumes: forward, a training step, and its peak memory, against dense.

`resnet50` is MONAI's 3D ResNet-50 and `resenc` nnU-Net's ResEnc-L, as medspark pre-trains them (cells of 32
voxels, their total stride), unmodified: the same module gets a BlockSparseTensor (`native`) or the whole
volume with hidden voxels at 0 (`dense`, `dense channels_last`). `dense masked` also multiplies every
convolution's output by the mask, as SparK does; the other two compute something else at hidden voxels, but
are the fastest that a dense library can be, and `vs_dense` is the ratio to the faster of them. A step is
forward and backward with a gradient of ones on every output.

    ceiling   FLOPs of all convolutions on the whole volume / those between active voxels (backward: twice the
              forward's, but the first layer's input needs none); the goal of a step is vs_dense >= ceiling
    share     useful FLOPs per second over the FMA peak measured between the rounds
    memory    peak of activations of a step in a fresh process over that of dense (see bench_memory.py);
              goals 0.45 at 60 % hidden, 0.30 at 75 %

    python benchmarks/bench_encoder.py --quick                         ResNet-50, 96^3, 60 %
    python benchmarks/bench_encoder.py --only resenc --sizes 96 --no-memory
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import bench_memory
import torch
from harness import (
    add_timing_options,
    chosen,
    counted,
    keep_memory,
    parser,
    print_table,
    save,
    show_errors,
    time_interleaved,
)
from roof import Roof, count_pairs, show_roofs, three
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from medspark.models.encoders import create_encoder
from medspark.sparse import BlockMask, BlockSparseTensor, reference

ENCODERS = ("resnet50", "resenc")
CELL = 32
CHECKED = 96  # largest volume that is also computed by the oracle
MEMORY_GOALS = {0.4: 0.45, 0.25: 0.30}
IDENTITY = ("encoder", "size", "hidden", "dtype", "pass", "engine", "threads")
COLUMNS = {
    "encoder": "encoder", "size": "size", "hidden": "hidden", "dtype": "dtype", "pass": "pass",
    "threads": "threads", "engine": "engine", "median_ms": "ms", "iqr_ms": "iqr", "gflops": "gflops",
    "peak_share": "share", "ceiling": "ceiling", "vs_dense": "vs_dense", "error": "error", "short": "short",
}  # fmt: skip
ENGINES = ("native", "dense", "dense channels_last", "dense masked")


def outputs_of(result: Any) -> list[Tensor]:
    """Every tensor that an encoder returned, packed where it is sparse."""
    leaves = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    return [t.features if isinstance(t, BlockSparseTensor) else t for t in leaves]


class Case:
    """An encoder, a volume and its mask."""

    def __init__(self, encoder: str, size: int, hidden: float, dtype: str, device: str) -> None:
        self.encoder, self.size, self.hidden, self.dtype = encoder, size, hidden, dtype
        torch.manual_seed(0)
        self.net = create_encoder(encoder).to(device, getattr(torch, dtype))
        # Weights in channels_last for the engines that want them so.
        self.net_last = copy.deepcopy(self.net).to(memory_format=torch.channels_last_3d)
        draw = torch.Generator().manual_seed(0)
        self.mask = BlockMask.random(1, (size // CELL,) * 3, hidden, draw).to(device)
        x = torch.randn(1, 1, size, size, size, generator=draw).to(device, getattr(torch, dtype))
        self.x = torch.where(reference.voxel_mask(self.mask.level((size,) * 3)), x, 0)

    def _masked(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        shown = reference.voxel_mask(self.mask.level(tuple(output.shape[2:])))
        return output * shown

    def closure(self, engine: str, which: str) -> Callable[[], Any]:
        """What is timed."""
        last = engine in ("dense channels_last", "dense masked")
        layout = torch.channels_last_3d if last else torch.contiguous_format
        x, net = self.x.contiguous(memory_format=layout), self.net_last if last else self.net

        def call() -> list[Tensor]:
            if engine == "native":
                return outputs_of(net(BlockSparseTensor.from_dense(x, self.mask)))
            return outputs_of(net(x))

        def step() -> None:
            outputs = call()
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
            net.zero_grad(set_to_none=True)

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return call()

        def run() -> Any:
            convs = [m for m in net.modules() if isinstance(m, nn.Conv3d)]
            masked = convs if engine == "dense masked" else []
            hooks = [m.register_forward_hook(self._masked) for m in masked]
            try:
                return step() if which == "step" else forward()
            finally:
                for hook in hooks:
                    hook.remove()

        return run

    def flops(self) -> dict[str, float]:
        """Useful and dense FLOPs of a forward pass and of a step."""
        found: list[tuple[float, float]] = []

        def count(module: nn.Conv3d, inputs: Any, output: Any) -> None:
            coarse, taps = output.level, module.weight[0, 0].numel()
            pairs = count_pairs(
                inputs[0].level, coarse, module.kernel_size, module.stride, three(module.padding)
            )
            multiply = 2.0 * module.in_channels * module.out_channels / module.groups
            volume = output.shape[0] * output.shape[2:].numel()
            found.append((multiply * pairs, multiply * taps * volume))

        convs = [m for m in self.net.modules() if isinstance(m, nn.Conv3d)]
        hooks = [m.register_forward_hook(count) for m in convs]
        try:
            with torch.no_grad():
                self.net(BlockSparseTensor.from_dense(self.x, self.mask))
        finally:
            for hook in hooks:
                hook.remove()
        useful, dense = (sum(column) for column in zip(*found, strict=True))
        first = found[0]  # its input gets no gradient
        return {
            "forward": useful, "dense forward": dense,
            "step": 3 * useful - first[0], "dense step": 3 * dense - first[1],
        }  # fmt: skip

    def error(self) -> float:
        """Native against the oracle, both in the encoder's own type (float64 would take minutes)."""
        from medspark.sparse import use_backend

        found = self.closure("native", "forward")()[-1]
        with use_backend("reference"):
            exact = self.closure("native", "forward")()[-1].double()
        return ((found.double() - exact).norm() / exact.norm()).item()


def measure(case: Case, which: str, args: Any, roof: Roof) -> list[dict[str, Any]]:
    """One row for each engine."""
    work = case.flops()
    rows: dict[str, dict[str, Any]] = {name: {} for name in args.engines}
    runs = {name: case.closure(name, which) for name in args.engines}
    start = len(roof.bandwidth)
    timed = time_interleaved(runs, args.rounds, 1, 0.0, args.retakes, between=roof.sample)
    peak = roof.since(start).peak(case.dtype)
    for name, row in timed.items():
        rows[name] |= row
        if row["status"] == "ok":
            rows[name] |= {
                "flops": work[which], "dense_flops": work[f"dense {which}"],
                "ceiling": work[f"dense {which}"] / work[which],
                "gflops": work[which] / row["median_ms"] / 1e6,
                "peak_share": work[which] / row["median_ms"] * 1e3 / peak,
            }  # fmt: skip
    if rows.get("native", {}).get("status") == "ok":
        _, launched = counted(runs["native"])
        rows["native"]["launches"] = launched
        if not any(name.startswith("conv") for name in launched):
            rows["native"] = {"status": "error", "reason": "no native convolution was launched"}
    return finish(case, which, rows)


def finish(case: Case, which: str, rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds what was measured, the ratio to dense, the error and the goal."""
    names = ("dense", "dense channels_last")
    dense = [rows[n]["median_ms"] for n in names if "median_ms" in rows.get(n, {})]
    found = []
    for engine, row in rows.items():
        row = {
            "encoder": case.encoder, "size": case.size, "cell": CELL, "hidden": case.hidden,
            "dtype": case.dtype, "pass": which, "engine": engine,
            "threads": torch.get_num_threads(), **row,
        }  # fmt: skip
        if row["status"] == "ok" and dense:
            row["vs_dense"] = min(dense) / row["median_ms"]
        if row["status"] == "ok" and engine == "native":
            row["error"] = case.error() if case.size <= CHECKED else None
            row["goals"] = {"vs_dense": row["ceiling"]}
            ratio = row.get("vs_dense")
            if ratio is not None:
                met = ratio >= row["ceiling"]
                row["short"] = "met" if met else f"vs_dense {ratio:.2f} < {row['ceiling']:.2f}"
        found.append(row)
    return found


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    add_timing_options(options, rounds=5)
    add = options.add_argument
    add("--sizes", type=int, nargs="*", default=[96, 128], help="voxels per axis")
    add("--hidden", type=float, nargs="*", default=[0.6, 0.75], help="mask ratios")
    add("--dtypes", nargs="*", default=["float32"], help="of weights and volume")
    add("--passes", nargs="*", choices=("forward", "step"), default=["forward", "step"])
    add("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    add("--no-memory", action="store_true", help="leave peak memory out")
    args = options.parse_args()
    if args.quick:
        args.rounds, args.retakes, args.sizes, args.hidden = min(args.rounds, 2), 0, [96], [0.6]
        args.only, args.passes = args.only or ["resnet50"], ["step"]
        args.engines = [name for name in args.engines if name != "dense masked"]
    return args


def measure_memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of bench_memory, one dense and one for each mask ratio."""
    rows = []
    for encoder in ENCODERS:
        for size in args.sizes if chosen(encoder, args.only) else ():
            case = bench_memory.Case(f"encoder {encoder}", size, CELL, device=args.device)
            shares = [round(1 - hidden, 4) for hidden in args.hidden]
            rows += bench_memory.compare(case, shares, MEMORY_GOALS)
    return rows


def main() -> None:
    args = arguments()
    if not args.default_memory and args.device == "cpu":
        keep_memory()
    rows, roofs = [], []
    for threads in args.threads or [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        roof = Roof(args.device, threads)
        for encoder in ENCODERS:
            for size in args.sizes if chosen(encoder, args.only) else ():
                for hidden in args.hidden:
                    for dtype in args.dtypes:
                        case = Case(encoder, size, hidden, dtype, args.device)
                        for which in args.passes:
                            rows += measure(case, which, args, roof)
        if roof.bandwidth:
            roofs.append(roof.record())
    print_table(
        [{COLUMNS[k]: v for k, v in r.items() if k in COLUMNS} for r in rows if r["status"] == "ok"],
        list(COLUMNS.values()),
    )  # fmt: skip
    memory = [] if args.no_memory else measure_memory(args)
    if memory:
        print("\npeak memory of a step")
        bench_memory.show(memory)
    show_errors(rows)
    show_roofs(roofs)
    save(args, "encoder", rows, identity=IDENTITY, roof=roofs, memory=memory)


if __name__ == "__main__":
    main()
