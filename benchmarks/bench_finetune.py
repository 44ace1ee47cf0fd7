"""What pre-training on the test corpus gives: probe, kNN, full fine-tuning and scratch on two tasks.

    python benchmarks/bench_finetune.py --data FOLDER

FOLDER is the real CT of the tests (`ct/` and `tasks/`). Per seed one SparK pre-training on all volumes
but those of the patients who validate or test either task, then every mode on `sts_tumour_patches` and
`body_region`; the logistic regression on HU histograms stands beside them. Three seeds and a handful of
test patients: this shows that the chain learns, and ranks nothing that is close.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from harness import environment, print_table, write_record
from torch import nn

from medspark.cli.app import quiet_libraries
from medspark.data.crops import CropDataset
from medspark.data.ingest import prepare
from medspark.data.leaks import check_leaks
from medspark.data.regions import build_regions, read_stretches
from medspark.data.store import Store, split_patients
from medspark.data.task_histogram import histogram_baseline
from medspark.data.tasks import Task, load_task
from medspark.data.windows import Intensity
from medspark.finetune.metrics import classification_metrics
from medspark.finetune.run import finetune
from medspark.models import spark_spec
from medspark.pretrain.export import load_encoder
from medspark.pretrain.run import pretrain

WINDOW, SPACING, CROP, CELL = "wide", (1.5, 1.5, 1.5), (32, 32, 32), 8
SPEC = spark_spec(
    "resnet18",
    encoder_kwargs={"block_inplanes": [16, 32, 64, 128], "no_max_pool": True},
    strides=[2, 4, 8, 16],
    width=32,
    cell=CELL,
    variance_floor=0.005,
)
METRICS = ("auc", "ap", "balanced_accuracy", "macro_f1", "ece")
# Start, mode and epochs of each arm.
ARMS = (
    ("spark", "linear", 30),
    ("spark", "knn", 1),
    ("spark", "full", 8),
    ("random", "linear", 30),
    ("scratch", "full", 8),
)


def held_out(data: Path) -> set[str]:
    """Patients who validate or test one of the tasks."""
    people = set()
    tables = (data / "tasks/sts_tumour_patches/labels.csv", regions_table())
    for table in tables:
        with table.open(newline="", encoding="utf-8") as file:
            people |= {r["patient"] for r in csv.DictReader(file) if r["split"] in ("val", "test")}
    return people


def regions_table() -> Path:
    return Path(__file__).with_name("body_region.csv")


def make_store(data: Path, folder: Path) -> Store:
    """The corpus less those patients, their masks and the volume that is not for commerce."""
    prepare(
        data / "ct",
        folder,
        spacing=SPACING,
        patients_csv=data / "ct/manifest.csv",
        exclude_patients=sorted(held_out(data)),
        exclude_files=["labels/*", "*_NC*"],
        progress=False,
    )
    return Store(folder)


def pretrained(
    store: Store, seed: int, args: argparse.Namespace, folder: Path
) -> tuple[nn.Module, Any]:
    """Encoder and its loss over that of the best constant, on unseen patients."""
    intensity = Intensity.named(WINDOW)
    train, val = split_patients(store, 0.15, seed)
    grid = tuple(edge // CELL for edge in CROP)
    samples = args.steps * args.batch
    masks = {"mask_grid": grid, "mask_ratio": SPEC["mask_ratio"]}
    result = pretrain(
        SPEC,
        CropDataset(store, train, CROP, intensity, length=samples, seed=seed, **masks),
        CropDataset(store, val, CROP, intensity, length=32, seed=seed, flips=False),
        max_steps=args.steps,
        batch_size=args.batch,
        out_dir=folder,
        lr=1e-3,
        optim={"warmup_steps": args.steps // 20},
        accelerator="cpu",
        devices=1,
        val_every=args.steps,
        seed=seed,
        intensity=intensity.as_dict(),
        spacing=list(SPACING),
        crop=list(CROP),
        progress_bar=False,
    )
    return load_encoder(result.last)[0], result.metrics["val/ratio"]


def one_arm(
    task: Task, encoder: nn.Module | None, seed: int, arm: tuple[str, str, int], folder: Path
) -> dict[str, Any]:
    """Fine-tunes once; a row with the metrics of the test split."""
    start, mode, epochs = arm
    result = finetune(
        task,
        encoder,
        out_dir=folder,
        intensity=Intensity.named(WINDOW),
        scratch=SPEC["encoder"],
        mode=mode,
        epochs=epochs,
        augment=mode == "full",
        seed=seed,
        accelerator="cpu",
        progress=False,
        pictures=False,
    )
    test = result.metrics["test"]
    row = {"task": task.name, "start": start, "mode": mode, "epochs": epochs, "seed": seed}
    row |= {name: test[name] for name in METRICS}
    return row | {"auc interval": asdict(result.intervals["auc"])}


def baseline(task: Task) -> dict[str, Any]:
    """The row of the histogram regression."""
    found = classification_metrics(*histogram_baseline(task))
    return {"task": task.name, "start": "HU histogram", "mode": "logistic", "seed": 0} | {
        name: found[name] for name in METRICS
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with ct/ and tasks/")
    parser.add_argument("--seeds", type=int, default=3, help="pre-training and fine-tuning seeds")
    parser.add_argument("--steps", type=int, default=300, help="pre-training steps")
    parser.add_argument("--batch", type=int, default=16, help="crops per pre-training step")
    parser.add_argument("--no-record", action="store_true", help="print only")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Runs everything; prints each row as it comes."""
    args = parse(argv)
    quiet_libraries()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        store = make_store(args.data, work / "store")
        build_regions(args.data / "ct", read_stretches(regions_table()), work / "body_region")
        tasks = [load_task(args.data / "tasks/sts_tumour_patches"), load_task(work / "body_region")]
        for task in tasks:
            check_leaks(task)
            add(rows, baseline(task))
        for seed in range(args.seeds):
            encoder, ratio = pretrained(store, seed, args, work / f"pretrain{seed}")
            add(rows, {"task": "pre-training", "seed": seed, "loss / constant": ratio})
            for task in tasks:
                for arm in ARMS:
                    start = encoder if arm[0] == "spark" else None
                    add(rows, one_arm(task, start, seed, arm, work / "finetune"))
    summary = summarise(rows)
    print_table(summary, list(summary[0]))
    if not args.no_record:
        settings = {"seeds": args.seeds, "steps": args.steps, "batch": args.batch, "crop": CROP,
                    "spacing": SPACING, "window": WINDOW, "spec": SPEC,
                    "pre-training volumes": len(store.records)}  # fmt: skip
        row = {"environment": environment(), "settings": settings, "summary": summary, "runs": rows}
        print("record:", write_record("finetune", [row]))


def add(rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
    rows.append(row)
    print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and SD over seeds of each task, start and mode."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if "auc" in row:
            found.setdefault((row["task"], row["start"], row["mode"]), []).append(row)
    table = []
    for (task, start, mode), runs in found.items():
        line: dict[str, Any] = {"task": task, "start": start, "mode": mode, "runs": len(runs)}
        for name in METRICS:
            values = [run[name] for run in runs]
            line[name] = statistics.fmean(values)
            line[f"{name} SD"] = statistics.stdev(values) if len(values) > 1 else 0.0
        table.append(line)
    return table


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(sys.argv[1:])
