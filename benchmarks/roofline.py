"""Draws the roofline of a machine from a record of bench_conv3d.

Arithmetic intensity (useful FLOPs per byte that must move) against useful GFLOP/s, one panel for each type.
The line is the roof of the record: copy bandwidth to the left, FMA peak to the right. Native rows carry
the name of their workload; what lies above the slope ran out of the caches. Readable without colour.

    python benchmarks/roofline.py benchmarks/results/conv3d-....json
    python benchmarks/roofline.py RECORD --pass grad_weight --threads 1 --out roofline.png
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from harness import read_record
from workloads import PASSES

MARKERS = {  # marker, filled
    "native": ("o", True), "halo": ("s", False), "dense": ("v", False),
    "dense channels_last": ("^", False), "spconv": ("x", True), "minkowski": ("+", True),
    "torchsparse": ("*", False), "reference": ("d", False),
}  # fmt: skip


def draw_panel(axes: Any, rows: list[dict[str, Any]], roof: dict[str, Any], dtype: str) -> None:
    """One type: roof, and the points of all engines."""
    peak, copy = roof["gflops"][dtype], roof["copy_gbs"]
    points = [(r["flops"] / r["moved_bytes"], r["gflops"]) for r in rows]
    low = min([x for x, _ in points] + [peak / copy]) / 2
    high = max([x for x, _ in points] + [peak / copy]) * 2
    axes.plot([low, peak / copy, high], [low * copy, peak, peak], color="black", linewidth=2)
    axes.axvline(peak / copy, color="0.7", linestyle=":", linewidth=1)
    axes.text(high / 1.1, peak * 1.08, f"{peak:.0f} GFLOP/s, {roof['instruction'][dtype]}",
              ha="right", fontsize=8)  # fmt: skip
    axes.text(low * 1.15, low * copy * 2.2, f"{copy:.0f} GB/s", fontsize=8, ha="left")
    for engine, (marker, filled) in MARKERS.items():
        mine = [r for r in rows if r["engine"] == engine]
        if mine:
            style = {"color": "black"} if filled else {"facecolors": "white", "edgecolors": "0.35"}
            axes.scatter(
                [r["flops"] / r["moved_bytes"] for r in mine], [r["gflops"] for r in mine],
                marker=marker, s=34 if engine == "native" else 26, linewidths=1, label=engine,
                zorder=3 if engine == "native" else 2, **style,
            )  # fmt: skip
    label_points(axes, [r for r in rows if r["engine"] == "native"])
    axes.set(xscale="log", yscale="log", title=dtype, xlabel="useful FLOP / byte")
    axes.set_ylim(min([y for _, y in points] + [peak]) / 2, peak * 1.6)
    axes.grid(which="both", color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)


def label_points(axes: Any, rows: list[dict[str, Any]]) -> None:
    """The name of each workload once, at its point with the smallest mask ratio."""
    places = {"left": (-5, -2), "right": (5, -2)}
    named: set[str] = set()
    for row in sorted(rows, key=lambda r: (r["hidden"], r["gflops"])):
        name = row["workload"]
        if name not in named:
            side = "right" if len(named) % 2 else "left"
            named.add(name)
            axes.annotate(
                name.split()[0] if name.startswith("W") else name,
                (row["flops"] / row["moved_bytes"], row["gflops"]), xytext=places[side],
                textcoords="offset points", fontsize=7, ha="left" if side == "right" else "right",
            )  # fmt: skip


def draw(record: dict[str, Any], which: str, threads: int | None, target: Path) -> None:
    """Writes the picture, atomically.

    Raises:
        ValueError: the record has no roof, or no row of that pass and number of threads.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    roofs = {roof["threads"]: roof for roof in record.get("roof", [])}
    if not roofs:
        raise ValueError("the record holds no roof: only records of bench_conv3d have one")
    threads = threads or max(roofs)
    rows = [
        r for r in record["rows"]
        if r["status"] == "ok" and r["pass"] == which and r["threads"] == threads and r["hidden"] > 0
    ]  # fmt: skip
    kinds = [
        d for d in roofs.get(threads, {}).get("gflops", {}) if any(r["dtype"] == d for r in rows)
    ]
    if not kinds:
        raise ValueError(f"the record has no row of pass {which} on {threads} threads")
    figure, panels = plt.subplots(1, len(kinds), figsize=(7 * len(kinds), 5.2), squeeze=False)
    for axes, dtype in zip(panels[0], kinds, strict=True):
        draw_panel(axes, [r for r in rows if r["dtype"] == dtype], roofs[threads], dtype)
    panels[0][0].set_ylabel("useful GFLOP/s")
    panels[0][0].legend(fontsize=8, loc="lower right")
    env = record["environment"]
    hidden = ", ".join(f"{h:.0%}" for h in sorted({r["hidden"] for r in rows}))
    figure.suptitle(
        f"{env['device']}, {threads} thread{'s' * (threads > 1)}, {which}, {hidden} hidden "
        f"({env['date']}, commit {env['commit']})", fontsize=10,
    )  # fmt: skip
    figure.tight_layout()
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".png")
    os.close(handle)
    try:
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    finally:
        plt.close(figure)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("record", type=Path, help="of bench_conv3d")
    add("--pass", dest="which", choices=PASSES, default="forward")
    add("--threads", type=int, help="of the rows (default: the most in the record)")
    add("--out", type=Path, help="PNG (default: beside the record)")
    args = options.parse_args()
    target = args.out or args.record.with_suffix(".png")
    try:
        draw(read_record(args.record), args.which, args.threads, target)
    except ValueError as error:
        options.error(str(error))
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
