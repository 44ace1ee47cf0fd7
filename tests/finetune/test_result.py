"""A finished run is kept only where it is the same run."""

import json
import math
from dataclasses import dataclass

import pytest
import torch

from medspark.data.tasks import Sample
from medspark.data.windows import Intensity
from medspark.finetune.bootstrap import Interval
from medspark.finetune.result import (
    FinetuneResult,
    finished_runs,
    read_result,
    record_of,
    weights_hash,
    write_result,
)
from medspark.finetune.settings import Settings

INTENSITY = Intensity.named("wide")
SPEC = {"name": "resnet10", "kwargs": {}}


@dataclass
class Listed:
    samples: list[Sample]
    class_names: list[str]


TASK = Listed(
    [Sample("a", "p", 0, "no", "train"), Sample("b", "q", 1, "yes", "test")], ["no", "yes"]
)


def record(task=TASK, encoder=None, intensity=INTENSITY, **settings):
    return record_of(task, encoder, SPEC, intensity, Settings(**settings))


def finish(folder, found) -> FinetuneResult:
    folder.mkdir(parents=True)
    result = FinetuneResult(
        {"test": {"auc": 0.75, "ap": math.nan}},
        folder / "predictions.csv",
        folder / "best.ckpt",
        3,
        {"monitor": "loss", "value": 0.5, "epoch": 3},
        {"auc": Interval(0.5, math.nan, 20, 6)},
    )
    result.predictions.touch()
    result.checkpoint.touch()
    write_result(folder, result, found)
    return result


def test_result_comes_back(tmp_path):
    written = finish(tmp_path / "seed_0", record())
    found, settings = read_result(tmp_path / "seed_0")
    assert settings == json.loads(json.dumps(record()))
    assert (found.best_epoch, found.chosen) == (3, written.chosen)
    assert found.metrics["test"]["auc"] == 0.75
    assert math.isnan(found.metrics["test"]["ap"])
    assert found.intervals["auc"].low == 0.5 and math.isnan(found.intervals["auc"].high)


def test_same_run_is_kept_and_unfinished_ones_are_not(tmp_path):
    finish(tmp_path / "seed_0", record(class_weights=[1, 2], size=[8, 8, 8]))
    finish(tmp_path / "seed_1", record(seed=1))
    (tmp_path / "seed_1" / "best.ckpt").unlink()
    same = record(class_weights=(1, 2), size=(8, 8, 8))
    kept = finished_runs(tmp_path, [0, 1, 2], {0: same, 1: record(seed=1), 2: record(seed=2)})
    assert list(kept) == [0]


CHANGED = {
    "lr": record(lr=0.5),
    "mode": record(mode="linear"),
    "task": record(task=Listed(TASK.samples[::-1], TASK.class_names)),
    "intensity": record(intensity=Intensity.named("lung")),
    "weights": record(encoder=torch.nn.Linear(2, 2)),
}


@pytest.mark.parametrize("changed", CHANGED)
def test_other_settings_are_an_error_that_names_them(tmp_path, changed):
    finish(tmp_path / "seed_0", record())
    with pytest.raises(ValueError, match=rf"other settings: {changed} \(was .*hydra.run.dir"):
        finished_runs(tmp_path, [0], {0: CHANGED[changed]})


def test_damaged_result_is_an_error(tmp_path):
    finish(tmp_path / "seed_0", record())
    (tmp_path / "seed_0" / "result.json").write_text('{"metrics": 3}')
    with pytest.raises(ValueError, match="damaged"):
        finished_runs(tmp_path, [0], {0: record()})


def test_hash_sees_every_weight():
    encoder = torch.nn.BatchNorm1d(3)
    first = weights_hash(encoder)
    assert first == weights_hash(torch.nn.BatchNorm1d(3))
    encoder.running_mean[2] += 1e-6
    assert weights_hash(encoder) != first
