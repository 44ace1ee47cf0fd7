"""A run that is killed again and again ends with the bits of one that never was."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medspark.pretrain.summary import read_history

PROGRAM = Path(__file__).with_name("killed_runs.py")


def same(a, b, where=""):
    """Raises where two checkpoints differ in a bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


# A checkpoint less the loops, where Lightning counts restarts, and the plan, which names the commit.
KEYS = ("state_dict", "ema_state_dict", "optimizer_states", "callbacks", "global_step")


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_bit_for_bit_uninterrupted(tmp_path, kills):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), str(tmp_path), str(kills), str(kills)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    logs = "\n".join(p.read_text()[-3000:] for p in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stderr + logs
    report = json.loads((tmp_path / "report.json").read_text())
    assert [r["signal"] for r in report] == [signal.SIGKILL] * kills
    whole = tmp_path / "whole"
    for out in sorted(tmp_path.glob("killed?")):
        for name in ("last", "best"):
            a, b = (
                torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
                for folder in (whole, out)
            )
            for key in KEYS:
                same(a[key], b[key], key)
        assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
        panels = [sorted(p.name for p in (f / "panels").iterdir()) for f in (whole, out)]
        assert panels[0] == panels[1]
        check_history(whole, out)
        assert (out / "summary.html").exists()


def check_history(whole, out):
    """What was logged is the same, but for times; the runs logged in several files."""
    expected, found = read_history(whole), read_history(out)
    for name, values in expected.items():
        if not name.startswith("time/"):
            assert found[name] == values, name
    assert len(expected["train/loss"]) == 14


def test_later_parts_of_a_log_replace_earlier_ones(tmp_path):
    for start, rows in ((0, [(0, 1.0), (1, 2.0), (2, 3.0)]), (2, [(2, 30.0), (3, 40.0)])):
        path = tmp_path / "csv" / f"from_step_{start:06d}" / "metrics.csv"
        path.parent.mkdir(parents=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([("step", "epoch", "train/loss"), *((s, 0, v) for s, v in rows)])
    assert read_history(tmp_path) == {"train/loss": {0: 1.0, 1: 2.0, 2: 30.0, 3: 40.0}}
