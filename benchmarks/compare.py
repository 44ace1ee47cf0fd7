"""Two records of one benchmark as a table; the exit code tells of a regression.

    python benchmarks/compare.py OLD.json NEW.json
    python benchmarks/compare.py OLD.json NEW.json --margin 0.1 --engines native halo
    python benchmarks/compare.py OLD.json NEW.json --by median_ms --only W1 --all

Rows are matched by what was measured (the record's "identity": workload, mask ratio, type, pass, engine,
threads ...). By default a row is judged by its share of the roof, which was measured in the same run, so
that a slower day of the machine is no regression; where there is none, by the ratio to dense, then by time
or by what the benchmark counts instead. `worse` is how many times worse the new row is.

    regression   worse by more than 1 + margin + spread, where the spread is that of both rows together
                 (interquartile range over median, added as squares: noise does not fail a build)
    lost         measured before, now an error or not there at all (see --allow-missing)
    better, same, fixed, new

Exit code: 0 no regression, 1 at least one regression or lost row, 2 the records cannot be compared.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from harness import chosen, print_table, read_record

# What a row may be judged by, in order of preference, and whether more of it is better.
METRICS = {
    "roof_share": True, "peak_share": True, "vs_dense": True, "per_core": True, "median_ms": False,
    "overhead_us": False, "ratio_activations": False,
}  # fmt: skip
MARGIN = 0.05
BAD = ("regression", "lost")
SAME_MACHINE = ("device", "processor", "cores", "cpu_kernels", "memory", "torch")


def by_identity(record: dict[str, Any], name: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows by what they measured.

    Raises:
        ValueError: the record does not say what identifies its rows, or two rows are the same.
    """
    fields = record.get("identity")
    if not fields:
        raise ValueError(
            f"{name} does not say what identifies its rows (an older harness wrote it)"
        )
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in record["rows"]:
        key = tuple(row.get(field) for field in fields)
        if key in rows:
            raise ValueError(f"{name} has two rows for {key}")
        rows[key] = row
    return rows


def metric_of(old: dict[str, Any], new: dict[str, Any], by: str | None) -> str | None:
    """The first metric that both rows have, or the one that was asked for if both have it."""
    for name in [by] if by else METRICS:
        values = old.get(name), new.get(name)
        if all(isinstance(value, int | float) and value > 0 for value in values):
            return name
    return None


def spread_of(row: dict[str, Any]) -> float:
    """Interquartile range over median; 0 where a row has one number only."""
    if row.get("median_ms") and row.get("iqr_ms") is not None:
        return float(row["iqr_ms"] / row["median_ms"])
    return float(row.get("relative_spread") or 0.0)


def verdict(
    old: dict[str, Any] | None, new: dict[str, Any] | None, margin: float, by: str | None = None
) -> dict[str, Any]:
    """How the new row compares with the old one: `verdict`, `by`, `old`, `new`, `worse`, `limit`."""
    measured = [row is not None and row.get("status") != "error" for row in (old, new)]
    if not all(measured):
        names = {(True, False): "lost", (False, True): "new" if old is None else "fixed"}
        return {"verdict": names.get((measured[0], measured[1]), "error")}
    assert old is not None and new is not None
    metric = metric_of(old, new, by)
    if metric is None:
        return {"verdict": "not comparable"}
    worse = new[metric] / old[metric]
    worse = 1 / worse if METRICS[metric] else worse
    limit = 1 + margin + math.hypot(spread_of(old), spread_of(new))
    found = "regression" if worse > limit else "better" if worse < 1 / limit else "same"
    return {
        "verdict": found, "by": metric, "old": float(old[metric]), "new": float(new[metric]),
        "worse": worse, "limit": limit,
    }  # fmt: skip


def compare(
    old: dict[str, Any],
    new: dict[str, Any],
    margin: float = MARGIN,
    by: str | None = None,
    engines: list[str] | None = None,
) -> list[dict[str, Any]]:
    """A line for each row of either record, limited to some engines where rows have one.

    Raises:
        ValueError: the records are of different benchmarks, or their rows cannot be told apart.
    """
    if old.get("identity") and new.get("identity") and old["identity"] != new["identity"]:
        raise ValueError("the records identify their rows differently: not the same benchmark")
    before, after = by_identity(old, "the old record"), by_identity(new, "the new record")
    lines = []
    for key in [*before, *(key for key in after if key not in before)]:
        head = dict(zip(old["identity"], key, strict=True))
        if engines and "engine" in head and head["engine"] not in engines:
            continue
        lines.append(head | verdict(before.get(key), after.get(key), margin, by))
    return lines


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What makes two runs hard to compare."""
    one, two = old["environment"], new["environment"]
    return [
        f"{name}: {one.get(name)} before, {two.get(name)} now"
        for name in SAME_MACHINE
        if one.get(name) != two.get(name)
    ]


def arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("old", type=Path, help="record before")
    add("new", type=Path, help="record after")
    add("--margin", type=float, default=MARGIN, help="what is tolerated (default %(default)s)")
    add("--by", choices=list(METRICS), help="judge by this alone")
    add("--engines", nargs="*", default=["native"], help="whose rows count (default native)")
    add("--only", nargs="*", help="rows whose description contains one of these")
    add("--all", action="store_true", help="show rows that stayed the same too")
    add("--allow-missing", action="store_true", help="rows that are gone are no regression")
    return options.parse_args()


def main() -> int:
    args = arguments()
    try:
        old, new = read_record(args.old), read_record(args.new)
        lines = compare(old, new, args.margin, args.by, args.engines)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for difference in differences(old, new):
        print(f"other {difference}", file=sys.stderr)
    fields = old["identity"]
    lines = [x for x in lines if chosen(" ".join(str(x[f]) for f in fields), args.only)]
    if args.allow_missing:
        lines = [x for x in lines if x["verdict"] != "lost"]
    shown = lines if args.all else [x for x in lines if x["verdict"] not in ("same", "error")]
    print_table(shown, [*fields, "by", "old", "new", "worse", "limit", "verdict"])
    counts: dict[str, int] = {}
    for line in lines:
        counts[line["verdict"]] = counts.get(line["verdict"], 0) + 1
    print(", ".join(f"{n} {name}" for name, n in sorted(counts.items())) or "no rows to compare")
    if any(line["verdict"] in BAD for line in lines):
        return 1
    if not any("worse" in line for line in lines):
        print("nothing was compared: no row was measured in both records", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
