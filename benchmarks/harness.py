"""Timing, environment and records of the benchmarks.

Policy: engines run interleaved, round by round, after a warm-up, with freed memory kept for reuse; every
sample is long enough for the clock, and one during which other processes took processor time is taken
again. The record keeps every raw time, the load of the machine, the engine that really ran and its error
against float64. An engine that fails gets a row with status "error", never a missing one. Ratios within
one run are what counts; milliseconds move with the machine. The schema is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Makes OpenBLAS forget the processor it runs on: MinkowskiEngine would compute at AVX2's rate.
_CORETYPE = os.environ.pop("OPENBLAS_CORETYPE", None)

import torch  # noqa: E402

SCHEMA = 2
RESULTS = Path(__file__).parent / "results"
LOAD_BEFORE = os.getloadavg()
OTHERS = 0.3  # cores taken by other processes above which a sample is taken again
_MEMORY = {"policy": "default"}


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
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "cache_bytes": cache_bytes(),
        "threads": torch.get_num_threads(),
        "load_before": [round(x, 2) for x in LOAD_BEFORE],
        "load_after": [round(x, 2) for x in os.getloadavg()],
        "memory": _MEMORY["policy"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "medspark": build.get("version", "pure torch"),
        "commit": build.get("commit", "unknown"),
        "cpu_kernels": extension.cpu_kernels() if extension else None,
        "cpu_features": extension.cpu_features() if extension else None,
    }


def processor() -> str:
    """Model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cache_bytes() -> int:
    """Size of the last cache before memory; 0 where the system does not tell."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(path.read_text().strip().rstrip("K")) * 1024)
    return max(sizes)


def keep_memory() -> bool:
    """Makes freed memory stay with the process, so that no call pays for touching it anew.

    By default glibc maps every block above 32 MiB afresh and gives it back when freed: each call of an
    operation with large outputs then faults all its pages in, which flatters operations with small ones.
    False where the C library is another one.
    """
    mmap_max, trim_threshold, arena_max = -4, -1, -8  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    done = [mallopt(mmap_max, 0), mallopt(trim_threshold, 2**31 - 1), mallopt(arena_max, 1)]
    if all(done):
        _MEMORY["policy"] = "kept"
    return all(done)


def synchronize() -> None:
    """Waits for queued GPU work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def nvtx(name: str) -> Iterator[None]:
    """A named range in a profile of the GPU; nothing without CUDA."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


def counted(run: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    """What `run` returns, and the native kernels that it launched."""
    from medspark.sparse import launches

    before = launches()
    result = run()
    after = launches()
    return result, {k: n - before.get(k, 0) for k, n in after.items() if n > before.get(k, 0)}


def _busy_seconds() -> float:
    """Processor time that all processes have taken so far; NaN where the system does not tell."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return math.nan
    user, nice, system, _, _, irq, soft, steal = map(int, fields)
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


@dataclass
class Sample:
    """One timing: ms per call, and cores that other processes took meanwhile."""

    ms: float
    others: float


def take_sample(run: Callable[[], Any], calls: int) -> Sample:
    """Times `calls` calls."""
    synchronize()
    busy, own, start = _busy_seconds(), time.process_time(), time.perf_counter()
    for _ in range(calls):
        run()
    synchronize()
    wall = time.perf_counter() - start
    others = (_busy_seconds() - busy - (time.process_time() - own)) / wall
    return Sample(wall / calls * 1e3, max(others, 0.0))


@dataclass
class _Timed:
    """One callable on its way through the rounds."""

    run: Callable[[], Any]
    calls: int = 1
    samples: list[Sample] = field(default_factory=list)
    error: str = ""

    def step(self, name: str, retakes: int) -> None:
        try:
            with nvtx(name):
                best = take_sample(self.run, self.calls)
                while best.others > OTHERS and retakes > 0:
                    retakes -= 1
                    again = take_sample(self.run, self.calls)
                    best = min(best, again, key=lambda s: s.others)
        except Exception as error:  # the row says what happened
            self.error = reason(error)
            return
        self.samples.append(best)

    def row(self) -> dict[str, Any]:
        if self.error:
            return {"status": "error", "reason": self.error}
        times = [s.ms for s in self.samples]
        others = [s.others for s in self.samples if not math.isnan(s.others)]
        row = {"status": "ok", "times_ms": times, "calls": self.calls, **spread(times)}
        return row | {"others": round(statistics.median(others), 2) if others else None}


