"""Starts pre-training in processes of its own, kills them at random moments, and lets the last finish.

A program, as a test process has threads and cannot fork: `killed_runs.py FOLDER KILLS SEED`. It imports
everything once, then forks one process per attempt. Each is what a user's job would be: a fresh
`pretrain(..., resume="auto")` that knows nothing of the earlier ones.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from medspark.data.phantom import make_phantom
from medspark.models import spark_spec
from medspark.pretrain.run import pretrain

SPEC = spark_spec(
    "resnet10", encoder_kwargs={"block_inplanes": [4, 4, 8, 8]}, width=32, cell=16
)  # fmt: skip
# Everything that has a state: LAMB, both schedules, drop path, accumulation, average, best loss.
SETTINGS = {
    "max_steps": 14,
    "batch_size": 2,
    "accumulate": 2,
    "val_every": 4,
    "save_every": 1,
    "panel_every": 3,
    "lr": 3e-3,
    "optim": {"name": "lamb", "warmup_steps": 3, "weight_decay_end": 0.2, "drop_path": 0.3},
    "gradient_clip": 0.5,
    "ema_decay": 0.9,
    "accelerator": "cpu",
    "devices": 1,
    "seed": 3,
    "log_every": 1,
    "progress_bar": False,
    "resume": "auto",
}


class Crops(Dataset):
    """Crop `i` of one phantom, flipped or not: a function of `i`."""

    def __init__(self, hu: np.ndarray, length: int, seed: int) -> None:
        self.hu, self.length, self.seed = hu, length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Tensor:
        rng = np.random.default_rng([self.seed, i])
        z, y, x = (int(rng.integers(0, n - 32 + 1)) for n in self.hu.shape)
        crop = self.hu[z : z + 32, y : y + 32, x : x + 32]
        crop = np.flip(crop, [axis for axis in range(3) if rng.random() < 0.5])
        return torch.from_numpy(np.clip(crop / 500.0, -2, 2).astype(np.float32))[None]


def attempt(out: Path, hu: np.ndarray, save_every: int) -> int:
    """In a process of its own: runs until the end, or until it is killed."""
    pid = os.fork()
    if pid == 0:
        try:
            log = (out.parent / f"{out.name}.log").open("a")
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            train, val = Crops(hu, 100, 1), Crops(hu, 3, 2)
            pretrain(SPEC, train, val, out_dir=out, **{**SETTINGS, "save_every": save_every})
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return pid


def step_of(out: Path) -> int:
    last = out / "checkpoints" / "last.ckpt"
    return torch.load(last, weights_only=True)["global_step"] if last.exists() else 0


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    hu = make_phantom(0, size=(40, 40, 40), spacing=(4.0, 4.0, 4.0)).hu
    start_up, whole = measure(folder / "whole", hu)
    rng, chain, report = random.Random(seed), 0, []
    while len(report) < kills:
        out = folder / f"killed{chain}"
        pid = attempt(out, hu, 1)
        # Some die while they start, most in training, wherever that finds them.
        time.sleep(rng.uniform(0.7 * start_up, 1.5 * start_up + 4 * (whole - start_up) / kills))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            report.append({"signal": os.WTERMSIG(status), "chain": chain, "step": step_of(out)})
        else:  # it was done already: the rest of the kills go to another run
            assert status == 0, f"a run failed, see {out}.log"
            chain += 1
    _, status = os.waitpid(attempt(folder / f"killed{chain}", hu, 1), 0)
    assert status == 0, "the last run failed"
    (folder / "report.json").write_text(json.dumps(report))


def measure(out: Path, hu: np.ndarray) -> tuple[float, float]:
    """Seconds until training begins, and until the uninterrupted run is over."""
    began, start_up = time.monotonic(), 0.0
    pid = attempt(out, hu, 0)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if not start_up and (out / "csv").exists():
            start_up = time.monotonic() - began
        if done:
            assert status == 0, f"the uninterrupted run failed, see {out}.log"
            return start_up, time.monotonic() - began
        time.sleep(0.005)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
