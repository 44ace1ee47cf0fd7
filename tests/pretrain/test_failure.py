"""A run that diverges stops where it did, says why, and leaves what is needed to look into it."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from medspark.models import build_spark
from medspark.sparse import BlockMask


def load(path):
    return torch.load(path, weights_only=True)


def same_weights(a, b):
    """Weights, not the running statistics, which the forward pass of the failed step has moved."""
    keys = [k for k in a if not k.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    return all(torch.equal(a[k], b[k]) for k in keys)


def test_nan_in_a_sample(tmp_path, helpers):
    train = helpers.Volumes(24, nan_at=10)
    with pytest.raises(FloatingPointError) as error:
        helpers.run(tmp_path, train, accumulate=2)
    text = str(error.value)
    assert "the loss is nan at step 2 (samples 8 to 11 on process 0)" in text
    assert "Sample 10 holds 1 values that are not finite: check its volume in the store" in text
    path = tmp_path / "failure" / "step_000002_rank_0.pt"
    assert str(path) in text
    state = load(path)
    assert (state["step"], state["samples"]) == (2, [[8, 9], [10, 11]])
    assert torch.isfinite(torch.tensor(state["losses"])).tolist() == [True, False]
    assert torch.equal(state["batches"][0][1], train[9])
    last = load(tmp_path / "checkpoints" / "last.ckpt")  # of the validation run after step 2
    assert same_weights(last["state_dict"], state["state_dict"])
    assert (
        state["optimizer_states"][0]["state"].keys() == last["optimizer_states"][0]["state"].keys()
    )


def test_saved_state_repeats_the_step(tmp_path, helpers):
    with pytest.raises(FloatingPointError):
        helpers.run(tmp_path, helpers.Volumes(24, nan_at=10), accumulate=2)
    state = load(tmp_path / "failure" / "step_000002_rank_0.pt")
    spark = build_spark(state["hyper_parameters"]["spec"]).train()
    spark.load_state_dict({k.removeprefix("spark."): v for k, v in state["state_dict"].items()})
    output = spark(state["batches"][0], mask=BlockMask(state["visible"][0]))
    assert output.loss.item() == pytest.approx(state["losses"][0], rel=1e-5)


class Poison(Callback):
    """Makes one gradient infinite at step 1, behind a loss that is finite."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 1:
            pl_module.spark.decoder.head.weight.grad.fill_(float("inf"))


class Explode(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1:
            pl_module.spark.decoder.head.weight.data.fill_(float("nan"))


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_infinite_gradient(tmp_path, helpers, name):
    optim = {"name": name}
    with pytest.raises(FloatingPointError) as error:
        helpers.run(tmp_path, callbacks=[Poison()], optim=optim, val_every=1)
    text = str(error.value)
    assert "the gradient is not in spark.decoder.head.weight at step 1" in text
    assert "Batch and weights are finite" in text
    assert "lower optim.lr" in text
    state = load(tmp_path / "failure" / "step_000001_rank_0.pt")
    assert state["bad_gradients"] == ["spark.decoder.head.weight"]
    last = load(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    assert same_weights(last, state["state_dict"])
    assert all(torch.isfinite(v).all() for v in last.values())


def test_weights_that_were_lost_before(tmp_path, helpers):
    with pytest.raises(
        FloatingPointError, match=r"Weights were not finite .*decoder\.head\.weight"
    ):
        helpers.run(tmp_path, callbacks=[Explode()])


def test_16_bit_floats_search_for_their_loss_scale(tmp_path, helpers, monkeypatch):
    """With a loss scale an infinite gradient is no failure: the scaler leaves that step out."""
    from medspark.pretrain.failure import check_gradients

    class Module:
        class trainer:
            class precision_plugin:
                scaler = object()

    check_gradients(Module(), [], torch.tensor(float("inf")))
