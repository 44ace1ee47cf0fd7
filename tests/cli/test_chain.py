"""The whole chain through the console on 48^3 volumes: files exist and hold sane values."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from medspark.cli.main import main
from medspark.data.phantom import write_phantom_task, write_phantoms
from medspark.data.store import Store
from medspark.finetune.metrics import classification_metrics
from medspark.pretrain.export import load_checkpoint, load_encoder

SMALL = ["model=tiny", "method.width=32", "data.crop=[32,32,32]", "data.val_fraction=0.3"]
FAST = ["trainer.max_steps=3", "trainer.batch_size=2", "trainer.val_every=3"]
QUIET = ["trainer.accelerator=cpu", "trainer.progress_bar=false", "optim.warmup_steps=1"]


def command(name: str, *arguments: str) -> None:
    assert main([name, *arguments]) == 0


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_phantoms(folder / "scans", 4, seed=0, size=(48, 48, 48), spacing=(3.0, 3.0, 3.0))
        write_phantom_task(folder / "task", n_patients=5, patches_per_patient=4, seed=50)
        table = "patients_csv=scans/patients.csv"
        command(
            "prepare", "source=scans", "store=store", "spacing=[3,3,3]", table, "progress=false"
        )
        store = ["data.store=store", "data.val_crops=2"]
        command("pretrain", *store, *SMALL, *FAST, *QUIET, "hydra.run.dir=pretrained")
        command("export", "checkpoint=pretrained/checkpoints/last.ckpt", "out=encoder.pt")
        common = ["task=task", "progress=false", "accelerator=cpu", "epochs=1", "batch_size=4"]
        tuned = ["checkpoint=encoder.pt", "seeds=[0,1]", "mode=linear", "hydra.run.dir=tuned"]
        command("finetune", *common, *tuned)
        panel = ["volume=scans/phantom_0000.nii.gz", "out=panel.png"]
        command("reconstruct", "checkpoint=pretrained/checkpoints/last.ckpt", *panel)
        yield folder


def test_store_holds_the_phantoms(chain):
    store = Store(chain / "store")
    assert len(store) == 4
    assert len({record.patient for record in store.records}) == 4
    assert all(record.size == (48, 48, 48) for record in store.records)
    assert store.spacing == (3.0, 3.0, 3.0)


def test_pretraining_leaves_a_sane_loss_and_its_settings(chain):
    rows = rows_of(next((chain / "pretrained" / "csv").glob("*/metrics.csv")))
    found = next(row for row in rows if row["val/loss"])
    loss, constant = float(found["val/loss"]), float(found["val/constant"])
    # Three steps from random weights: near the constant guess, which standardising puts below 1.
    assert 0.3 < constant <= 1.001
    assert abs(loss / constant - 1) < 0.3
    settings = (chain / "pretrained" / "config.yaml").read_text()
    assert "store: store" in settings
    assert "???" not in settings
    assert "${" not in settings
    checkpoint = load_checkpoint(chain / "pretrained" / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 3
    assert checkpoint["plan"]["intensity"]["window"]["name"] == "wide"
    assert checkpoint["plan"]["crop"] == [32, 32, 32]


def test_exported_weights_are_those_of_the_checkpoint(chain):
    encoder, plan = load_encoder(chain / "encoder.pt")
    state = load_checkpoint(chain / "pretrained" / "checkpoints" / "last.ckpt")["state_dict"]
    prefix = plan["encoder_key"] + "."
    trained = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    weights = encoder.state_dict()
    assert weights.keys() == trained.keys()
    assert all(torch.equal(weights[name], trained[name]) for name in weights)
    assert int(weights["bn1.num_batches_tracked"]) == 3


def test_finetuned_classifier_has_the_pretrained_encoder(chain):
    encoder, _ = load_encoder(chain / "encoder.pt")
    state = load_checkpoint(chain / "tuned" / "seed_0" / "best.ckpt")["state_dict"]
    for name, value in encoder.state_dict().items():
        assert torch.equal(state[f"pyramid.encoder.{name}"], value), name


def test_summary_follows_from_the_predictions(chain):
    summary = json.loads((chain / "tuned" / "summary.json").read_text())
    aucs = []
    for seed in ("0", "1"):
        rows = rows_of(chain / "tuned" / f"seed_{seed}" / "predictions.csv")
        assert {row["split"] for row in rows} == {"train", "val", "test"}
        test = [row for row in rows if row["split"] == "test"]
        values = [[float(row["prob_normal"]), float(row["prob_lesion"])] for row in test]
        labels = torch.tensor([int(row["label"]) for row in test])
        found = classification_metrics(torch.tensor(values, dtype=torch.float64), labels)
        assert found == pytest.approx(summary["seeds"][seed]["test"])
        aucs.append(found["auc"])
    assert all(0 <= auc <= 1 for auc in aucs)
    assert summary["test"]["auc"]["mean"] == pytest.approx(sum(aucs) / 2)
    assert summary["test"]["auc"]["sd"] == pytest.approx(abs(aucs[0] - aucs[1]) / math.sqrt(2))
    assert summary["mode"] == "linear"


def test_panel_is_a_picture_with_hidden_cells(chain):
    from matplotlib.image import imread

    picture = imread(chain / "panel.png")[..., :3]
    assert min(picture.shape[:2]) > 300
    hidden = np.array([0x2B, 0x3F, 0x63]) / 255
    assert (np.abs(picture - hidden).max(axis=-1) < 0.01).mean() > 0.03
    assert len(np.unique((picture * 255).astype(np.uint8).reshape(-1, 3), axis=0)) > 100


def test_reconstruct_takes_a_volume_of_the_store(chain, monkeypatch, capsys):
    monkeypatch.chdir(chain)
    volume = Store("store").records[0].id
    checkpoint = "checkpoint=pretrained/checkpoints/last.ckpt"
    command("reconstruct", checkpoint, f"volume={volume}", "store=store", "out=again.png")
    assert "constant guess" in capsys.readouterr().out
    assert (chain / "again.png").stat().st_size > 10_000


def test_resumed_run_goes_on_to_the_end(chain, monkeypatch):
    monkeypatch.chdir(chain)
    resume = ["resume=pretrained/checkpoints/last.ckpt", "hydra.run.dir=resumed"]
    steps = ["trainer.max_steps=5", "trainer.batch_size=2", "trainer.val_every=5"]
    store = ["data.store=store", "data.val_crops=2"]
    command("pretrain", *store, *SMALL, *steps, *QUIET, *resume)
    checkpoint = load_checkpoint(chain / "resumed" / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 5


def test_job_that_is_started_again_goes_on_by_itself(chain, monkeypatch, capsys):
    """The same command line thrice: a part, the rest, and nothing left to do."""
    monkeypatch.chdir(chain)
    store = ["data.store=store", "data.val_crops=2", "trainer.batch_size=2", "trainer.accumulate=2"]
    again = [*store, *SMALL, *QUIET, "optim=lamb", "trainer.val_every=2", "trainer.ema_decay=0.9"]
    again += ["resume=auto", "hydra.run.dir=auto"]
    command("pretrain", *again, "trainer.max_steps=2")
    command("pretrain", *again, "trainer.max_steps=4")
    checkpoint = load_checkpoint(chain / "auto" / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 4
    assert checkpoint["ema_state_dict"].keys() == checkpoint["state_dict"].keys()
    written = (chain / "auto" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    capsys.readouterr()
    command("pretrain", *again, "trainer.max_steps=4")
    assert "4 steps, loss on unseen patients 0." in capsys.readouterr().out
    assert (chain / "auto" / "checkpoints" / "last.ckpt").stat().st_mtime_ns == written
    assert "After step 4." in (chain / "auto" / "summary.html").read_text()


@pytest.mark.parametrize("why", ["resume=auto", "torchrun"])
def test_folders_named_after_the_time_are_refused_where_one_is_needed(
    chain, monkeypatch, capsys, why
):
    monkeypatch.chdir(chain)
    if why == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    resume = ["resume=auto"] if why == "resume=auto" else []
    assert main(["pretrain", "data.store=store", *SMALL, *resume]) == 1
    assert f"{why} needs hydra.run.dir=FOLDER" in capsys.readouterr().err


def test_patients_of_a_task_are_left_out(chain, monkeypatch, capsys):
    monkeypatch.chdir(chain)
    rows = ["patient,split", "phantom-0,test", "phantom-1,val", "phantom-2,train"]
    Path("labels.csv").write_text("\n".join(rows))
    held = ["source=scans", "store=held", "spacing=[3,3,3]", "exclude_from.csv=labels.csv"]
    command("prepare", *held, "patients_csv=scans/patients.csv", "progress=false")
    assert "2 left out (2 patients by name)" in capsys.readouterr().out
    assert {r.source for r in Store("held").records} == {"phantom_0002.mha", "phantom_0003_dicom"}


def test_patients_that_cannot_be_recognised_are_an_error(chain, monkeypatch, capsys):
    monkeypatch.chdir(chain)
    held = ["source=scans", "store=blind", "spacing=[3,3,3]", "exclude_patients=[phantom-0]"]
    assert main(["prepare", *held, "progress=false"]) == 1
    assert "patients_csv=TABLE" in capsys.readouterr().err


def test_split_without_patients_is_an_error(chain, monkeypatch, capsys):
    monkeypatch.chdir(chain)
    options = ["exclude_from.csv=task/labels.csv", "exclude_from.splits=[tset]"]
    assert main(["prepare", "source=scans", "store=never", *options]) == 1
    assert "has no split tset; it has test, train, val" in capsys.readouterr().err
    assert not Path("never").exists()


def test_exported_weights_cannot_reconstruct(chain, monkeypatch, capsys):
    monkeypatch.chdir(chain)
    volume = "volume=scans/phantom_0000.nii.gz"
    assert main(["reconstruct", "checkpoint=encoder.pt", volume]) == 1
    assert "holds no decoder" in capsys.readouterr().err
