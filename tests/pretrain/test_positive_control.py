"""A small version of `benchmarks/bench_positive_control.py`: pre-training helps where it must.

One pre-training seed and two labelled sets; the margins are wide: the benchmark's record shows what
is to be expected after twice as many steps (SparK 0.7 to 1, everything else near 0.5).
"""

import statistics

import pytest

from medspark.data.control import SPACING, WINDOW, FibrePhantoms, write_control_task
from medspark.data.tasks import load_task
from medspark.data.windows import Intensity
from medspark.finetune.run import finetune
from medspark.models import spark_spec
from medspark.pretrain.export import load_encoder
from medspark.pretrain.run import pretrain

STEPS, BATCH = 200, 16
SPEC = spark_spec(
    "resnet10",
    encoder_kwargs={"block_inplanes": [16, 32, 64, 128], "no_max_pool": True},
    strides=[2, 4, 8, 16],
    width=32,
    cell=8,
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Ten labelled phantoms each, and the same sixty to test on."""
    folder = tmp_path_factory.mktemp("control")
    return [
        load_task(write_control_task(folder / str(k), {"train": (1000 + k, 10), "test": (0, 60)}))
        for k in range(2)
    ]


def encoder(folder, shuffled):
    result = pretrain(
        SPEC,
        FibrePhantoms(100, STEPS * BATCH, shuffled=shuffled),
        FibrePhantoms(1, 16, shuffled=shuffled),
        max_steps=STEPS,
        batch_size=BATCH,
        out_dir=folder,
        lr=2e-3,
        optim={"warmup_steps": 10},
        accelerator="cpu",
        devices=1,
        val_every=STEPS,
        intensity=Intensity.named(WINDOW).as_dict(),
        spacing=[SPACING] * 3,
        progress_bar=False,
    )
    return load_encoder(result.last)[0], result.metrics["val/ratio"]


def mean_auc(tasks, start, folder):
    found = [
        finetune(
            task,
            start,
            out_dir=folder / str(k),
            intensity=Intensity.named(WINDOW),
            scratch=SPEC["encoder"],
            epochs=40,
            batch_size=10,
            augment=False,
            monitor="last",
            seed=k,
            accelerator="cpu",
            progress=False,
            pictures=False,
            draws=1,
        ).metrics["test"]["auc"]
        for k, task in enumerate(tasks)
    ]
    return statistics.fmean(found)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pretraining_helps_where_it_must_and_only_there(tasks, tmp_path):
    learned, ratio = encoder(tmp_path / "spark", shuffled=False)
    nothing, flat = encoder(tmp_path / "shuffled", shuffled=True)
    assert ratio < 0.95 < 0.99 < flat  # loss over that of the best constant
    auc = {
        name: mean_auc(tasks, start, tmp_path / name)
        for name, start in (("spark", learned), ("shuffled", nothing), ("scratch", None))
    }
    assert auc["spark"] > max(auc["scratch"], auc["shuffled"]) + 0.1, auc
    assert max(auc["scratch"], auc["shuffled"]) < 0.7, auc
