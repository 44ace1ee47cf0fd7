"""`medspark finetune`: a classifier on few labels, one run per seed."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from medspark.cli.app import output_dir, plain, save_config

if TYPE_CHECKING:
    from torch import nn

    from medspark.data.windows import Intensity

METRICS = ("auc", "balanced_accuracy", "accuracy")
_OPTIONS = (
    "mode",
    "epochs",
    "batch_size",
    "lr",
    "encoder_lr_scale",
    "weight_decay",
    "dropout",
    "augment",
    "size",
    "accelerator",
    "precision",
    "num_workers",
    "progress",
)


def run(config: DictConfig) -> None:
    """Fine-tunes once per seed and writes `summary.json`."""
    from medspark.data.tasks import load_task
    from medspark.finetune.run import finetune

    out = output_dir()
    seeds = [int(seed) for seed in config.seeds]
    if not seeds:
        raise ValueError("seeds is empty: give at least one, e.g. seeds=[0]")
    task = load_task(config.task)
    encoder, intensity = start(config)
    save_config(config, out)
    options = {key: plain(config[key]) for key in _OPTIONS}
    results = {
        seed: finetune(
            task,
            encoder,
            seed=seed,
            out_dir=out / f"seed_{seed}",
            intensity=intensity,
            scratch=plain(config.encoder),
            **options,
        )
        for seed in seeds
    }
    runs = {seed: result.metrics for seed, result in results.items()}
    write_summary(out / "summary.json", config, runs)
    print(table(runs))
    print(f"\npredictions of every sample and a summary: {out}")


def start(config: DictConfig) -> tuple[nn.Module | None, Intensity]:
    """The pre-trained encoder (None from scratch) and the normalisation that goes with it.

    Raises:
        ValueError: a checkpoint that does not say how its input was normalised.
    """
    from medspark.data.windows import Intensity
    from medspark.pretrain.export import load_encoder

    if config.checkpoint is None:
        return None, Intensity.named(config.window)
    encoder, plan = load_encoder(config.checkpoint)
    if plan["intensity"] is None:
        raise ValueError(f"{config.checkpoint} does not say how its input was normalised")
    return encoder, Intensity.from_dict(plan["intensity"])


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample SD; the SD of a single value is NaN."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def table(runs: Mapping[int, Mapping[str, Mapping[str, float]]]) -> str:
    """Test metrics by seed, with mean and SD, as text."""
    lines = [f"{'test':<8}" + "".join(f"{name:>20}" for name in METRICS)]
    for seed, metrics in runs.items():
        lines.append(f"seed {seed:<3}" + "".join(number(metrics["test"][m], 20) for m in METRICS))
    found = [mean_sd([metrics["test"][m] for metrics in runs.values()]) for m in METRICS]
    lines.append(f"{'mean':<8}" + "".join(number(mean, 20) for mean, _ in found))
    lines.append(f"{'SD':<8}" + "".join(number(sd, 20) for _, sd in found))
    return "\n".join(lines)


def number(value: float, width: int) -> str:
    """Four decimals, right-aligned; a dash for NaN, which is an SD of one run or no AUC."""
    return f"{'-' if math.isnan(value) else f'{value:.4f}':>{width}}"


def write_summary(
    target: Path, config: DictConfig, runs: Mapping[int, Mapping[str, Mapping[str, float]]]
) -> None:
    """Writes the metrics of every seed and split, and mean and SD of those of the test split."""
    summary: dict[str, Any] = {
        "task": str(config.task),
        "checkpoint": config.checkpoint,
        "mode": config.mode,
        "seeds": {str(seed): dict(metrics) for seed, metrics in runs.items()},
        "test": {},
    }
    for name in METRICS:
        mean, sd = mean_sd([metrics["test"][name] for metrics in runs.values()])
        summary["test"][name] = {"mean": mean, "sd": sd}
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.write_text(json.dumps(without_nan(summary), indent=2, allow_nan=False) + "\n")
    os.replace(partial, target)


def without_nan(value: Any) -> Any:
    """The same nested dicts with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
