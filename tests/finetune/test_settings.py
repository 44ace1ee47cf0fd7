"""Settings that make no sense are refused before anything is read."""

import pytest

from medspark.finetune.settings import Settings, balanced_weights, loss_weights, opening_epoch


def test_balanced_weights_make_every_class_count_alike():
    labels = [0, 0, 0, 1, 0, 0, 2, 2]
    weights = balanced_weights(labels, 3)
    assert weights == pytest.approx([8 / 15, 8 / 3, 8 / 6])
    assert [w * labels.count(c) for c, w in enumerate(weights)] == pytest.approx([8 / 3] * 3)


def test_a_class_without_a_sample_weighs_nothing_special():
    assert balanced_weights([0, 0, 1, 1], 3) == pytest.approx([2 / 3, 2 / 3, 1.0])


def test_loss_weights_follow_the_setting():
    labels = [0, 0, 0, 1]
    assert loss_weights(Settings(), labels, 2) is None
    balanced = loss_weights(Settings(class_weights="balanced"), labels, 2)
    assert balanced == pytest.approx([2 / 3, 2.0])
    assert loss_weights(Settings(class_weights=[1, 3]), labels, 2) == [1.0, 3.0]


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, float("nan")], [1.0, 0.0]])
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(ValueError, match="must be 2 positive numbers"):
        loss_weights(Settings(class_weights=weights), [0, 1], 2)


@pytest.mark.parametrize(
    ("open_at", "epochs", "epoch"),
    [(0.15, 20, 3), (0.5, 4, 2), (1, 2, 1), (10, 70, 10), (0.01, 9, 1)],
)
def test_opening_epoch(open_at, epochs, epoch):
    assert opening_epoch(open_at, epochs) == epoch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "half"}, "linear, knn, full, freeze_then_open"),
        ({"monitor": "accuracy"}, "loss, auc"),
        ({"class_weights": "even"}, "balanced"),
        ({"epochs": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"patience": 0}, "null for off"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0"),
        ({"layer_decay": 1.5}, "layer_decay is 1.5"),
        ({"label_smoothing": 1.0}, "label_smoothing 1.0"),
        ({"mode": "freeze_then_open", "open_at": 20, "epochs": 20}, "open_at=20"),
        ({"mode": "freeze_then_open", "epochs": 1}, "leaves no epoch"),
        ({"mode": "freeze_then_open", "open_at": 0}, "open_at=0"),
    ],
)
def test_impossible_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**options)


def test_neighbours_are_standardised_unless_told_otherwise():
    assert Settings(mode="knn").standardises
    assert not Settings(mode="knn", standardise=False).standardises
    assert not Settings(mode="linear").standardises
    assert Settings(mode="linear", standardise=True).standardises
    assert not Settings(mode="full", standardise=True).standardises


def test_learning_rate_of_each_mode():
    assert Settings(mode="linear").peak_lr == 1e-2
    assert Settings(mode="freeze_then_open").peak_lr == Settings(mode="full").peak_lr == 1e-3
    assert Settings(mode="linear", lr=0.5).peak_lr == 0.5
