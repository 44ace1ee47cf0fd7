"""A pre-training small enough for a test, run once."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import Dataset

from medspark.models import spark_spec
from medspark.pretrain.run import pretrain


class Volumes(Dataset):
    """Sample ``i`` is a function of ``i``; reading one number can be made to fail, or yield NaN."""

    def __init__(self, length, seed=0, fail_at=None, nan_at=None):
        self.length, self.seed, self.fail_at, self.nan_at = length, seed, fail_at, nan_at
        self.read = []

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index == self.fail_at:
            raise OSError("the power went")
        self.read.append(index)
        g = torch.Generator().manual_seed(self.seed * 1000 + index)
        x = torch.nn.functional.interpolate(
            torch.randn(1, 1, 8, 8, 8, generator=g), scale_factor=8, mode="trilinear"
        )[0]
        if index == self.nan_at:
            x[0, 0, 0, 0] = float("nan")
        return x


SPEC = spark_spec(
    "resnet10",
    encoder_kwargs={"block_inplanes": [4, 4, 8, 8], "feed_forward": False},
    width=32,
)
SETTINGS = {
    "max_steps": 6,
    "batch_size": 2,
    "val_every": 2,
    "lr": 3e-3,
    "optim": {"warmup_steps": 2, "weight_decay_end": 0.2},
    "accelerator": "cpu",
    "devices": 1,
    "seed": 5,
    "log_every": 1,
    "progress_bar": False,
    "intensity": {"window": [-1000.0, 1000.0], "mean": 0.2, "std": 0.3},
    "spacing": [3.0, 1.5, 1.5],
    "crop": [64, 64, 64],
}


class Masks(Callback):
    """Keeps the masks of every step and validation run, and what a layer would draw at random."""

    def __init__(self):
        self.train, self.val, self.layers = {}, {}, {}

    def on_fit_start(self, trainer, pl_module):
        def keep(module, args, output):
            kept = self.train if module.training else self.val
            kept.setdefault(trainer.global_step, []).append(output.mask.visible)
            if module.training:
                self.layers[trainer.global_step] = torch.rand(1).item()

        pl_module.spark.register_forward_hook(keep)


def run(out_dir, train=None, spec=SPEC, **changes):
    train = Volumes(12) if train is None else train
    return pretrain(spec, train, Volumes(3, seed=9), out_dir=out_dir, **{**SETTINGS, **changes})


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """An uninterrupted run: (folder, result, dataset)."""
    folder = tmp_path_factory.mktemp("run")
    train = Volumes(12)
    return folder, run(folder, train), train


@pytest.fixture(scope="session")
def helpers():
    """What a test needs for a run of its own."""
    return SimpleNamespace(run=run, Volumes=Volumes, SPEC=SPEC, Masks=Masks)
