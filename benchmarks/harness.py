"""Timing, environment and records of the benchmarks.

Policy: backends run interleaved, round by round, after a warm-up; the record keeps every raw time, the
error against float64 and the backend that really ran. A backend that fails gets a row with status
"error", never a missing one. Ratios within one run are what counts; milliseconds move with the machine.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """What a reader needs to judge the numbers: no host names, no paths."""
    from medspark.sparse._ext import load_extension

    extension = load_extension()
    build = extension.build_info() if extension else {}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "schema": SCHEMA,
        "date": datetime.date.today().isoformat(),
        "device": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "medspark": build.get("version", "pure torch"),
        "commit": build.get("commit", "unknown"),
        "cpu_kernels": extension.cpu_kernels() if extension else None,
    }


def processor() -> str:
    """Model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def synchronize() -> None:
    """Waits for queued GPU work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_interleaved(
    runs: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1
) -> dict[str, dict[str, Any]]:
    """Wall times in ms of several callables, one call each per round."""
    rows: dict[str, dict[str, Any]] = {name: {"status": "ok", "times_ms": []} for name in runs}
    for index in range(warmup + rounds):
        for name, run in runs.items():
            if rows[name]["status"] != "ok":
                continue
            try:
                synchronize()
                start = time.perf_counter()
                run()
                synchronize()
            except (RuntimeError, NotImplementedError, TypeError) as error:
                rows[name] = {"status": "error", "reason": str(error).splitlines()[0]}
                continue
            if index >= warmup:
                rows[name]["times_ms"].append((time.perf_counter() - start) * 1e3)
    for row in rows.values():
        if row["status"] == "ok":
            row["median_ms"] = statistics.median(row["times_ms"])
    return rows


def write_record(name: str, rows: list[dict[str, Any]], folder: Path = RESULTS) -> Path:
    """Writes `<folder>/<name>-<device>-<date>-<commit>.json`, atomically."""
    env = environment()
    device = "".join(c if c.isalnum() else "-" for c in env["device"]).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}-{device}-{env['date']}-{env['commit']}.json"
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        json.dump({"environment": env, "rows": rows}, file, indent=1)
        file.write("\n")
    os.replace(temporary, target)
    return target


def print_table(rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Aligned text table of some columns."""
    cells = [columns] + [[_text(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        )


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
