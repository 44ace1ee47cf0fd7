"""Fine-tuning runs on a toy task: a bright ball in noise, or none."""

import csv
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medspark.data.tasks import Sample, TaskDataset
from medspark.data.windows import Intensity
from medspark.finetune.metrics import classification_metrics
from medspark.finetune.module import ClassifierModule
from medspark.finetune.run import finetune
from medspark.models.encoders import create_encoder

SPEC = {"name": "resnet10", "kwargs": {"block_inplanes": [4, 4, 8, 8], "conv1_t_size": 3}}
SIZES = {"train": 48, "val": 16, "test": 24}
INTENSITY = Intensity.named("wide")


@dataclass
class ToyTask:
    """The reading side of a task, without files; notes what was read, and when."""

    samples: list[Sample]
    class_names: list[str]
    watched: Path
    before_choice: set[str] = field(default_factory=set)

    def split(self, name: str) -> list[Sample]:
        chosen = [s for s in self.samples if s.split == name]
        if not chosen:
            raise ValueError(f"no split {name}")
        return chosen

    def read(self, sample: Sample) -> tuple[np.ndarray, tuple[float, float, float]]:
        if not self.watched.exists():
            self.before_choice.add(sample.split)
        rng = np.random.default_rng(int(sample.id))
        hu = rng.normal(0, 30, (16, 16, 16))
        if sample.label_name == "yes":
            z, y, x = rng.integers(2, 8, 3)
            hu[z : z + 6, y : y + 6, x : x + 6] += 400
        return hu.astype(np.int16), (1.0, 1.0, 1.0)


def toy_task(folder: Path, sizes: dict[str, int] | None = None) -> ToyTask:
    samples = [
        Sample(str(1000 * s + i), f"{split}-{i // 4}", i % 2, ("no", "yes")[i % 2], split)
        for s, (split, n) in enumerate((sizes or SIZES).items())
        for i in range(n)
    ]
    return ToyTask(samples, ["no", "yes"], folder / "best.ckpt")


def run(folder: Path, **options):
    defaults = {"scratch": SPEC, "epochs": 4, "batch_size": 8, "lr": 5e-3, "accelerator": "cpu"}
    task = options.pop("task", None) or toy_task(folder)
    encoder = options.pop("encoder", None)
    found = finetune(
        task,
        encoder,
        out_dir=folder,
        intensity=INTENSITY,
        progress=False,
        **{**defaults, **options},
    )
    return found, task


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run(tmp_path_factory.mktemp("toy"), epochs=8)


def test_separable_task_is_learned(trained):
    found, _ = trained
    assert found.metrics["test"]["auc"] > 0.95
    assert found.metrics["test"]["n"] == SIZES["test"]


def test_predictions_give_the_metrics_again(trained):
    found, task = trained
    rows = rows_of(found.predictions)
    assert [(r["id"], r["patient"], r["split"], int(r["label"])) for r in rows] == [
        (s.id, s.patient, s.split, s.label) for s in task.samples
    ]
    for split in SIZES:
        mine = [r for r in rows if r["split"] == split]
        values = [[float(r["prob_no"]), float(r["prob_yes"])] for r in mine]
        probabilities = torch.tensor(values, dtype=torch.float64)
        torch.testing.assert_close(
            probabilities.sum(1), torch.ones(len(mine)).double(), atol=1e-5, rtol=0
        )
        again = classification_metrics(probabilities, torch.tensor([int(r["label"]) for r in mine]))
        assert again == pytest.approx(found.metrics[split])


def test_the_tested_checkpoint_is_the_best_by_validation(tmp_path):
    # Wrong labels in the validation split: the more is learned, the worse it gets.
    task = toy_task(tmp_path)
    flipped = [replace(s, label=1 - s.label) if s.split == "val" else s for s in task.samples]
    found, task = run(tmp_path, task=replace(task, samples=flipped), epochs=8)
    losses = {
        int(r["epoch"]): float(r["val/loss"])
        for r in rows_of(found.predictions.with_name("metrics.csv"))
        if r["val/loss"]
    }
    assert len(losses) == 8
    assert found.best_epoch == min(losses, key=losses.get)
    assert losses[found.best_epoch] < 0.7 * losses[7]
    module = ClassifierModule(create_encoder(SPEC["name"], **SPEC["kwargs"]), 2)
    state = torch.load(found.checkpoint, weights_only=True)["state_dict"]
    module.load_state_dict(state)
    module.eval()
    data = TaskDataset(task, "val", INTENSITY, None)
    x = torch.stack([data[i][0] for i in range(len(data))])
    labels = torch.tensor([data[i][1] for i in range(len(data))])
    with torch.no_grad():
        logits = module(x)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert loss == pytest.approx(losses[found.best_epoch], rel=1e-4)
    rows = [r for r in rows_of(found.predictions) if r["split"] == "val"]
    expected = [float(r["prob_yes"]) for r in rows]
    assert logits.softmax(1)[:, 1].tolist() == pytest.approx(expected, abs=1e-5)


def test_test_split_is_not_read_before_the_choice(trained):
    assert trained[1].before_choice == {"train", "val"}


def test_same_seed_same_numbers_other_seed_others(tmp_path):
    texts = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        found, _ = run(tmp_path / name, seed=seed, epochs=2)
        texts.append(found.predictions.read_text())
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_pretrained_weights_arrive_and_the_given_encoder_stays(tmp_path):
    torch.manual_seed(99)
    encoder = create_encoder(SPEC["name"], **SPEC["kwargs"])
    for buffer in encoder.buffers():
        if buffer.is_floating_point():
            buffer.add_(0.25)
    given = {name: value.clone() for name, value in encoder.state_dict().items()}

    def stored(found):
        state = torch.load(found.checkpoint, weights_only=True)["state_dict"]
        prefix = "pyramid.encoder."
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

    linear, _ = run(tmp_path / "linear", encoder=encoder, mode="linear", epochs=1)
    assert [n for n, v in stored(linear).items() if not torch.equal(v, given[n])] == []
    full, _ = run(tmp_path / "full", encoder=encoder, mode="full", epochs=1, lr=1e-6)
    weights = stored(full)
    assert not torch.equal(weights["conv1.weight"], given["conv1.weight"])
    torch.testing.assert_close(weights["conv1.weight"], given["conv1.weight"], atol=1e-4, rtol=0)
    assert all(torch.equal(v, given[n]) for n, v in encoder.state_dict().items())


def test_augmentation_changes_from_epoch_to_epoch(tmp_path, monkeypatch):
    seen = []
    original = TaskDataset.set_epoch
    monkeypatch.setattr(
        TaskDataset, "set_epoch", lambda self, e: (seen.append(e), original(self, e))[0]
    )
    run(tmp_path, epochs=3)
    assert seen == [0, 1, 2]


def test_last_batch_of_one_sample_is_left_out(tmp_path):
    task = toy_task(tmp_path, {"train": 9, "val": 4, "test": 4})
    found, _ = run(tmp_path, task=task, epochs=1, batch_size=8)
    assert found.metrics["train"]["n"] == 9


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ({"train": 8, "test": 4}, {}, "no split val"),
        ({"train": 1, "val": 4, "test": 4}, {}, "one class only"),
        (SIZES, {"epochs": 0}, "at least 1"),
        (SIZES, {"mode": "half"}, "linear, full"),
    ],
)
def test_bad_input_is_named(tmp_path, sizes, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, task=toy_task(tmp_path, sizes), **options)
