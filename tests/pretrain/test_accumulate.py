"""Accumulated batches are the joint batch where norms allow; bfloat16 stays close to float32."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from medspark.models import spark_spec
from medspark.pretrain.summary import read_history

from .conftest import Volumes

# Norms per sample in the encoder and before densifying; the decoder's batch norms are frozen below.
PER_SAMPLE = spark_spec(
    "resnet10",
    encoder_kwargs={
        "block_inplanes": [4, 4, 8, 8], "feed_forward": False, "norm": ["instance", {"affine": True}]
    },
    width=32,
    cell=16,
    norm="instance",
)  # fmt: skip


class Half(Volumes):
    """The front half of each volume: float64 takes its time."""

    def __getitem__(self, index):
        return super().__getitem__(index)[:, :, :32]


class FrozenBatchNorm(Callback):
    """Batch norms use their running statistics, which then do not depend on the batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for module in pl_module.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.eval()


def weights(result):
    return torch.load(result.last, weights_only=True)["state_dict"]


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_accumulated_batches_are_the_joint_batch(tmp_path, helpers, name):
    optim = {"name": name, "drop_path": 0.3, "warmup_steps": 1, "lr_batch": 4}
    common = {"precision": "64-true", "optim": optim, "max_steps": 2, "val_every": 2}
    common["gradient_clip"] = 1e-6  # frozen norms of an untrained decoder leave small gradients
    results, logs = [], []
    for accumulate, batch in ((1, 4), (2, 2)):
        out = tmp_path / str(accumulate)
        train = Half(8)
        results.append(
            weights(
                helpers.run(
                    out, train, PER_SAMPLE, accumulate=accumulate, batch_size=batch,
                    callbacks=[FrozenBatchNorm()], **common,
                )
            )
        )  # fmt: skip
        assert train.read == list(range(8))
        logs.append(read_history(out))
    for other, log in zip(results[1:], logs[1:], strict=True):
        for key, value in results[0].items():
            assert torch.allclose(value, other[key], rtol=1e-8, atol=1e-10), key
        for key in ("train/loss", "train/grad_norm", "train/lr", "val/loss"):
            assert log[key] == pytest.approx(logs[0][key], rel=1e-6), key
    assert min(logs[0]["train/grad_norm"].values()) > 1e-6  # so that clipping had something to do


def test_bfloat16_is_close_to_float32(tmp_path, helpers):
    plain = helpers.run(tmp_path / "32", max_steps=4, val_every=4)
    mixed = helpers.run(tmp_path / "16", max_steps=4, val_every=4, precision="bf16-mixed")
    a, b = (read_history(tmp_path / n) for n in ("32", "16"))
    assert b["train/loss"] == pytest.approx(a["train/loss"], rel=0.02)
    assert b["train/loss"] != a["train/loss"]
    assert b["train/grad_norm"][0] == pytest.approx(a["train/grad_norm"][0], rel=0.1)
    assert all(v.dtype == torch.float32 for v in weights(mixed).values() if v.is_floating_point())
    assert weights(plain).keys() == weights(mixed).keys()
