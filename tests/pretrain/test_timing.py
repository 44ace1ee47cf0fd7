"""Delays put into one part of a step show in the time of that part."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from medspark.pretrain import timing
from medspark.pretrain.summary import read_history

DELAY = 0.3


class Clock:
    """Stands still except where somebody sleeps, so that no other load shows in a time."""

    now = 0.0

    def sleep(self, seconds):
        Clock.now += seconds


time = Clock()


@pytest.fixture(autouse=True)
def _clock(monkeypatch):
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: Clock.now))


class Delay(torch.autograd.Function):
    """The identity, slow in the backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(DELAY)
        return gradient


class Slow(Callback):
    """Sleeps in the forward and backward pass of encoder or decoder, or before the update."""

    def __init__(self, where):
        self.where = where

    def on_train_start(self, trainer, pl_module):
        if self.where == "optimiser":
            return
        spark = pl_module.spark

        def forward(module, args):
            time.sleep(DELAY)

        def backward(module, args, output):
            if hasattr(output, "features"):
                return output.with_features(Delay.apply(output.features))
            return Delay.apply(output)

        name = {"encoder": spark.encoder.layer2, "decoder": spark.decoder.blocks[1]}
        name[self.where].register_forward_pre_hook(forward)
        name[self.where].register_forward_hook(backward)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.where == "optimiser":
            time.sleep(2 * DELAY)


@pytest.mark.parametrize("where", ["data", "encoder", "decoder", "optimiser"])
def test_a_delay_is_found_where_it_is(tmp_path, helpers, where):
    train, callbacks = helpers.Volumes(12), []
    if where == "data":
        read = train.__getitem__

        class SlowVolumes(helpers.Volumes):
            def __getitem__(self, index):
                time.sleep(DELAY)  # two samples per batch
                return read(index)

        train = SlowVolumes(12)
    else:
        callbacks.append(Slow(where))
    helpers.run(tmp_path, train, max_steps=2, callbacks=callbacks)
    history = read_history(tmp_path)
    parts = {p: history[f"time/{p}"] for p in ("data", "encoder", "decoder", "optimiser")}
    total = history["time/step"]
    assert len(total) == 2
    # The first step has no earlier one to wait from.
    for step in (1,) if where == "data" else (0, 1):
        assert total[step] == pytest.approx(2 * DELAY)
        expected = {part: 2 * DELAY * (part == where) for part in parts}
        assert {part: values[step] for part, values in parts.items()} == pytest.approx(expected)


def test_accumulated_parts_add_up(tmp_path, helpers):
    helpers.run(
        tmp_path, helpers.Volumes(12), max_steps=2, accumulate=2, callbacks=[Slow("encoder")]
    )
    history = read_history(tmp_path)
    assert list(history["time/encoder"].values()) == pytest.approx([4 * DELAY] * 2)
    assert list(history["time/step"].values()) == pytest.approx([4 * DELAY] * 2)


def test_only_logged_steps_are_timed(tmp_path, helpers):
    helpers.run(tmp_path, helpers.Volumes(12), max_steps=5, log_every=2)
    assert sorted(read_history(tmp_path)["time/step"]) == [1, 3]
