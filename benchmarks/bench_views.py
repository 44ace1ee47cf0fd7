"""What contrastive views cost on one core: each kind of change, and whole policies.

    python benchmarks/bench_views.py              64^3 and 96^3, writes a record
    python benchmarks/bench_views.py --quick      64^3, three rounds, no record

Kinds begin with "crop" (read and resample, nothing else) and add one change to every view, so that the
difference to "crop" is its price. Policies are drawn as in training; a small view counts as a view.
Volumes are phantoms at 2 mm with noise of 12 HU (smooth ones would compress too well), read through the
store each time. Everything runs in one process with one thread, row by row in turn.

Columns
  ms_view    median processor milliseconds for one view, which other load on the machine hardly moves
  wall_ms    the same by the clock
  views_s    views per second of processor time: what each worker brings where it has a core
  samples_s  samples (all views of a place) per second of processor time
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import print_table, write_record

CHANGES: dict[str, dict[str, Any]] = {
    "crop": {},
    "crop, place and scale": {"edge_mm": (90.0, 160.0), "min_overlap": 0.5, "shift": 1.0},
    "rotation": {"rotate": (12.0, 6.0, 6.0)},
    "mirror": {"flips": (False, False, True)},
    "window": {"level": 0.05, "width": 1.25},
    "contrast, brightness": {"contrast": 0.15, "brightness": 25.0},
    "noise": {"noise": 15.0, "noise_share": 1.0},
    "blur": {"blur_mm": 1.5, "blur_share": (1.0,)},
    "thick slices": {"thickness_mm": (3.0, 6.0), "thickness_share": 1.0},
    "cut-out": {"cutouts": 2},
}
WARMUP = 2
METHODS = ("simclr", "moco_v2", "byol", "swav")


def make_store(folder: Path, volumes: int) -> Any:
    from medspark.data.phantom import make_phantom
    from medspark.data.store import Record, Store, write_array

    store, records = Store.create(folder / "store"), []
    size = (144, 160, 176)
    for i in range(volumes):
        hu = make_phantom(i, size, (2.0, 2.0, 2.0)).hu
        hu = np.clip(hu + np.random.default_rng(i).normal(0, 12, size), -1024, 3071)
        write_array(store.volume_path(f"v{i}"), hu.astype(np.int16))
        records.append(Record(f"v{i}", f"v{i}", f"p{i}", size=size, spacing=(2.0, 2.0, 2.0)))
    store.put(records)
    return store


def datasets(store: Any, edge: int) -> dict[str, Any]:
    """Name of a row to its samples."""
    from medspark.data.crops import CropDataset
    from medspark.data.views import PRESETS, ViewDataset
    from medspark.data.windows import Intensity

    crops = CropDataset(
        store, store.records, (64, 64, 64), Intensity.named("wide"), length=1 << 20, seed=0
    )
    cube = (edge, edge, edge)
    policies = {
        name: replace(PRESETS["none"], size=cube, **change) for name, change in CHANGES.items()
    }
    policies |= {f"policy {name}": replace(PRESETS[name], size=cube) for name in METHODS}
    return {name: ViewDataset(crops, policy) for name, policy in policies.items()}


def bench(store: Any, edge: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each kind of change and each policy; one sample of each in turn."""
    made = datasets(store, edge)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    for index in range(WARMUP + rounds):
        for name, views in made.items():
            before = time.process_time(), time.perf_counter()
            views[index]
            after = time.process_time(), time.perf_counter()
            times[name].append((after[0] - before[0], after[1] - before[1]))
    rows = []
    for name, views in made.items():
        cpu, wall = zip(*times[name][WARMUP:], strict=True)
        n, seconds = views.policy.n_views, statistics.median(cpu)
        rows.append(
            {
                "edge": edge,
                "views": name,
                "ms_view": seconds * 1e3 / n,
                "wall_ms": statistics.median(wall) * 1e3 / n,
                "views_s": n / seconds,
                "samples_s": 1 / seconds,
                "cpu_ms": [c * 1e3 for c in cpu],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96], help="edges in voxels")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="64^3, three rounds, no record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes, rounds = ([64], 3) if options.quick else (options.sizes, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), 1 if options.quick else 3)
        rows = [row for edge in sizes for row in bench(store, edge, rounds)]
    print_table(rows, ["edge", "views", "ms_view", "wall_ms", "views_s", "samples_s"])
    if not options.quick:
        print(write_record("views", rows))


if __name__ == "__main__":
    main()
