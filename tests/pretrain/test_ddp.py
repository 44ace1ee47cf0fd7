"""Two processes under torchrun take the steps of one process with the joint batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medspark.models import build_spark
from medspark.pretrain.summary import read_history

from .ddp_run import SPEC

PROGRAM = str(Path(__file__).with_name("ddp_run.py"))
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(command, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, str(folder), "4"],
        env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of one process with batches of 4, and of two with batches of 2."""
    folder = tmp_path_factory.mktemp("ddp")
    start([PROGRAM], folder / "one")
    start([*TORCHRUN, PROGRAM], folder / "two")
    return folder / "one", folder / "two"


def numbers(folder, name):
    return [int(line) for line in (folder / name).read_text().split()]


def test_samples_are_shared_out(runs):
    one, two = runs
    assert numbers(one, "read_0.txt") == list(range(16))
    assert numbers(two, "read_0.txt") == [0, 1, 4, 5, 8, 9, 12, 13]
    assert numbers(two, "read_1.txt") == [2, 3, 6, 7, 10, 11, 14, 15]
    assert numbers(two, "val_0.txt") == numbers(two, "val_1.txt") == numbers(one, "val_0.txt")


@pytest.mark.parametrize("key", ["state_dict", "ema_state_dict"])
def test_weights_are_those_of_the_joint_batch(runs, key):
    a, b = (torch.load(f / "checkpoints/last.ckpt", weights_only=True)[key] for f in runs)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.allclose(value, b[name], rtol=1e-7, atol=1e-9), name
    torch.manual_seed(5)
    untrained = build_spark(SPEC).double().state_dict()["pyramid.encoder.conv1.weight"]
    assert (a["spark.pyramid.encoder.conv1.weight"] - untrained).norm() > 0.01 * untrained.norm()


def test_logs_are_those_of_the_joint_batch(runs):
    one, two = (read_history(f) for f in runs)
    for name in ("train/loss", "train/grad_norm", "train/lr", "train/visible", "val/loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-6), name
    metrics = [json.loads((runs[1] / f"metrics_{rank}.json").read_text()) for rank in (0, 1)]
    assert metrics[0]["val/loss"] == metrics[1]["val/loss"]


def test_what_must_stay_at_a_resume_is_the_samples_per_step(runs):
    for folder in runs:
        content = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
        assert content["samples_per_step"] == 4
