"""Fine-tuning runs on a toy task: a bright ball in noise, or none."""

import csv
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medspark.data.tasks import Sample, TaskDataset
from medspark.data.windows import Intensity
from medspark.finetune.classifier import load_classifier
from medspark.finetune.knn import NearestNeighbours
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
    name: str = "toy"
    dims: int = 3
    grey: bool = False
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
    defaults |= {"draws": 20, "pictures": False}
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


def test_pictures_are_drawn(tmp_path):
    run(tmp_path, pictures=True, epochs=1)
    assert {p.name for p in tmp_path.glob("*.png")} == {
        "roc.png",
        "reliability.png",
        "confusion.png",
    }


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


@pytest.mark.parametrize("mode", ["linear", "knn", "freeze_then_open"])
def test_every_mode_learns_something(tmp_path, mode):
    options = {"augment": mode == "freeze_then_open"} | ({"lr": 0.1} if mode == "linear" else {})
    found, _ = run(tmp_path, mode=mode, epochs=12, **options)
    assert found.metrics["test"]["auc"] > 0.8
    low, high = found.intervals["auc"].low, found.intervals["auc"].high
    assert low <= found.metrics["test"]["auc"] <= high


@pytest.mark.parametrize("mode", ["linear", "knn"])
def test_frozen_encoder_sees_every_sample_once(tmp_path, monkeypatch, mode):
    seen = []
    module = ClassifierModule if mode == "linear" else NearestNeighbours
    original = module.features
    monkeypatch.setattr(
        module, "features", lambda self, x: (seen.append(len(x)), original(self, x))[1]
    )
    found, _ = run(tmp_path, mode=mode, augment=False, epochs=5)
    assert sum(seen) == sum(SIZES.values())
    assert found.chosen["monitor"] == "loss"


def test_standardisation_is_by_the_training_split(tmp_path):
    found, task = run(tmp_path, mode="linear", augment=False, epochs=1, standardise=True)
    module = load_classifier(found.checkpoint).network
    with torch.no_grad():
        features = module.features(stacked(task, "train")[0])
    torch.testing.assert_close(module.feature_mean, features.mean(0), atol=1e-5, rtol=1e-4)
    sd = features.std(0, correction=0)
    alive = sd > 0.02 * sd.max()
    assert alive.sum() > 4
    torch.testing.assert_close(module.feature_sd[alive], sd[alive], atol=1e-6, rtol=1e-3)
    raw, _ = run(tmp_path / "raw", mode="linear", augment=False, epochs=1)
    plain = load_classifier(raw.checkpoint).network
    assert plain.feature_mean.eq(0).all() and plain.feature_sd.eq(1).all()


def stacked(task, split: str, size=None) -> tuple[torch.Tensor, torch.Tensor]:
    data = TaskDataset(task, split, INTENSITY, size)
    items = [data[i] for i in range(len(data))]
    return torch.stack([item[0] for item in items]), torch.tensor([item[1] for item in items])


@pytest.mark.parametrize("mode", ["linear", "knn", "full"])
def test_saved_classifier_predicts_without_the_task(tmp_path, mode):
    found, task = run(tmp_path, mode=mode, epochs=2)
    classifier = load_classifier(found.checkpoint)
    probabilities = classifier.probabilities(stacked(task, "test")[0])
    rows = [r for r in rows_of(found.predictions) if r["split"] == "test"]
    expected = [float(r["prob_yes"]) for r in rows]
    assert probabilities[:, 1].tolist() == pytest.approx(expected, abs=2e-5)
    told = [("no", "yes")[p > 0.5] for p in expected]
    assert [r["predicted"] for r in rows] == told
    plan = classifier.plan
    assert (plan["class_names"], plan["mode"], plan["dims"]) == (["no", "yes"], mode, 3)
    assert plan["encoder"] == SPEC
    assert plan["size"] == [16, 16, 16]
    assert plan["patch_mm"] == [16.0, 16.0, 16.0]
    assert Intensity.from_dict(plan["intensity"]) == INTENSITY
    assert (plan["knn"] is not None) == (mode == "knn")


