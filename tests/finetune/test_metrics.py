"""Metrics against counts made by hand."""

import math

import pytest
import torch

from medspark.finetune.metrics import classification_metrics


def two_columns(positive: list[float]) -> torch.Tensor:
    p = torch.tensor(positive, dtype=torch.float64)
    return torch.stack([1 - p, p], dim=1)


def pair_auc(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """Share of (positive, negative) pairs in the right order; a tie is half (Mann-Whitney)."""
    difference = scores[positive][:, None] - scores[~positive][None, :]
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def test_binary_auc_counts_pairs_and_halves_ties():
    labels = torch.tensor([0, 0, 1, 1, 1])
    found = classification_metrics(two_columns([0.1, 0.6, 0.6, 0.9, 0.3]), labels)
    # pairs (1 over 0): 0.6>0.1, 0.6=0.6, 0.9>0.1, 0.9>0.6, 0.3>0.1, 0.3<0.6 -> 4.5 of 6
    assert found["auc"] == pytest.approx(4.5 / 6)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["balanced_accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert (found["n"], found["classes_present"]) == (5, 2)


def test_multiclass_auc_is_the_mean_of_one_versus_rest():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(60, 4, generator=generator, dtype=torch.float64).softmax(dim=1)
    labels = torch.randint(0, 4, (60,), generator=generator)
    expected = sum(pair_auc(probabilities[:, c], labels == c) for c in range(4)) / 4
    assert classification_metrics(probabilities, labels)["auc"] == pytest.approx(expected, abs=1e-6)


def test_absent_class_is_left_out_and_told():
    probabilities = torch.tensor(
        [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1], [0.2, 0.3, 0.5]]
    )
    labels = torch.tensor([0, 1, 1, 0])
    found = classification_metrics(probabilities, labels)
    aucs = [pair_auc(probabilities[:, c], labels == c) for c in (0, 1)]
    assert found["auc"] == pytest.approx(sum(aucs) / 2)
    assert found["balanced_accuracy"] == pytest.approx(0.5)
    assert found["classes_present"] == 2


def test_one_class_only_has_no_auc():
    found = classification_metrics(two_columns([0.2, 0.8]), torch.tensor([1, 1]))
    assert math.isnan(found["auc"])
    assert found["balanced_accuracy"] == 0.5


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (two_columns([0.5, 0.5]), torch.tensor([0]), "2 rows of probabilities for 1 labels"),
        (two_columns([0.5, 0.5]), torch.tensor([0, 2]), "labels must lie in 0..1"),
        (two_columns([math.nan, 0.5]), torch.tensor([0, 1]), "NaN"),
        (torch.zeros(3), torch.tensor([0, 1, 1]), "expected probabilities"),
    ],
)
def test_bad_input_is_named(probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(probabilities, labels)
