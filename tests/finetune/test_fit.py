"""Choice of the best epoch, and when to stop waiting for a better one."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from medspark.finetune.fit import Best


def played(best: Best, values: list[float], frozen_until: int = 0) -> list[int]:
    """Epochs that are trained when the validation gives these values."""
    module = nn.Linear(1, 1, bias=False)
    module.mode = "freeze_then_open" if frozen_until else "full"
    done = []
    for epoch, value in enumerate(values):
        module.frozen = epoch < frozen_until
        nn.init.constant_(module.weight, float(epoch))
        metrics = {f"val/{best.monitor}": torch.tensor(value)}
        trainer = SimpleNamespace(callback_metrics=metrics, current_epoch=epoch, should_stop=False)
        best.on_validation_end(trainer, module)
        done.append(epoch)
        if trainer.should_stop:
            break
    return done


def test_lowest_loss_and_its_weights_are_kept():
    best = Best("loss", None)
    assert played(best, [1.0, 0.5, 0.7, 0.5, 0.9]) == [0, 1, 2, 3, 4]
    assert (best.epoch, best.value) == (1, pytest.approx(0.5))
    assert best.state["weight"].item() == 1.0


def test_highest_auc_is_kept():
    best = Best("auc", None)
    played(best, [0.6, 0.9, 0.8, 0.9])
    assert (best.epoch, best.value) == (1, pytest.approx(0.9))


def test_patience_counts_from_the_best():
    assert played(Best("loss", 2), [1.0, 1.1, 0.9, 0.95, 0.9, 0.1]) == [0, 1, 2, 3, 4]
    assert played(Best("loss", 1), [1.0, 1.0, 0.5]) == [0, 1]


def test_epochs_before_the_opening_do_not_count():
    values = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert played(Best("loss", 2), values, frozen_until=3) == [0, 1, 2, 3, 4]


def test_auc_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="monitor=loss"):
        played(Best("auc", None), [math.nan])
