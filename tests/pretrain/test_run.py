"""The training run: data order, masks, metrics, files, exact resume."""

import csv

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from medspark.models import build_spark
from medspark.pretrain.order import CounterSampler, generator_of, sample_numbers, seed_of
from medspark.pretrain.spark_module import SparKModule
from medspark.sparse import BlockMask


def load(path):
    return torch.load(path, weights_only=True)


def rows(folder, pattern="csv/*/metrics.csv"):
    found = []
    for path in sorted(folder.glob(pattern)):
        with path.open() as file:
            found += list(csv.DictReader(file))
    return found


def column(table, name):
    return {int(r["step"]): float(r[name]) for r in table if r.get(name)}


def draw(seed, phase, numbers):
    """Masks of samples, each of which depends on its number alone."""
    masks = [
        BlockMask.random(1, (2, 2, 2), 0.6, generator=generator_of(seed, phase, n)).visible
        for n in numbers
    ]
    return torch.cat(masks)


def test_files_and_result(finished):
    folder, result, train = finished
    assert train.read == list(range(12))
    assert result.steps == 6
    assert result.best == folder / "checkpoints" / "best.ckpt"
    assert result.last == folder / "checkpoints" / "last.ckpt"
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert load(result.last)["global_step"] == 6
    assert [p.name for p in sorted((folder / "panels").iterdir())] == [
        f"step_00000{s}.png" for s in (2, 4, 6)
    ]
    assert list((folder / "tensorboard").glob("events*"))


def test_logged_values(finished):
    folder, result, _ = finished
    table = rows(folder)
    lr = column(table, "train/lr")
    assert lr[0] == pytest.approx(3e-3 * 0.005)
    assert lr[2] == pytest.approx(3e-3)
    assert lr[5] == pytest.approx(3e-3 * 0.001, rel=1e-3)
    decay = column(table, "train/weight_decay")
    assert (decay[0], decay[5]) == (pytest.approx(0.04), pytest.approx(0.2))
    groups = load(result.last)["optimizer_states"][0]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [pytest.approx(0.2), 0.0]
    assert all(g > 0 for g in column(table, "train/grad_norm").values())
    loss = column(table, "train/loss")
    assert len(loss) == 6
    metrics = result.metrics
    assert metrics["val/ratio"] == pytest.approx(metrics["val/loss"] / metrics["val/constant"])


def test_first_loss_is_that_of_the_named_mask_and_samples(finished, helpers):
    folder, _, _ = finished
    torch.manual_seed(5)
    spark = build_spark(helpers.SPEC).train()
    data = helpers.Volumes(12)
    batch = torch.stack([data[0], data[1]])
    expected = spark(batch, mask=BlockMask(draw(5, "train", [0, 1]))).loss.item()
    assert column(rows(folder), "train/loss")[0] == pytest.approx(expected, rel=1e-5)


def test_validation_masks_are_fixed_and_the_mean_is_over_samples(finished, helpers):
    folder, result, _ = finished
    module = SparKModule.load_from_checkpoint(result.last, weights_only=True).eval()
    data = helpers.Volumes(3, seed=9)
    loss = constant = 0.0
    with torch.no_grad():
        for i in range(3):
            mask = BlockMask(draw(5, "val", [i]))
            output = module.spark(data[i].unsqueeze(0), mask=mask)
            loss += output.loss.item() / 3
            constant += output.constant_loss().item() / 3
    assert result.metrics["val/loss"] == pytest.approx(loss, rel=1e-4)
    assert result.metrics["val/constant"] == pytest.approx(constant, rel=1e-4)
    constants = list(column(rows(folder), "val/constant").values())
    assert len(constants) == 3
    assert max(constants) - min(constants) < 1e-6


@pytest.mark.parametrize("stop", [5, 8])  # in the middle of a batch; between validation runs
def test_interrupted_and_resumed_is_bit_for_bit_uninterrupted(finished, tmp_path, stop, helpers):
    folder, result, _ = finished
    with pytest.raises(OSError, match="the power went"):
        helpers.run(tmp_path, helpers.Volumes(12, fail_at=stop))
    last = tmp_path / "checkpoints" / "last.ckpt"
    step = load(last)["global_step"]
    assert step == stop // 2 // 2 * 2
    train, masks = helpers.Volumes(12), helpers.Masks()
    resumed = helpers.run(tmp_path, train, resume=last, callbacks=[masks])
    assert train.read == list(range(step * 2, 12))
    assert resumed.steps == 6
    a, b = load(result.last), load(resumed.last)
    assert all(torch.equal(v, b["state_dict"][k]) for k, v in a["state_dict"].items())
    states = [c["optimizer_states"][0]["state"] for c in (a, b)]
    for key, state in states[0].items():
        assert all(torch.equal(v, states[1][key][n]) for n, v in state.items())
    groups = [c["optimizer_states"][0]["param_groups"] for c in (a, b)]
    assert groups[0] == groups[1]
    assert resumed.metrics == result.metrics
    assert list(masks.train) == list(range(step, 6))
    for at, drawn in masks.layers.items():  # what a dropout of the network would have drawn
        torch.manual_seed(seed_of(5, "layers", at, 0))
        assert drawn == torch.rand(1).item()
    for at, (visible,) in masks.train.items():
        assert torch.equal(visible, draw(5, "train", [2 * at, 2 * at + 1]))
    for run in masks.val.values():
        assert torch.equal(torch.cat(run), draw(5, "val", [0, 1, 2]))
    table, again = rows(folder), rows(tmp_path)
    for name in ("train/loss", "val/loss"):
        expected = {s: v for s, v in column(table, name).items() if s >= step}
        assert {s: v for s, v in column(again, name).items() if s >= step} == expected
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["best.ckpt", "last.ckpt"]