def reason(error: BaseException) -> str:
    """One line about an exception."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def spread(times: list[float]) -> dict[str, float]:
    """Median, quartiles and interquartile range."""
    if len(times) == 1:
        low, mid, high = times * 3
    else:
        low, mid, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median_ms": mid, "q1_ms": low, "q3_ms": high, "iqr_ms": high - low}


def time_interleaved(
    runs: dict[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    sample_ms: float = 0.0,
    retakes: int = 0,
    between: Callable[[], Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Wall times in ms of several callables, one sample each per round.

    Args:
        runs: by name; one that raises gets a row with status "error", the others go on.
        rounds: samples of each.
        warmup: rounds before, not counted; they also decide how many calls make a sample.
        sample_ms: a sample makes as many calls as take this long.
        retakes: how often a sample that other processes disturbed is taken again; the least
            disturbed one counts.
        between: called in every round, to measure the machine itself meanwhile.

    Returns:
        by name: status, times_ms (per call), median_ms, q1_ms, q3_ms, iqr_ms, calls per sample, others
        (cores that other processes took, median over the samples).
    """
    timed = {name: _Timed(run) for name, run in runs.items()}
    for index in range(warmup + rounds):
        if between is not None and index >= warmup:
            between()
        for name, one in timed.items():
            if not one.error:
                one.step(name, retakes if index >= warmup else 0)
        if index < warmup:
            for one in timed.values():
                if one.samples:
                    one.calls = max(math.ceil(sample_ms / one.samples[-1].ms), 1)
                one.samples.clear()
    return {name: one.row() for name, one in timed.items()}


def write_record(
    name: str,
    rows: list[dict[str, Any]],
    folder: Path = RESULTS,
    identity: Iterable[str] = (),
    **about: Any,
) -> Path:
    """Writes `<folder>/<name>-<device>-<date>-<commit>.json`, atomically.

    Args:
        name: of the benchmark.
        rows: results, one dictionary each.
        folder: where to.
        identity: the fields of a row that say what was measured (`compare.py` matches by them).
        **about: more that is true of the whole run, for example `roof`.
    """
    env = environment()
    device = "".join(c if c.isalnum() else "-" for c in env["device"]).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}-{device}-{env['date']}-{env['commit']}.json"
    record = {"name": name, "environment": env, "identity": list(identity), **about, "rows": rows}
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(_finite(record), file, indent=1, allow_nan=False)
            file.write("\n")
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    return target


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null instead."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_record(path: Path) -> dict[str, Any]:
    """A record by its path.

    Raises:
        ValueError: the file is no record.
    """
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a record: {error}") from error
    if not isinstance(record, dict) or not {"environment", "rows"} <= set(record):
        raise ValueError(f"{path} is no benchmark record: it lacks 'environment' or 'rows'")
    return record


def print_table(rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Aligned text table of some columns."""
    cells = [columns] + [[_text(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print(
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        )


def show_errors(rows: list[dict[str, Any]], who: str = "engine") -> None:
    """Each reason for a row without a time once, and how many rows have it."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        if row["status"] == "error":
            key = str(row[who]), str(row["reason"])
            counts[key] = counts.get(key, 0) + 1
    if counts:
        why = "without a time, because"
        print()
        print_table(
            [{who: key[0], "rows": n, why: key[1]} for key, n in counts.items()], [who, "rows", why]
        )


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def parser(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share; `doc` is its help.

    Args:
        doc: docstring of the script, shown as it is.
        **defaults: other defaults for them.
    """
    options = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--quick", action="store_true", help="few cases, short samples: a look, not a record")
    add("--only", nargs="*", metavar="TEXT", help="cases whose name contains one of these")
    add("--out", type=Path, default=RESULTS, help="folder of the record")
    add("--no-record", action="store_true", help="print only")
    options.set_defaults(**defaults)
    return options


def add_timing_options(options: argparse.ArgumentParser, rounds: int = 5) -> None:
    """Options of the benchmarks that time engines against each other."""
    add = options.add_argument
    add("--rounds", type=int, default=rounds, help="samples of each engine (default %(default)s)")
    add("--sample-ms", type=float, default=60.0, help="length of a sample (default %(default)s)")
    add("--retakes", type=int, default=2, help="of a disturbed sample (default %(default)s)")
    add("--threads", type=int, nargs="*", help="threads, one run for each (default: torch's)")
    add("--default-memory", action="store_true", help="leave memory to the C library")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def chosen(name: str, only: list[str] | None) -> bool:
    """Whether `--only` names a case; without it, all are."""
    return not only or any(text.lower() in name.lower() for text in only)


def save(args: argparse.Namespace, name: str, rows: list[dict[str, Any]], **about: Any) -> None:
    """Writes the record of a run unless told not to, and says where it is."""
    if not args.no_record:
        path = write_record(f"{name}-quick" if args.quick else name, rows, args.out, **about)
        print(f"record: {path.name}")
