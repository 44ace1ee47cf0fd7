"""What a run leaves in its folder: predictions, and a result that says which settings made it."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from medspark.finetune.bootstrap import Interval
from medspark.finetune.settings import Settings

if TYPE_CHECKING:
    from medspark.data.tasks import Task
    from medspark.data.windows import Intensity

RESULT, PREDICTIONS, CHECKPOINT = "result.json", "predictions.csv", "best.ckpt"


@dataclass(frozen=True)
class FinetuneResult:
    """What a run leaves.

    Attributes:
        metrics: of each split, see `classification_metrics`; the test split was looked at once.
            With "knn" each training sample is its own neighbour: those metrics mean nothing.
        predictions: CSV with id, patient, split, label, label_name, predicted (the name of the most
            probable class) and prob_<class> of each class.
        checkpoint: the classifier that was tested, see `medspark.finetune.load_classifier`.
        best_epoch: the epoch of the best validation, from 0; None for "knn".
        chosen: what validation decided: `monitor`, its `value`, and `epoch` or `k` and
            `temperature`.
        intervals: 95 % bootstrap interval over patients of each metric of the test split, with the
            number of patients: below 20 the intervals are too short, see `bootstrap`.
    """

    metrics: dict[str, dict[str, float]]
    predictions: Path
    checkpoint: Path
    best_epoch: int | None
    chosen: dict[str, Any] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)


def record_of(
    task: Task,
    encoder: nn.Module | None,
    spec: Mapping[str, Any] | None,
    intensity: Intensity,
    settings: Settings,
) -> dict[str, Any]:
    """Everything that decides the numbers of a run, as plain JSON: two runs of one record agree.

    The samples and the starting weights are in it as hashes.
    """
    rows = [(s.id, s.patient, s.label, s.split) for s in task.samples]
    return {
        **settings.as_dict(),
        "task": hashlib.sha256(repr((rows, list(task.class_names))).encode()).hexdigest()[:16],
        "weights": None if encoder is None else weights_hash(encoder),
        "encoder": None if spec is None else dict(spec),
        "intensity": intensity.as_dict(),
    }


def weights_hash(network: nn.Module) -> str:
    """First 16 digits of the SHA-256 over names, shapes and values of all weights."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        plain = value.detach().cpu().contiguous()
        digest.update(f"{name}{tuple(plain.shape)}{plain.dtype}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def write_predictions(task: Task, found: Mapping[str, tuple[Tensor, Tensor]], target: Path) -> Path:
    """One row per sample of every split, in the order of the task.

    Nine digits give float32 back as it was, so the metrics follow from the file.

    Args:
        task: names the samples and classes.
        found: split -> probabilities [N, n_classes] and labels [N].
        target: CSV file.
    """
    names = list(task.class_names)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        head = ["id", "patient", "split", "label", "label_name", "predicted"]
        writer.writerow([*head, *(f"prob_{name}" for name in names)])
        for split, (probabilities, _) in found.items():
            for sample, row in zip(task.split(split), probabilities.tolist(), strict=True):
                told = [sample.id, sample.patient, split, sample.label, names[sample.label]]
                best = names[max(range(len(row)), key=row.__getitem__)]
                writer.writerow([*told, best, *(f"{value:.9g}" for value in row)])
    os.replace(partial, target)
    return target


def write_result(out: Path, result: FinetuneResult, record: Mapping[str, Any]) -> None:
    """Writes result.json, the last file of a run: where it is, the run is finished."""
    content = {
        "settings": dict(record),
        "chosen": result.chosen,
        "metrics": result.metrics,
        "test_intervals": {name: asdict(ends) for name, ends in result.intervals.items()},
    }
    write_json(out / RESULT, content)


def read_result(out: Path) -> tuple[FinetuneResult, dict[str, Any]] | None:
    """The result of a finished run and its record; None where there is none.

    Raises:
        ValueError: result.json is damaged.
    """
    path = out / RESULT
    if not all((out / name).is_file() for name in (RESULT, PREDICTIONS, CHECKPOINT)):
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        chosen = content["chosen"]
        metrics = {
            split: {name: _number(value) for name, value in values.items()}
            for split, values in content["metrics"].items()
        }
        intervals = {
            name: Interval(_number(i["low"]), _number(i["high"]), i["draws"], i["patients"])
            for name, i in content["test_intervals"].items()
        }
        found = FinetuneResult(
            metrics, out / PREDICTIONS, out / CHECKPOINT, chosen.get("epoch"), chosen, intervals
        )
        return found, dict(content["settings"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete the folder of this seed") from error


def finished_runs(
    out: Path, seeds: Sequence[int], records: Mapping[int, Mapping[str, Any]]
) -> dict[int, FinetuneResult]:
    """The results of seeds that an earlier start of the same run has finished.

    Args:
        out: folder of the run, with a folder seed_<seed> each.
        seeds: those asked for.
        records: of each seed, see `record_of`.

    Raises:
        ValueError: a finished seed had other settings; the message names them.
    """
    kept = {}
    for seed in seeds:
        found = read_result(out / f"seed_{seed}")
        if found is None:
            continue
        result, earlier = found
        wanted = json.loads(json.dumps(records[seed]))
        changed = [k for k in {**wanted, **earlier} if wanted.get(k) != earlier.get(k)]
        if changed:
            told = ", ".join(f"{k} (was {earlier.get(k)}, now {wanted.get(k)})" for k in changed)
            raise ValueError(
                f"{out / f'seed_{seed}'} holds a finished run with other settings: {told}; choose "
                "another hydra.run.dir, or delete that folder"
            )
        kept[seed] = result
    return kept


def write_json(target: Path, content: Any) -> None:
    """Writes JSON whole or not at all; NaN and infinity become null, which JSON knows."""
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.write_text(json.dumps(without_nan(content), indent=2, allow_nan=False) + "\n", "utf-8")
    os.replace(partial, target)


def without_nan(value: Any) -> Any:
    """The same nested dicts and lists with None for what is not finite."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
