"""`medspark finetune`: a classifier on few labels, one run per seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from medspark.cli.app import output_dir, plain, save_config

if TYPE_CHECKING:
    from torch import nn

    from medspark.data.tasks import Task
    from medspark.data.windows import Intensity
    from medspark.finetune.result import FinetuneResult

METRICS = ("auc", "ap", "balanced_accuracy", "macro_f1", "ece")
_SETTINGS = (
    "mode",
    "size",
    "epochs",
    "batch_size",
    "lr",
    "encoder_lr_scale",
    "layer_decay",
    "open_at",
    "weight_decay",
    "dropout",
    "augment",
    "standardise",
    "class_weights",
    "label_smoothing",
    "monitor",
    "patience",
    "precision",
)
_OPTIONS = ("accelerator", "num_workers", "progress", "draws", "pictures")


def run(config: DictConfig) -> None:
    """Fine-tunes once per seed and writes `summary.json`.

    A seed that an earlier start in the same folder has finished is kept.
    """
    from medspark.data.tasks import load_task
    from medspark.finetune.result import finished_runs, record_of
    from medspark.finetune.run import finetune, start_spec
    from medspark.finetune.settings import Settings

    out = output_dir()
    seeds = [int(seed) for seed in config.seeds]
    if not seeds:
        raise ValueError("seeds is empty: give at least one, e.g. seeds=[0]")
    task = load_task(config.task)
    check_task(task, bool(config.allow_leak))
    encoder, plan, intensity = start(config, task)
    settings = {key: plain(config[key]) for key in _SETTINGS}
    scratch = plain(config.encoder)
    spec = start_spec(task, encoder, scratch, plan)
    records = {
        seed: record_of(task, encoder, spec, intensity, Settings(**settings, seed=seed))
        for seed in seeds
    }
    results = finished_runs(out, seeds, records)
    save_config(config, out)
    for seed in seeds:
        if seed in results:
            print(f"seed {seed}: finished by an earlier start, kept")
            continue
        results[seed] = finetune(
            task,
            encoder,
            seed=seed,
            out_dir=out / f"seed_{seed}",
            intensity=intensity,
            scratch=scratch,
            pretrained=plan,
            **settings,
            **{key: plain(config[key]) for key in _OPTIONS},
        )
    ordered = {seed: results[seed] for seed in seeds}
    write_summary(out / "summary.json", config, ordered)
    print(table({seed: result.metrics for seed, result in ordered.items()}))
    print(interval_lines(ordered))
    print(f"\npredictions of every sample, pictures and a summary: {out}")


def check_task(task: Task, allow_leak: bool) -> None:
    """Says what is doubtful about a task.

    Raises:
        ValueError: test samples or people are among the training samples, unless allowed.
    """
    from medspark.data.leaks import check_leaks

    for message in dict.fromkeys([*task.warnings, *check_leaks(task, allow_leak)]):
        print(f"warning: {message}")


def start(
    config: DictConfig, task: Task
) -> tuple[nn.Module | None, dict[str, Any] | None, Intensity]:
    """The encoder to start with (None from scratch), its plan, and the normalisation it needs.

    Raises:
        ValueError: a checkpoint that does not say how its input was normalised, or both a
            checkpoint and foreign weights.
    """
    from medspark.data.windows import Intensity
    from medspark.pretrain.export import load_encoder

    if config.checkpoint is not None and config.init_from is not None:
        raise ValueError("checkpoint and init_from are both weights to start with: give one")
    if config.init_from is not None:
        encoder, origin = foreign(config, task)
        return encoder, origin, Intensity.named(config.window)
    if config.checkpoint is None:
        return None, None, Intensity.named(config.window)
    encoder, plan = load_encoder(config.checkpoint)
    if plan["intensity"] is None:
        raise ValueError(f"{config.checkpoint} does not say how its input was normalised")
    return encoder, plan, Intensity.from_dict(plan["intensity"])


def foreign(config: DictConfig, task: Task) -> tuple[nn.Module, dict[str, Any]]:
    """The network of `encoder` with the weights of `init_from`, and what to say of its origin."""
    import torch

    from medspark.finetune.run import start_spec
    from medspark.models.encoders import encoder_from_spec
    from medspark.models.weights import init_from

    spec = start_spec(task, None, plain(config.encoder), None) or {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what the file lacks is drawn, the same way for every seed
        encoder = encoder_from_spec(spec)
    print(init_from(encoder, config.init_from))
    return encoder, {"encoder": spec, "method": f"init_from {Path(config.init_from).name}"}


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample SD; the SD of a single value is NaN."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def table(runs: Mapping[int, Mapping[str, Mapping[str, float]]]) -> str:
    """Test metrics by seed, with mean and SD, as text."""
    lines = [f"{'test':<8}" + "".join(f"{name:>19}" for name in METRICS)]
    for seed, metrics in runs.items():
        lines.append(f"seed {seed:<3}" + "".join(number(metrics["test"][m], 19) for m in METRICS))
    found = [mean_sd([metrics["test"][m] for metrics in runs.values()]) for m in METRICS]
    lines.append(f"{'mean':<8}" + "".join(number(mean, 19) for mean, _ in found))
    lines.append(f"{'SD':<8}" + "".join(number(sd, 19) for _, sd in found))
    return "\n".join(lines)


def interval_lines(results: Mapping[int, FinetuneResult]) -> str:
    """The intervals of the test AUC, a line for each seed."""
    lines, few = ["\n95 % interval of the test AUC over patients (bootstrap):"], False
    for seed, result in results.items():
        auc = result.intervals["auc"]
        lines.append(
            f"seed {seed:<3}{number(auc.low, 8)} to{number(auc.high, 7)}   {auc.patients} patients"
        )
        few |= auc.patients < _FEW
    if few:
        lines.append(
            f"with fewer than {_FEW} patients these are too short (see docs/finetuning.md)"
        )
    return "\n".join(lines)


def number(value: float, width: int) -> str:
    """Four decimals, right-aligned; a dash for NaN, which is an SD of one run or no AUC."""
    return f"{'-' if math.isnan(value) else f'{value:.4f}':>{width}}"


def write_summary(target: Path, config: DictConfig, results: Mapping[int, FinetuneResult]) -> None:
    """Writes the metrics of every seed and split, mean and SD of the test split, and intervals."""
    from medspark.finetune.result import write_json

    names = [n for n in next(iter(results.values())).metrics["test"] if n not in _COUNTS]
    values = {n: [r.metrics["test"][n] for r in results.values()] for n in names}
    spread = {n: dict(zip(("mean", "sd"), mean_sd(v), strict=True)) for n, v in values.items()}
    write_json(
        target,
        {
            "task": str(config.task),
            "checkpoint": config.checkpoint,
            "init_from": config.init_from,
            "mode": config.mode,
            "seeds": {str(seed): r.metrics for seed, r in results.items()},
            "chosen": {str(seed): r.chosen for seed, r in results.items()},
            "test": spread,
            "test_intervals": {
                str(seed): {name: asdict(i) for name, i in r.intervals.items()}
                for seed, r in results.items()
            },
        },
    )


_COUNTS = ("n", "classes_present")
_FEW = 20  # patients; simulated coverage is in `medspark.finetune.bootstrap`
