"""Does pre-training help where it must? The phantom positive control (`medspark.data.control`).

For every pre-training seed: an encoder pre-trained by SparK on unlabelled phantoms, one pre-trained on
the same phantoms with shuffled voxels, and one from scratch are fine-tuned on the same few labelled
phantoms and tested on the same others. The unit of the statistics is the pre-training seed. The control
holds if the HU histogram tells nothing (AUC at most 0.55), the paired difference of SparK and scratch
is above 0 with its 95 % interval, and that of shuffled phantoms and scratch is not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from harness import environment, print_table, write_record
from scipy import stats
from torch import nn

from medspark.cli.app import quiet_libraries
from medspark.data.control import SPACING, WINDOW, FibrePhantoms, write_control_task
from medspark.data.task_histogram import histogram_baseline
from medspark.data.tasks import Task, load_task
from medspark.data.windows import Intensity
from medspark.finetune.metrics import classification_metrics
from medspark.finetune.run import finetune
from medspark.models import spark_spec
from medspark.pretrain.export import load_encoder
from medspark.pretrain.run import pretrain

CHANCE = 0.55
SPEC = spark_spec(
    "resnet10",
    encoder_kwargs={"block_inplanes": [16, 32, 64, 128], "no_max_pool": True},
    strides=[2, 4, 8, 16],
    width=32,
    cell=8,
)
_TEST, _VALIDATION, _UNLABELLED, _LABELLED = 0, 1, 100, 1000  # series of phantoms


def pretrained(seed: int, shuffled: bool, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Pre-trains once; returns the encoder and how the loss compares with the best constant."""
    crop = [args.size] * 3
    result = pretrain(
        SPEC,
        FibrePhantoms(_UNLABELLED + seed, args.steps * args.batch, shuffled=shuffled),
        FibrePhantoms(_VALIDATION, 64, shuffled=shuffled),
        max_steps=args.steps,
        batch_size=args.batch,
        out_dir=folder,
        lr=2e-3,
        optim={"warmup_steps": args.steps // 20},
        accelerator="cpu",
        devices=1,
        val_every=args.steps,
        seed=seed,
        intensity=Intensity.named(WINDOW).as_dict(),
        spacing=[SPACING] * 3,
        crop=crop,
        progress_bar=args.progress,
    )
    encoder, _ = load_encoder(result.last)
    return {"encoder": encoder, "ratio": result.metrics["val/ratio"]}


def auc(
    task: Task, encoder: nn.Module | None, seed: int, mode: str, folder: Path, epochs: int = 60
) -> float:
    """Fine-tunes on the task's training split, all of it labelled cases; AUC of its test split."""
    result = finetune(
        task,
        encoder,
        out_dir=folder,
        intensity=Intensity.named(WINDOW),
        scratch=SPEC["encoder"],
        mode=mode,
        epochs=epochs,
        batch_size=10,
        augment=False,  # mirroring would swap the classes
        monitor="last",
        seed=seed,
        accelerator="cpu",
        progress=False,
        pictures=False,
        draws=1,
    )
    return result.metrics["test"]["auc"]


def interval(differences: list[float]) -> dict[str, float]:
    """Mean, 95 % t interval and p value of paired differences, one for each pre-training seed."""
    found = stats.ttest_1samp(differences, 0.0)
    low, high = found.confidence_interval(0.95)
    mean = statistics.fmean(differences)
    return {"mean": mean, "low": float(low), "high": float(high), "p": float(found.pvalue)}


def one_seed(seed: int, args: argparse.Namespace, tasks: list[Task], work: Path) -> dict[str, Any]:
    """All arms of one pre-training seed; AUC averaged over the labelled sets."""
    starts: dict[str, nn.Module | None] = {"scratch": None}
    row: dict[str, Any] = {"seed": seed}
    for name, shuffled in (("spark", False), ("shuffled", True)):
        made = pretrained(seed, shuffled, args, work / f"{name}{seed}")
        starts[name], row[f"{name} loss / constant"] = made["encoder"], made["ratio"]
    for name, start in starts.items():
        for mode in ("full", "linear") if start is not None else ("full",):
            found = [auc(t, start, seed, mode, work / "finetune") for t in tasks]
            row[f"{name} {mode}"], row[f"{name} {mode} by set"] = statistics.fmean(found), found
    return row


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=6, help="pre-training seeds")
    parser.add_argument("--steps", type=int, default=400, help="pre-training steps")
    parser.add_argument("--batch", type=int, default=16, help="phantoms per step")
    parser.add_argument("--sets", type=int, default=3, help="labelled sets for each seed")
    parser.add_argument("--cases", type=int, default=10, help="labelled phantoms in a set")
    parser.add_argument("--test", type=int, default=200, help="test phantoms")
    parser.add_argument(
        "--many", type=int, default=400, help="labels with which scratch does learn"
    )
    parser.add_argument("--histogram-test", type=int, default=2000, help="its test phantoms")
    parser.add_argument("--only-histogram", action="store_true", help="leave the networks out")
    parser.add_argument("--progress", action="store_true", help="bars of the pre-training")
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args(argv)
    args.size = 32
    return args


