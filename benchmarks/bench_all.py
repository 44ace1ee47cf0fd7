"""Every benchmark with quick settings, one table at the end: what `make bench` runs, about ten minutes.

Each script runs in a process of its own, as it would alone with --quick; a script that fails is a line of the
table and makes the exit code 1. Quick numbers are a look: records that claims rest on come from the
scripts themselves (each has a --help that explains its columns), on a machine that does nothing else.

    python benchmarks/bench_all.py                    all
    python benchmarks/bench_all.py --only conv3d encoder
    python benchmarks/bench_all.py --threads 1 --out FOLDER
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import chosen, print_table, read_record

HERE = Path(__file__).parent
SCRIPTS = ("conv3d", "norm_pool", "encoder", "overhead", "memory", "data")
TIMED = ("conv3d", "norm_pool", "encoder")  # take --threads
OURS = ("native", None)
LIMIT = 600  # seconds of one script
COLUMNS = [
    "bench", "what", "dtype", "pass", "threads", "median", "unit", "of roof", "vs dense", "ceiling",
    "goals", "status",
]  # fmt: skip


def line(bench: str, row: dict[str, Any]) -> dict[str, Any]:
    """One row of any benchmark in the common columns."""
    names = ("workload", "function", "encoder", "network", "pipeline", "volume", "mode", "cache")
    if "size" in row and bench in ("norm_pool", "encoder"):
        names = (*names, "size")
    parts = [str(row[name]) for name in names if row.get(name) not in (None, "")]
    if row.get("hidden") is not None:
        parts.append(f"{row['hidden']:.0%} hidden")
    if row.get("visible") is not None:
        parts.append(f"{row['visible']:.0%} visible")
    common = {
        "bench": bench, "what": " ".join(parts), "dtype": row.get("dtype"), "pass": row.get("pass"),
        "threads": row.get("threads"), "of roof": row.get("roof_share", row.get("peak_share")),
        "vs dense": row.get("vs_dense"), "ceiling": row.get("ceiling"), "goals": goals(row),
        "status": row["status"] if row["status"] != "error" else f"error: {row.get('reason')}",
    }  # fmt: skip
    units = {
        "median_ms": "ms",
        "overhead_us": "us overhead",
        "activations_mb": "MB",
        "per_core": "1/s",
    }
    for name, unit in units.items():
        if row.get(name) is not None:
            return common | {"median": row[name], "unit": unit}
    return common


def goals(row: dict[str, Any]) -> str | None:
    """What a row misses, in a few words."""
    if "short" in row:
        return str(row["short"])
    if "met" in row:
        return "met" if row["met"] else f"{row['ratio_activations']:.2f} of dense > {row['goal']}"
    if row.get("goal_us") is not None:
        return "met" if row["status"] == "ok" else f"> {row['goal_us']} us"
    if row.get("goal") is not None and "per_core" in row:
        return "met" if row["per_core"] >= row["goal"] else f"< {row['goal']:.0f}"
    return None


def run(bench: str, folder: Path, threads: list[str]) -> tuple[list[dict[str, Any]], list[Path]]:
    """Lines of one script, and the records that it wrote; what it prints goes to the error output."""
    command = [sys.executable, str(HERE / f"bench_{bench}.py"), "--quick", "--out", str(folder)]
    if threads and bench in TIMED:
        command += ["--threads", *threads]
    before, start = set(folder.glob("*.json")), time.perf_counter()
    failed = ""
    try:
        done = subprocess.run(command, stdout=sys.stderr, timeout=LIMIT)
        failed = f"exit code {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        failed = f"more than {LIMIT} s"
    written = sorted(set(folder.glob("*.json")) - before)
    rows = []
    for path in written:
        record = read_record(path)
        rows += [line(bench, r) for r in record["rows"] if wanted(r)]
        rows += [line("memory", r) for r in record.get("memory", []) if wanted(r)]
    if failed:
        rows.append({"bench": bench, "status": f"error: {failed}"})
    print(f"{bench}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return rows, written


def wanted(row: dict[str, Any]) -> bool:
    """Rows of ours, and of no engine at all; descriptions of data and dense runs are left out."""
    about_data = "status" not in row
    return not about_data and row.get("engine") in OURS and row.get("visible") != 1.0


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--only", nargs="*", choices=SCRIPTS, help="some of them")
    add("--threads", nargs="*", default=[], help="threads, one run for each")
    add("--out", type=Path, help="folder that keeps the records (default: they are dropped)")
    args = options.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for bench in SCRIPTS:
            if chosen(bench, args.only):
                found, written = run(bench, folder, args.threads)
                rows += found
                if args.out:
                    print("\n".join(f"record: {path.name}" for path in written), file=sys.stderr)
    print_table(rows, COLUMNS)
    return 1 if any(str(row["status"]).startswith("error") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
