"""Metrics against counts made by hand."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from medspark.finetune.metrics import classification_metrics, reliability_bins


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


def step_ap(scores: torch.Tensor, positive: torch.Tensor) -> float:
    """Mean over the positives of the precision among all samples that score at least as high."""
    return float(
        np.mean([float(positive[scores >= s].double().mean()) for s in scores[positive].tolist()])
    )


def random_split(n, n_classes, seed, present=None, digits=None):
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.tensor(present if present is not None else range(n_classes))
    labels = allowed[torch.randint(0, len(allowed), (n,), generator=generator)]
    logits = torch.randn(n, n_classes, generator=generator, dtype=torch.float64)
    logits[torch.arange(n), labels] += 1
    probabilities = logits.softmax(dim=1)
    if digits is not None:  # ties; the last class takes what rounding left
        probabilities[:, :-1] = probabilities[:, :-1].round(decimals=digits)
        probabilities[:, -1] = (1 - probabilities[:, :-1].sum(dim=1)).abs()
    return probabilities, labels


def test_average_precision_by_hand():
    found = classification_metrics(
        two_columns([0.1, 0.6, 0.6, 0.9, 0.3]), torch.tensor([0, 0, 1, 1, 1])
    )
    # 0.9: 1 of 1; 0.6: 2 of 3 (a tie is called as a whole); 0.3: 3 of 4.
    assert found["ap"] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)


@pytest.mark.parametrize("present", [None, [0, 1, 3]])
def test_multiclass_ap_is_the_mean_over_the_classes_present(present):
    probabilities, labels = random_split(70, 4, 1, present, digits=2)
    classes = labels.unique().tolist()
    expected = np.mean([step_ap(probabilities[:, c], labels == c) for c in classes])
    assert classification_metrics(probabilities, labels)["ap"] == pytest.approx(expected, abs=1e-6)


def test_macro_f1_counts_a_class_that_is_only_predicted_and_leaves_out_the_others():
    probabilities = torch.eye(4)[[0, 0, 1, 2]]
    found = classification_metrics(probabilities, torch.tensor([0, 1, 1, 1]))
    # Class 0: TP 1, FP 1. Class 1: TP 1, FN 2. Class 2: predicted once, no sample. Class 3: none.
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)


def test_ece_by_hand():
    # Top 0.62 (right), 0.66 (wrong) share (9/15, 10/15]; 0.95 (right) and 1.0 (wrong) the last bin.
    found = classification_metrics(two_columns([0.62, 0.34, 0.95, 1.0]), torch.tensor([1, 1, 1, 0]))
    assert found["ece"] == pytest.approx((2 * abs(0.5 - 0.64) + 2 * abs(0.5 - 0.975)) / 4)


def test_bins_include_their_upper_edge_and_every_sample():
    probabilities = two_columns([0.5, 0.75, 0.7501, 1.0])
    bins = reliability_bins(probabilities, torch.tensor([0, 1, 0, 1]), n_bins=4)
    assert bins.counts.tolist() == [0, 1, 1, 2]
    np.testing.assert_allclose(bins.confidence[1:], [0.5, 0.75, (0.7501 + 1) / 2])
    np.testing.assert_allclose(bins.accuracy[1:], [1, 1, 0.5])
    assert np.isnan(bins.confidence[0]) and np.isnan(bins.accuracy[0])
    assert bins.edges.tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_ece_agrees_with_torchmetrics_inside_the_bins():
    probabilities, labels = random_split(500, 5, 2)
    expected = multiclass_calibration_error(probabilities, labels, 5, n_bins=15)
    assert classification_metrics(probabilities, labels)["ece"] == pytest.approx(float(expected))


@pytest.mark.parametrize(("n", "expected"), [(96, 0.09), (1000, 0.03)])
def test_ece_of_a_calibrated_classifier_is_as_biased_as_documented(n, expected):
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(60):
        top = 0.5 + 0.5 * torch.rand(n, generator=generator, dtype=torch.float64)
        right = torch.rand(n, generator=generator, dtype=torch.float64) < top
        found.append(reliability_bins(torch.stack([1 - top, top], dim=1), right.long()).ece)
    assert np.mean(found) == pytest.approx(expected, abs=0.006)


def test_brier_and_nll_by_hand():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64)
    found = classification_metrics(probabilities, torch.tensor([0, 1]))
    brier = (0.3**2 + 0.2**2 + 0.1**2 + 0.3**2 + 0.7**2 + 0.4**2) / 2
    assert found["brier"] == pytest.approx(brier)
    assert found["nll"] == pytest.approx(-(math.log(0.7) + math.log(0.3)) / 2)


def test_a_certain_error_has_infinite_nll():
    found = classification_metrics(two_columns([0.0, 0.5]), torch.tensor([1, 0]))
    assert found["nll"] == math.inf and found["brier"] == pytest.approx((2 + 0.5) / 2)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_what_one_class_leaves_undefined(n_classes):
    probabilities, labels = random_split(12, n_classes, 3, present=[1])
    found = classification_metrics(probabilities, labels)
    assert math.isnan(found["auc"]) and math.isnan(found["ap"])
    finite = set(found) - {"auc", "ap"}
    assert all(math.isfinite(found[name]) for name in finite) and found["classes_present"] == 1


def test_without_a_sample_nothing_is_defined():
    found = classification_metrics(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    assert (found.pop("n"), found.pop("classes_present")) == (0, 0)
    assert len(found) == 8 and all(math.isnan(value) for value in found.values())


def test_half_precision_rows_are_taken():
    probabilities, labels = random_split(50, 9, 4)
    exact = classification_metrics(probabilities, labels)
    rounded = classification_metrics(probabilities.bfloat16(), labels)
    assert rounded["brier"] == pytest.approx(exact["brier"], abs=5e-3)


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (two_columns([0.5, 0.5]), torch.tensor([0]), "2 rows of probabilities for 1 labels"),
        (two_columns([0.5, 0.5]), torch.tensor([0, 2]), "labels must lie in 0..1"),
        (two_columns([math.nan, 0.5]), torch.tensor([0, 1]), "NaN"),
        (torch.zeros(3), torch.tensor([0, 1, 1]), "expected probabilities"),
        (two_columns([0.5, 0.5]), torch.tensor([0.0, 1.0]), "labels must be integers"),
        (torch.tensor([[0.5, 0.5], [-1.2, 2.2]]), torch.tensor([0, 1]), "row 1 is no set"),
        (torch.tensor([[0.5, 0.6]]), torch.tensor([0]), "apply softmax to logits"),
    ],
)
def test_bad_input_is_named(probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(probabilities, labels)
