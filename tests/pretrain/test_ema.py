"""The average of the weights: its numbers, its way into checkpoints and out of them."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from medspark.pretrain.ema import WeightAverage
from medspark.pretrain.export import export_encoder


class Weights(Callback):
    """The state after every step, beginning with the start."""

    def __init__(self):
        self.states = {}

    def on_train_start(self, trainer, pl_module):
        self.keep(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.keep(trainer, pl_module)

    def keep(self, trainer, pl_module):
        state = {k: v.clone().double() for k, v in pl_module.state_dict().items()}
        self.states.setdefault(trainer.global_step, state)  # not the batches of the next step


def test_average_is_that_of_all_steps(tmp_path, helpers):
    seen = Weights()
    result = helpers.run(
        tmp_path, helpers.Volumes(24), accumulate=2, ema_decay=0.5, callbacks=[seen]
    )
    content = torch.load(result.last, weights_only=True)
    assert sorted(seen.states) == list(range(7))
    for key, value in content["ema_state_dict"].items():
        average = seen.states[0][key]
        for n in range(1, 7):
            d = min(0.5, n / (n + 9))  # .1, .18, .25, ... .4: the cap is not reached in six steps
            average = d * average + (1 - d) * seen.states[n][key]
        if not value.is_floating_point():
            assert torch.equal(value, content["state_dict"][key]), key
        else:
            assert torch.allclose(value.double(), average, rtol=1e-4, atol=1e-7), key
    assert content["ema_state_dict"].keys() == content["state_dict"].keys()


def test_cap_of_the_decay():
    class Trainer:
        global_step = 0

    net = torch.nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(1.0)
    average = WeightAverage(0.25)
    average.on_train_start(Trainer, net)
    net.weight.data.fill_(2.0)
    for step, expected in ((9, 1.75), (9, 1.75), (10, 1.9375)):
        Trainer.global_step = step
        average.on_train_batch_end(Trainer, net, None, None, 0)
        assert average.average["weight"].item() == expected


def test_exported_when_asked(tmp_path, helpers):
    result = helpers.run(tmp_path, ema_decay=0.9, max_steps=2)
    content = torch.load(result.last, weights_only=True)
    for which, key in (("last", "state_dict"), ("ema", "ema_state_dict")):
        export_encoder(result.last, tmp_path / f"{which}.pt", weights=which)
        weights = torch.load(tmp_path / f"{which}.pt", weights_only=True)
        for name, value in weights.items():
            assert torch.equal(value, content[key][f"spark.pyramid.encoder.{name}"])
    a, b = (torch.load(tmp_path / f"{w}.pt", weights_only=True) for w in ("last", "ema"))
    assert not torch.equal(a["conv1.weight"], b["conv1.weight"])


def test_what_cannot_be(finished, tmp_path):
    with pytest.raises(ValueError, match="holds no average of weights"):
        export_encoder(finished[1].last, tmp_path / "x.pt", weights="ema")
    with pytest.raises(ValueError, match="weights must be one of last, ema, not 'mean'"):
        export_encoder(finished[1].last, tmp_path / "x.pt", weights="mean")
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), not 1"):
        WeightAverage(1.0)
