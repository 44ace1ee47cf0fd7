"""`medspark finetune` and `medspark predict` on a small synthetic task."""

import csv
import json
from pathlib import Path

import pytest
import torch

from medspark.cli.main import main
from medspark.data.phantom import write_phantom_task

TINY = ["encoder.name=resnet10", "+encoder.kwargs.block_inplanes=[4,4,8,8]"]
QUICK = ["task=task", *TINY, "epochs=1", "draws=50", "progress=false", "accelerator=cpu"]
RUN = [*QUICK, "mode=linear", "seeds=[0,1]", "hydra.run.dir=run"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("finetune")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(found)
        write_phantom_task(
            "task", n_patients=5, patches_per_patient=4, size=20, seed=50, spacing=(2.0,) * 3
        )
        assert main(["finetune", *RUN]) == 0
    return found


@pytest.fixture(autouse=True)
def _inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_files_of_a_run(folder):
    expected = {"best.ckpt", "predictions.csv", "metrics.csv", "result.json"}
    expected |= {"roc.png", "reliability.png", "confusion.png"}
    for seed in ("seed_0", "seed_1"):
        assert expected <= {p.name for p in (folder / "run" / seed).iterdir()}
    rows = rows_of(folder / "run" / "seed_0" / "predictions.csv")
    told = ["id", "patient", "split", "label", "label_name", "predicted"]
    assert list(rows[0]) == [*told, "prob_normal", "prob_lesion"]
    assert all(r["label_name"] == ("normal", "lesion")[int(r["label"])] for r in rows)


def test_summary_has_intervals_by_seed():
    summary = json.loads(Path("run/summary.json").read_text())
    for seed in ("0", "1"):
        result = json.loads(Path(f"run/seed_{seed}/result.json").read_text())
        assert summary["seeds"][seed] == result["metrics"]
        assert summary["test_intervals"][seed] == result["test_intervals"]
        assert set(result["test_intervals"]) == {"auc", "ap", "balanced_accuracy", "macro_f1"}
        assert summary["chosen"][seed]["epoch"] == 0
    values = [summary["seeds"][s]["test"]["ece"] for s in ("0", "1")]
    assert summary["test"]["ece"]["mean"] == pytest.approx(sum(values) / 2)


def test_killed_run_goes_on_with_what_is_missing(capsys):
    """Seed 1 was being tested when the job died."""
    before = Path("run/seed_0/best.ckpt").stat().st_mtime_ns
    predictions = Path("run/seed_1/predictions.csv").read_text()
    summary = Path("run/summary.json").read_text()
    Path("run/seed_1/result.json").unlink()
    Path("run/seed_1/predictions.csv").write_text("half of it")
    assert main(["finetune", *RUN]) == 0
    text = capsys.readouterr().out
    assert "seed 0: finished by an earlier start, kept" in text
    assert "seed 1: finished" not in text
    for name in ("auc", "ap", "balanced_accuracy", "macro_f1", "ece", "95 % interval"):
        assert name in text
    assert Path("run/seed_0/best.ckpt").stat().st_mtime_ns == before
    assert Path("run/seed_1/predictions.csv").read_text() == predictions
    assert Path("run/summary.json").read_text() == summary


def test_other_settings_in_the_same_folder_are_an_error(capsys):
    settings = Path("run/config.yaml").read_text()
    assert main(["finetune", *RUN, "lr=0.3"]) == 1
    assert "lr (was None, now 0.3)" in capsys.readouterr().err
    assert Path("run/config.yaml").read_text() == settings


def test_leaks_are_refused_unless_allowed(folder, capsys):
    table = Path("task/labels.csv").read_text().splitlines()
    test = next(line for line in table if line.endswith("test"))
    train = next(line for line in table if line.endswith("train"))
    moved = train.replace(train.split(",")[1], test.split(",")[1])
    Path("task/leaky.csv").write_text("\n".join(moved if x == train else x for x in table) + "\n")
    # A later "task=" wins.
    leaky = [*QUICK, "task=task/leaky.csv", "seeds=[0]", "mode=knn", "hydra.run.dir=leaky"]
    assert main(["finetune", *leaky]) == 1
    assert test.split(",")[1] in capsys.readouterr().err
    assert main(["finetune", *leaky, "allow_leak=true"]) == 0
    assert "warning: " in capsys.readouterr().out


def test_foreign_weights(folder, capsys):
    """The encoder of a classifier of ours, as a plain state_dict, is a foreign file."""
    content = torch.load("run/seed_0/best.ckpt", weights_only=True)
    prefix = "pyramid.encoder."
    weights = {
        k.removeprefix(prefix): v for k, v in content["state_dict"].items() if k.startswith(prefix)
    }
    torch.save(weights, "foreign.pt")
    options = [*QUICK, "seeds=[0]", "mode=linear", "hydra.run.dir=foreign"]
    assert main(["finetune", *options, "init_from=foreign.pt"]) == 0
    assert "100%" in capsys.readouterr().out
    state = torch.load("foreign/seed_0/best.ckpt", weights_only=True)
    assert all(torch.equal(state["state_dict"][prefix + k], v) for k, v in weights.items())
    assert state["plan"]["pretrained"]["method"] == "init_from foreign.pt"
    both = ["init_from=foreign.pt", "checkpoint=foreign.pt"]
    assert main(["finetune", *options, *both]) == 1
    assert "give one" in capsys.readouterr().err


def test_predict_command(folder, capsys):
    arguments = ["checkpoint=run/seed_0/best.ckpt", "source=task/patches", "out=out/p.csv"]
    quiet = ["progress=false", "workers=0", "accelerator=cpu", "patches=true"]
    assert main(["predict", *arguments, *quiet]) == 0
    assert "20 scans predicted (20 windows), 0 refused" in capsys.readouterr().out
    found = {f"patches/{r['source']}": float(r["mean_lesion"]) for r in rows_of(Path("out/p.csv"))}
    rows = rows_of(Path("run/seed_0/predictions.csv"))
    assert found == pytest.approx({r["id"]: float(r["prob_lesion"]) for r in rows}, abs=2e-5)


def test_predict_says_what_a_pretraining_checkpoint_lacks(folder, capsys):
    torch.save({"state_dict": {}, "plan": {"method": "medspark"}}, "pretrained.ckpt")
    arguments = ["checkpoint=pretrained.ckpt", "source=task/patches", "out=q.csv"]
    assert main(["predict", *arguments]) == 1
    assert "no classifier of `medspark finetune`" in capsys.readouterr().err
