"""Crops with their masks, on their way from a store into training."""

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from medspark.data.crops import CropDataset
from medspark.data.sampler import draw_visible
from medspark.data.store import Record, Store, write_array
from medspark.data.windows import Intensity
from medspark.models import build_spark
from medspark.pretrain import loaders
from medspark.pretrain.loaders import CropBatches, Loaders
from medspark.pretrain.order import generator_of

GRID = (2, 2, 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = Store.create(tmp_path_factory.mktemp("crops") / "store")
    rng = np.random.default_rng(0)
    for i in range(3):
        hu = rng.integers(-1000, 1000, (70, 72, 68)).astype(np.int16)
        write_array(store.volume_path(f"v{i}"), hu)
        store.put([Record(f"v{i}", f"v{i}.mha", f"p{i}", size=hu.shape, spacing=(1.0, 1.0, 1.0))])
    return store


def crops(store, length=400, **options):
    options = {"seed": 7, "mask_grid": GRID, "mask_ratio": 0.5, **options}
    return CropDataset(
        store, store.records, (64, 64, 64), Intensity.named("wide"), length=length, **options
    )


class PowerCut(Callback):
    """Ends the run before a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise OSError("the power went")


class Seen(Callback):
    """What the model is given, by step."""

    def __init__(self):
        self.volumes, self.masks = [], []

    def on_fit_start(self, trainer, pl_module):
        pl_module.spark.register_forward_hook(self.keep)

    def keep(self, module, args, output):
        if module.training:
            self.volumes.append(output.volume.clone())
            self.masks.append(output.mask.visible.cpu())


def watched(helpers, folder, store, callbacks=(), **changes):
    seen = Seen()
    spec = {**helpers.SPEC, "cell": 32, "mask_ratio": 0.5}
    return seen, helpers.run(folder, crops(store), spec, callbacks=[seen, *callbacks], **changes)


@pytest.fixture(scope="module")
def whole(store, helpers, tmp_path_factory):
    return watched(helpers, tmp_path_factory.mktemp("whole"), store)


def test_the_model_sees_the_crops_and_their_masks(whole, store):
    seen, _ = whole
    dataset = crops(store)
    expected = torch.stack([dataset[i] for i in range(12)])
    assert torch.equal(torch.cat(seen.volumes), expected)
    masks = torch.cat(seen.masks).reshape(12, *GRID).numpy()
    assert np.array_equal(masks, [draw_visible(7, i, GRID, 0.5) for i in range(12)])
    assert len({mask.tobytes() for mask in masks}) > 3


def test_a_resumed_run_reads_on(whole, store, helpers, tmp_path):
    seen, result = whole
    with pytest.raises(OSError, match="the power went"):
        watched(helpers, tmp_path, store, save_every=1, callbacks=[PowerCut(3)])
    again, resumed = watched(helpers, tmp_path, store, resume="auto")
    assert torch.equal(torch.cat(again.volumes), torch.cat(seen.volumes)[6:])
    a, b = (torch.load(r.last, weights_only=True)["state_dict"] for r in (result, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_workers_change_nothing(whole, store, helpers, tmp_path):
    seen, result = whole
    other, same = watched(helpers, tmp_path, store, num_workers=2)
    assert torch.equal(torch.cat(other.volumes), torch.cat(seen.volumes))
    assert same.metrics["train/loss"] == result.metrics["train/loss"]


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_reads_its_part(store, rank, monkeypatch):
    monkeypatch.setattr(loaders, "place_in_world", lambda: (rank, 2))
    batches = Loaders(crops(store), crops(store), 2, 0).train(1, 3, torch.device("cpu"))
    assert isinstance(batches, CropBatches)
    assert len(batches) == 3
    read = [batch.indices.tolist() for batch in batches]
    assert read == [[4, 5], [8, 9]] if rank == 0 else read == [[6, 7], [10, 11]]


def test_crops_without_masks_get_those_of_the_module(whole, store, helpers, tmp_path):
    seen = Seen()
    helpers.run(tmp_path, crops(store, mask_grid=None), callbacks=[seen], max_steps=2)
    drawn = [generator_of(5, "train", i) for i in range(2)]
    spark = build_spark(helpers.SPEC)
    expected = [spark.draw_mask(torch.empty(1, 1, 64, 64, 64), g).visible for g in drawn]
    assert torch.equal(seen.masks[0], torch.cat(expected))
