"""Convolution of masked volumes: every engine, each pass by itself, against the roof and against dense.

What the columns say
  pass        forward; grad_input and grad_weight alone; backward is both (all that spconv, MinkowskiEngine
              and torchsparse offer)
  ms, iqr     median and interquartile range of the samples
  gflops      useful operations per second: multiply-adds of an active input with an active output, times 2
  share       of the roof: the lower of the FMA peak and of the copy bandwidth (inputs read once, outputs
              written once), measured between the rounds of the same row
  bound       which of the two it is. A working set that fits the caches ("cached" in the record) can pass
              a bound by memory
  ceiling     FLOPs of the dense convolution / useful FLOPs: what skipping alone can bring
  vs_dense    how much faster than the faster of the two dense layouts (dense x mask)
  vs_halo     ... than blocks with halo through oneDNN;  vs_peer ... than the fastest sparse library here
              (spconv, which is right on one thread only, counts when all run on one)
  error       relative, against float64, on a sample of voxels
  short       goals that a native row misses

Engines that cannot do a case leave a row with status "error" and the reason, listed below the table.
What an engine ran (version, layout, threads, remarks) is in the record, field "about".

    python benchmarks/bench_conv3d.py --quick                            a look, two minutes
    python benchmarks/bench_conv3d.py --only W1 W4 --passes forward      some workloads, one pass
    python benchmarks/bench_conv3d.py --threads 1 2 --dtypes float32 bfloat16        a full record
    python benchmarks/bench_conv3d.py --engines native spconv --threads 1
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from adapters import Engine, Unsupported, build, engines
from goals import THREADS, conv_goals, judge
from harness import (
    add_timing_options,
    cache_bytes,
    chosen,
    keep_memory,
    parser,
    print_table,
    reason,
    save,
    show_errors,
    time_interleaved,
)
from roof import Roof, show_roofs
from workloads import PASSES, QUICK, WORKLOADS, Case, Workload

IDENTITY = ("workload", "hidden", "dtype", "pass", "engine", "threads")
PEER_NAMES = ("spconv", "minkowski", "torchsparse")
COLUMNS = {
    "workload": "workload", "hidden": "hidden", "dtype": "dtype", "pass": "pass", "threads": "threads",
    "engine": "engine", "median_ms": "ms", "iqr_ms": "iqr", "gflops": "gflops",
    "roof_share": "share", "bound": "bound", "ceiling": "ceiling", "vs_dense": "vs_dense",
    "vs_halo": "vs_halo", "vs_peer": "vs_peer", "error": "error", "short": "short",
}  # fmt: skip


def measure(case: Case, which: str, ready: dict[str, Engine], args: Any, roof: Roof) -> list[Any]:
    """One row for each engine that is ready; the engines take turns."""
    rows, runs = {}, {}
    for name, engine in ready.items():
        try:
            run = engine.run(which)
            rows[name] = {"about": engine.about, **engine.check(which, run)}
            runs[name] = run
        except Exception as error:
            text = str(error) if isinstance(error, Unsupported) else reason(error)
            rows[name] = {"status": "error", "reason": text}
    start = len(roof.bandwidth)
    timed = time_interleaved(
        runs, args.rounds, 1, args.sample_ms, args.retakes, between=roof.sample
    )
    local = roof.since(start)
    for name, row in timed.items():
        rows[name] |= row
        if row["status"] == "ok":
            rows[name] |= rates(case, which, row["median_ms"], local)
    compare_engines(rows)
    return [head(case, which, name) | row for name, row in rows.items()]


def head(case: Case, which: str, engine: str) -> dict[str, Any]:
    """What was measured."""
    work = case.work
    dtype = str(case.dtype).removeprefix("torch.")
    kernel = work.kernel if isinstance(work.kernel, int) else "x".join(map(str, work.kernel))
    return {
        "workload": work.name, "kind": work.kind, "size": work.size, "cell": work.cell,
        "channels_in": work.channels_in, "channels_out": work.channels_out, "kernel": kernel,
        "stride": work.stride, "groups": work.groups, "batch": work.batch, "hidden": case.hidden,
        "dtype": dtype, "pass": which, "engine": engine, "threads": torch.get_num_threads(),
    }  # fmt: skip


def rates(case: Case, which: str, ms: float, roof: Roof) -> dict[str, Any]:
    """A time against the roof."""
    flops, dense, moved = case.useful(which)
    dtype = str(case.dtype).removeprefix("torch.")
    return {
        "flops": flops, "dense_flops": dense, "moved_bytes": moved, "gflops": flops / ms / 1e6,
        "roof_ms": roof.bound_ms(dtype, flops, moved), "bound": roof.bound_by(dtype, flops, moved),
        "roof_share": roof.bound_ms(dtype, flops, moved) / ms, "ceiling": dense / max(flops, 1.0),
        "cached": moved <= cache_bytes(), "peak_gflops": roof.peak(dtype) / 1e9,
        "copy_gbs": roof.copy() / 1e9,
    }  # fmt: skip


def compare_engines(rows: dict[str, dict[str, Any]]) -> None:
    """Ratios to the faster dense layout, to halo and to the fastest sparse library.

    An engine that was held to fewer threads is no measure for the others.
    """
    threads = torch.get_num_threads()
    times = {
        name: row["median_ms"]
        for name, row in rows.items()
        if "median_ms" in row and row["about"].get("threads", threads) == threads
    }
    groups = {"vs_dense": ("dense", "dense channels_last"), "vs_halo": ("halo",)}
    for column, names in {**groups, "vs_peer": PEER_NAMES}.items():
        best = min((times[name] for name in names if name in times), default=None)
        for row in rows.values():
            if best is not None and "median_ms" in row:
                row[column] = best / row["median_ms"]


def measure_case(work: Workload, hidden: float, dtype: str, args: Any, roof: Roof) -> list[Any]:
    """Rows of all engines and passes; an engine that refuses the case has its rows too."""
    case = Case(work, hidden, getattr(torch, dtype), args.device)
    ready, refused = build(args.engines, case)
    rows = []
    for which in args.passes:
        found = measure(case, which, ready, args, roof)
        found += [
            head(case, which, name) | {"status": "error", "reason": why}
            for name, why in refused.items()
        ]
        for row in found:
            if row["engine"] == "native" and row["status"] == "ok":
                judge(row, conv_goals(work, row))
        rows += found
        show([row for row in found if row["status"] == "ok"])
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print_table([{COLUMNS[k]: v for k, v in r.items() if k in COLUMNS} for r in rows],
                list(COLUMNS.values()))  # fmt: skip
    print(flush=True)


def thread_gains(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Native rows at the fewest and at the most threads: how much the others bring."""
    groups: dict[tuple[Any, ...], dict[int, float]] = {}
    for row in rows:
        if row["engine"] == "native" and row.get("bound") == "compute":
            key = tuple(row[name] for name in IDENTITY[:4])
            groups.setdefault(key, {})[row["threads"]] = row["median_ms"]
    found = []
    for key, times in groups.items():
        few, many = min(times), max(times)
        if few < many:
            gain = times[few] / times[many]
            entry = dict(zip(IDENTITY[:4], key, strict=True))
            entry |= {"threads": f"{few} to {many}", "gain": gain}
            goal = THREADS if (few, many) == (1, 2) else None
            found.append(entry | {"goal": goal, "met": None if goal is None else gain >= goal})
    return found


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    add_timing_options(options)
    add = options.add_argument
    add("--hidden", type=float, nargs="*", help="mask ratios (default 0.6 0.75; 3x3x3 also 0)")
    add("--dtypes", nargs="*", default=["float32", "bfloat16"])
    add("--passes", nargs="*", choices=PASSES, default=list(PASSES))
    add("--engines", nargs="*", choices=list(engines()), default=list(engines()))
    args = options.parse_args()
    if args.quick:
        args.rounds, args.sample_ms, args.retakes = min(args.rounds, 3), 20.0, 1
        args.engines = [e for e in args.engines if e not in ("reference", "numba")]
        if args.passes == list(PASSES):
            args.passes = list(PASSES[:3])
        args.only = args.only or list(QUICK)
        args.hidden = args.hidden or [0.6]
    return args


def main() -> None:
    args = arguments()
    if not args.default_memory and args.device == "cpu":
        keep_memory()
    rows, roofs = [], []
    for threads in args.threads or [torch.get_num_threads()]:
        torch.set_num_threads(threads)
        roof = Roof(args.device, threads)
        for work in WORKLOADS:
            if not chosen(work.name, args.only):
                continue
            unmasked = [0.0] if work.kind.startswith("3x3x3") else []
            for hidden in args.hidden or [0.6, 0.75, *unmasked]:
                for dtype in args.dtypes:
                    rows += measure_case(work, hidden, dtype, args, roof)
        if roof.bandwidth:
            roofs.append(roof.record())
    show_errors(rows)
    gains = thread_gains(rows)
    if gains:
        print_table(gains, list(gains[0]))
    show_roofs(roofs)
    save(args, "conv3d", rows, identity=IDENTITY, roof=roofs, thread_gains=gains)


if __name__ == "__main__":
    main()