def main(argv: list[str] | None = None) -> int:
    """Runs the control; 0 if it holds."""
    args = parse(argv)
    quiet_libraries()
    if args.only_histogram:
        return only_histogram(args)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        rows = []
        for seed in range(args.seeds):
            tasks = [labelled(work / f"set{seed}_{k}", seed * args.sets + k, args.cases, args.test)
                     for k in range(args.sets)]  # fmt: skip
            rows.append(one_seed(seed, args, tasks, work))
            print_table(rows[-1:], [k for k in rows[-1] if not k.endswith("by set")])
            sys.stdout.flush()
        many = labelled(work / "many", 10**4, args.many, args.test)
        summary = summarise(rows)
        summary["histogram AUC"] = histogram_auc(args, work / "histogram")
        summary["scratch AUC, many labels"] = auc(many, None, 0, "full", work / "finetune", 15)
    return report(args, rows, summary)


def labelled(folder: Path, number: int, cases: int, test: int) -> Task:
    """Training set `number`, of phantoms that no other has, and the test phantoms, which are shared."""
    write_control_task(folder, {"train": (_LABELLED + number, cases), "test": (_TEST, test)})
    return load_task(folder)


def histogram_auc(args: argparse.Namespace, folder: Path) -> float:
    """What the histogram tells, with many labels; its test is large, as chance has to be told from 0.55.

    With the 200 phantoms that suffice for networks the standard error of an AUC at chance is 0.04.
    """
    task = labelled(folder, 10**4, args.many, args.histogram_test)
    found = histogram_baseline(task, intensity=Intensity.named(WINDOW))
    return classification_metrics(*found)["auc"]


def only_histogram(args: argparse.Namespace) -> int:
    """The histogram's part alone, with a record of its own."""
    with tempfile.TemporaryDirectory() as folder:
        auc = histogram_auc(args, Path(folder))
    row = {"histogram AUC": auc, "labels": args.many, "test": args.histogram_test}
    print_table([row], list(row))
    if not args.no_record:
        print("record:", write_record("positive_control_histogram", [row]))
    return 0 if auc <= CHANCE else 1


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and the paired differences."""

    def column(name: str) -> list[float]:
        return [row[name] for row in rows]

    arms = ("scratch full", "spark full", "shuffled full", "spark linear", "shuffled linear")
    paired = {
        f"{arm} - scratch full": interval(
            [a - b for a, b in zip(column(arm), column("scratch full"), strict=True)]
        )
        for arm in arms[1:]
    }
    return {"mean AUC": {arm: statistics.fmean(column(arm)) for arm in arms}, "paired": paired}


def report(args: argparse.Namespace, rows: list[dict[str, Any]], summary: dict[str, Any]) -> int:
    """Prints the verdict and writes the record."""
    gain = summary["paired"]["spark full - scratch full"]
    none = summary["paired"]["shuffled full - scratch full"]
    holds = {
        "histogram at chance": summary["histogram AUC"] <= CHANCE,
        "SparK beats scratch": gain["low"] > 0,
        "shuffled does not": none["low"] <= 0,
    }
    print("\n".join(f"{key}: {value}" for key, value in {**summary, **holds}.items()))
    if not args.no_record:
        settings = {k: v for k, v in vars(args).items() if k not in ("progress", "no_record")}
        row = {"environment": environment(), "settings": settings, "summary": summary,
               "holds": holds, "seeds": rows}  # fmt: skip
        print("record:", write_record("positive_control", [row]))
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    torch.set_num_threads(2)
    sys.exit(main())
