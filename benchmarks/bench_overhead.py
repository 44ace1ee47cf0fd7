"""What a call costs beyond its kernel, in eager mode on one thread.

A masked volume of a few voxels goes through one function at a time. Overhead is the time of the call
minus the time of the bare work: the same kernel calls with their description and addresses ready, and
the same allocations; for elementwise functions, torch's own function on the packed features. Training
means that features and weights require a gradient. `dense` is the same function on the dense tensor,
kernel included.

    python benchmarks/bench_overhead.py --quick
    python benchmarks/bench_overhead.py --only conv3d norm
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import chosen, parser, print_table, save
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from medspark.sparse import BlockMask, BlockSparseTensor, launches
from medspark.sparse._ext import native
from medspark.sparse.tensor import BlockSparseTensor as Sparse

OPS = ["conv3d", "norm", "pool3d", "global_pool", "densify", "transfer", "resample3d"]
GOAL_US, SHAPE_GOAL_US = 10.0, 1.0
CALLS = 200


def functions(channels: int, training: bool) -> dict[str, Callable[[Tensor], Any]]:
    """What networks call, on `[1, channels, 4, 4, 4]`."""

    def parameter(*shape: int) -> Tensor:
        return torch.rand(shape).requires_grad_(training)

    weight, depthwise = parameter(channels, channels, 3, 3, 3), parameter(channels, 1, 3, 3, 3)
    scale, shift = parameter(channels), parameter(channels)
    mean, var = torch.zeros(channels), torch.ones(channels)
    return {
        "conv3d": lambda x: F.conv3d(x, weight, shift, 1, 1),
        "conv3d depthwise": lambda x: F.conv3d(x, depthwise, shift, 1, 1, groups=channels),
        "instance_norm": lambda x: F.instance_norm(x, None, None, scale, shift),
        "batch_norm": lambda x: F.batch_norm(x, mean, var, scale, shift, training=True),
        "group_norm": lambda x: F.group_norm(x, 2, scale, shift),
        "relu": F.relu,
        "relu in place": lambda x: F.relu(x, inplace=True),
        "add": lambda x: x + x,
        "max_pool3d": lambda x: F.max_pool3d(x, 2),
        "avg_pool3d": lambda x: F.avg_pool3d(x, 2),
        "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(x, 1),
        "interpolate": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    }


def microseconds(run: Callable[[], Any], rounds: int) -> list[float]:
    """Time per call of each of `rounds` batches of calls."""
    for _ in range(CALLS):
        run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(CALLS):
            run()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return times


def quartile_range(values: list[float]) -> float:
    """Interquartile range."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


class Recorder(TorchDispatchMode):
    """Notes the kernel calls and allocations of one function, to repeat them bare."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []
        self.buffers: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default):
            self.outputs.append(result)
        return result

    def __call__(self, kernel: str, core: Any, like: Tensor, *addresses: int) -> None:
        getattr(native(), kernel)(core, *addresses)
        own = [torch.zeros(1 << 18) if address else None for address in addresses]
        self.buffers += [buffer for buffer in own if buffer is not None]
        places = [0 if buffer is None else buffer.data_ptr() for buffer in own]
        self.calls.append((getattr(native(), kernel), (core, *places)))

    def record(self, run: Callable[[], Any]) -> None:
        modules = [importlib.import_module(f"medspark.sparse.ops.{name}") for name in OPS]
        before = [module.launch for module in modules]
        try:
            for module in modules:
                module.launch = self
            with self:
                run()
        finally:
            for module, launch in zip(modules, before, strict=True):
                module.launch = launch


def bare_run(function: Callable[[Tensor], Any], x: Sparse) -> Callable[[], Any]:
    """The work without any of ours around it."""
    function(x)  # once before: descriptions and tables are kept
    recorder = Recorder()
    recorder.record(lambda: function(x))
    if not recorder.calls:  # elementwise: torch's own function on packed features
        features = x.features
        return lambda: function(features)
    calls, outputs = recorder.calls, [(t, t.shape) for t in recorder.outputs]

    def run() -> Any:
        made = [tensor.new_empty(shape) for tensor, shape in outputs]
        for kernel, arguments in calls:
            kernel(*arguments)
        return made, recorder.buffers  # which stay where the kernels find them

    return run


def measure(name: str, training: bool, rounds: int) -> dict[str, Any]:
    """One row: medians in microseconds."""
    torch.manual_seed(0)
    channels = 4
    function = functions(channels, training)[name]
    dense = torch.randn(1, channels, 4, 4, 4)
    x = BlockSparseTensor.from_dense(dense, BlockMask.random(1, (2, 2, 2), 0.5))
    if training:
        x = x.with_features(x.features.clone().requires_grad_() * 1)
        dense = dense.clone().requires_grad_() * 1
    row: dict[str, Any] = {"function": name, "mode": "training" if training else "inference"}
    with torch.set_grad_enabled(training):
        with torch.no_grad():
            bare = bare_run(function, x.detach())
        runs = {"call": lambda: function(x), "bare": bare, "dense": lambda: function(dense)}
        times = {key: microseconds(run, rounds) for key, run in runs.items()}
    medians = {key: statistics.median(values) for key, values in times.items()}
    overhead = medians["call"] - medians["bare"]
    row |= {f"{key}_us": value for key, value in medians.items()}
    return row | {
        "overhead_us": overhead,
        "goal_us": GOAL_US,
        "relative_spread": sum(quartile_range(times[key]) for key in ("call", "bare")) / overhead,
        "status": "ok" if overhead <= GOAL_US else "above the goal",
        "times_us": times,
    }


def measure_metadata(rounds: int) -> list[dict[str, Any]]:
    """`.shape` and its like."""
    x = BlockSparseTensor.from_dense(
        torch.randn(1, 4, 4, 4, 4), BlockMask.random(1, (2, 2, 2), 0.5)
    )
    rows = []
    for name, run in {"shape": lambda: x.shape, "ndim": lambda: x.ndim}.items():
        value = statistics.median(microseconds(run, rounds))
        status = "ok" if value <= SHAPE_GOAL_US else "above the goal"
        rows.append(
            {
                "function": f".{name}",
                "mode": "",
                "overhead_us": value,
                "goal_us": SHAPE_GOAL_US,
                "status": status,
            }
        )
    return rows


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=50, help="batches of 200 calls per function")
    args = options.parse_args()
    if args.quick:
        args.rounds = min(args.rounds, 8)
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    rows = [row for row in measure_metadata(args.rounds) if chosen(row["function"], args.only)]
    for name in functions(4, False):
        if chosen(name, args.only):
            rows += [measure(name, training, args.rounds) for training in (False, True)]
    if not any(key.endswith("_us") for row in rows for key in row):
        raise SystemExit(
            f"no function is called like {args.only}: {', '.join(functions(4, False))}"
        )
    assert launches(), "no native kernel ran"
    columns = ["function", "mode", "call_us", "bare_us", "overhead_us", "goal_us", "dense_us"]
    print_table(rows, [*columns, "status"])
    save(args, "overhead", rows, identity=("function", "mode"))


if __name__ == "__main__":
    main()