def test_loader_processes_change_nothing(finished, tmp_path, helpers):
    a, b = load(finished[1].last), load(helpers.run(tmp_path, num_workers=2).last)
    assert all(torch.equal(v, b["state_dict"][k]) for k, v in a["state_dict"].items())


def test_a_finished_run_can_be_made_longer(finished, tmp_path, helpers):
    _, result, _ = finished
    train = helpers.Volumes(16)
    longer = helpers.run(tmp_path, train, resume=result.last, max_steps=8)
    assert longer.steps == 8
    assert train.read == [12, 13, 14, 15]
    assert load(longer.last)["global_step"] == 8


def test_resuming_another_run_is_refused(finished, tmp_path, helpers):
    _, result, _ = finished
    with pytest.raises(ValueError, match="complete"):
        helpers.run(tmp_path, resume=result.last)
    with pytest.raises(ValueError, match="another run: its seed is 5, here it is 6"):
        helpers.run(tmp_path, resume=result.last, max_steps=8, seed=6)
    with pytest.raises(ValueError, match="its samples per step is 2, here it is 4"):
        helpers.run(tmp_path, resume=result.last, max_steps=8, accumulate=2)
    other = {**helpers.SPEC, "mask_ratio": 0.75}
    with pytest.raises(ValueError, match="another run"):
        helpers.run(tmp_path, spec=other, resume=result.last, max_steps=8)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        helpers.run(tmp_path, resume=tmp_path / "none.ckpt")


def test_nan_stops_the_run_and_names_the_cause(tmp_path, helpers):
    with pytest.raises(FloatingPointError, match="Sample 3 holds 1 values that are not finite"):
        helpers.run(tmp_path, helpers.Volumes(12, nan_at=3))


def test_generator_is_a_function_of_its_arguments():
    draws = {
        args: torch.rand(4, generator=generator_of(*args)).tolist()
        for args in [(0, "train", 1, 0), (0, "train", 0, 1), (1, "train", 1, 0), (0, "val", 1, 0)]
    }
    assert len({tuple(d) for d in draws.values()}) == 4
    for args, values in draws.items():
        assert torch.rand(4, generator=generator_of(*args)).tolist() == values


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_has_the_same_samples_however_they_are_shared(world, accumulate):
    size = 8 // world // accumulate
    for step in range(3):
        calls = [step * accumulate + part for part in range(accumulate)]
        found = [n for c in calls for r in range(world) for n in sample_numbers(c, r, world, size)]
        assert sorted(found) == list(range(8 * step, 8 * step + 8))


def test_sampler_counts_on_from_its_start(monkeypatch):
    assert list(CounterSampler(0, 3, 2)) == [0, 1, 2, 3, 4, 5]
    assert list(CounterSampler(2, 3, 2)) == [4, 5]
    assert len(CounterSampler(2, 3, 2)) == 6
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        seen.append(list(CounterSampler(1, 3, 2)))
    assert seen == [[4, 5, 8, 9], [6, 7, 10, 11]]


def test_the_encoder_can_start_from_weights(finished, tmp_path, helpers, capsys):
    """Another seed, so that nothing else makes the encoders equal; a resumed run keeps its own."""
    _, result, _ = finished
    began = {}

    class Begin(Callback):
        def on_train_start(self, trainer, pl_module):
            began.update({k: v.clone() for k, v in pl_module.spark.encoder.state_dict().items()})

    options = {"seed": 6, "init_from": result.last, "callbacks": [Begin()], "save_every": 1}
    helpers.run(tmp_path, max_steps=3, **options)
    assert "100%" in capsys.readouterr().out
    saved = torch.load(result.last, weights_only=True)["state_dict"]
    prefix = "spark.pyramid.encoder."
    expected = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
    assert began.keys() == expected.keys()
    assert all(torch.equal(began[k], v) for k, v in expected.items())
    helpers.run(tmp_path, resume="auto", max_steps=4, **options)
    assert not any(
        torch.equal(began[k], v) for k, v in expected.items() if k.endswith("conv1.weight")
    )