def test_early_stopping_waits_for_patience(tmp_path):
    task = toy_task(tmp_path)
    flipped = [replace(s, label=1 - s.label) if s.split == "val" else s for s in task.samples]
    found, _ = run(tmp_path, task=replace(task, samples=flipped), epochs=9, patience=2)
    losses = [float(r["val/loss"]) for r in rows_of(tmp_path / "metrics.csv") if r["val/loss"]]
    assert len(losses) == found.best_epoch + 3 < 9
    assert min(losses) == losses[found.best_epoch] == pytest.approx(found.chosen["value"])


def test_checkpoint_by_auc(tmp_path):
    found, _ = run(tmp_path, monitor="auc", epochs=4)
    aucs = [float(r["val/auc"]) for r in rows_of(tmp_path / "metrics.csv") if r["val/auc"]]
    assert found.metrics["val"]["auc"] == pytest.approx(max(aucs), abs=1e-6)
    assert found.best_epoch == aucs.index(max(aucs))


def test_diverged_training_says_so(tmp_path):
    with pytest.raises(FloatingPointError, match="lower lr"):
        run(tmp_path, lr=1e30, epochs=2)
    assert not (tmp_path / "result.json").exists()


class Pictures(ToyTask):
    """The same in two dimensions, as grey values."""

    def read(self, sample: Sample):
        hu, spacing = super().read(sample)
        return ((hu[8].astype(float) + 200) / 3).clip(0, 255).astype(np.uint8), spacing[:2]


@pytest.mark.parametrize("mode", ["knn", "full"])
def test_pictures_get_a_2d_network_by_themselves(tmp_path, mode):
    toy = toy_task(tmp_path)
    task = Pictures(toy.samples, toy.class_names, toy.watched, dims=2, grey=True)
    found, _ = run(tmp_path, task=task, mode=mode, epochs=2, size=(24, 24))
    plan = load_classifier(found.checkpoint).plan
    assert plan["encoder"]["kwargs"] == {**SPEC["kwargs"], "spatial_dims": 2}
    assert (plan["dims"], plan["grey"], plan["size"]) == (2, True, [24, 24])
    assert plan["patch_mm"] is None and plan["spacing"] is None
    rows = [r for r in rows_of(found.predictions) if r["split"] == "test"]
    expected = load_classifier(found.checkpoint).probabilities(stacked(task, "test", (24, 24))[0])
    assert expected[:, 1].tolist() == pytest.approx([float(r["prob_yes"]) for r in rows], abs=2e-5)


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
        (SIZES, {"mode": "half"}, "linear, knn, full"),
        (SIZES, {"scratch": {**SPEC, "kwargs": {"spatial_dims": 2}}}, "2D samples.*are 3D"),
        ({"train": 8, "val": 1, "test": 4}, {"monitor": "auc"}, "monitor=loss"),
        ({"train": 8, "val": 1, "test": 4}, {"monitor": "auc", "mode": "knn"}, "monitor=loss"),
    ],
)
def test_bad_input_is_named(tmp_path, sizes, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, task=toy_task(tmp_path, sizes), **options)


def test_all_labels_can_train_where_nothing_is_chosen(tmp_path):
    """monitor=last: the weights of the last epoch, and no validation split is asked for."""
    task = toy_task(tmp_path, {"train": 24, "test": 12})
    found, _ = run(tmp_path, task=task, monitor="last", epochs=3)
    assert found.best_epoch == 2
    assert set(found.metrics) == {"train", "test"}
    assert {row["split"] for row in rows_of(found.predictions)} == {"train", "test"}
    again = tmp_path / "val"
    same, _ = run(again, task=toy_task(again, SIZES | {"train": 24}), monitor="last", epochs=3)
    a, b = (torch.load(r.checkpoint, weights_only=True)["state_dict"] for r in (found, same))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(ValueError, match="no split val"):
        run(tmp_path, task=task)
    for settings in ({"mode": "knn"}, {"patience": 3}):
        with pytest.raises(ValueError, match="monitor=last looks at no validation split"):
            run(tmp_path, task=task, monitor="last", **settings)
