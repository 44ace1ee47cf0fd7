"""Weighted metrics against plain ones of the same resample; intervals against known truths."""

import math
import time
from statistics import NormalDist

import numpy as np
import pytest
import torch

from medspark.finetune.bootstrap import (
    METRICS,
    Interval,
    paired_difference,
    patient_intervals,
    weighted_metrics,
)
from medspark.finetune.metrics import classification_metrics

NORMAL = NormalDist()


def random_split(n, n_classes, seed, digits=None):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    logits = rng.normal(size=(n, n_classes)) + 1.0 * np.eye(n_classes)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if digits is not None:  # ties: whole parts of 10 ** digits, the last class takes the rest
        probabilities = np.floor(probabilities * 10**digits) / 10**digits
        probabilities[:, -1] += 1 - probabilities.sum(axis=1)
    return torch.from_numpy(probabilities), torch.from_numpy(labels)


def clustered_scores(n_patients, samples, auc, rng):
    """Patients of one class each, half of the variance between them; the AUC is exactly `auc`."""
    patients = np.repeat(np.arange(n_patients), samples)
    labels = patients % 2
    between, within = rng.normal(size=n_patients)[patients], rng.normal(size=len(patients))
    score = math.sqrt(2) * NORMAL.inv_cdf(auc) * labels + math.sqrt(0.5) * (between + within)
    p = torch.from_numpy(1 / (1 + np.exp(-score)))
    return torch.stack([1 - p, p], dim=1), torch.from_numpy(labels), patients


@pytest.mark.parametrize("n_classes", [2, 3, 6])
@pytest.mark.parametrize("digits", [None, 1])
def test_weighted_metrics_equal_plain_ones_of_the_repeated_samples(n_classes, digits):
    probabilities, labels = random_split(24, n_classes, seed=n_classes, digits=digits)
    rng = np.random.default_rng(0)
    patients = rng.integers(0, 5, 24)
    weights = rng.multinomial(5, [0.2] * 5, size=40)[:, patients]
    found = weighted_metrics(probabilities.numpy(), labels.numpy(), weights)
    undefined = 0
    for d, repeats in enumerate(torch.from_numpy(weights)):
        index = torch.arange(24).repeat_interleave(repeats)
        plain = classification_metrics(probabilities[index], labels[index])
        for name in METRICS:
            undefined += math.isnan(plain[name])
            assert found[name][d] == pytest.approx(plain[name], abs=2e-6, nan_ok=True), (name, d)
    assert undefined < 40


def test_draws_without_a_class_are_left_out_as_in_the_plain_metrics():
    probabilities, labels = random_split(12, 3, seed=1)
    weights = np.stack([labels == 0, labels != 2, np.zeros(12)]).astype(int)
    found = weighted_metrics(probabilities.numpy(), labels.numpy(), weights)
    for d, mask in enumerate([labels == 0, labels != 2]):
        plain = classification_metrics(probabilities[mask], labels[mask])
        for name in METRICS:
            assert found[name][d] == pytest.approx(plain[name], abs=2e-6, nan_ok=True)
    assert math.isnan(found["auc"][0]) and math.isnan(found["ap"][0])
    assert all(math.isnan(found[name][2]) for name in METRICS)


def test_the_interval_is_that_of_a_loop_over_drawn_patients():
    probabilities, labels = random_split(40, 3, seed=2)
    patients = np.random.default_rng(1).integers(0, 9, 40)
    rng = np.random.default_rng(2)
    values = {name: [] for name in METRICS}
    for _ in range(400):
        drawn = rng.integers(0, 9, 9)
        index = torch.from_numpy(np.concatenate([np.flatnonzero(patients == p) for p in drawn]))
        plain = classification_metrics(probabilities[index], labels[index])
        for name in METRICS:
            values[name].append(plain[name])
    found = patient_intervals(probabilities, labels, patients, draws=8000, level=0.8)
    for name in METRICS:
        expected = np.quantile(values[name], [0.1, 0.9])
        assert [found[name].low, found[name].high] == pytest.approx(expected, abs=0.03), name
        assert found[name].patients == 9


def test_three_patients_give_the_quantiles_of_all_27_draws():
    """Each patient has one sample right or wrong, of either class: accuracy of every draw is known."""
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8]] * 2 + [[0.3, 0.7], [0.6, 0.4]])
    labels = torch.tensor([0, 1] * 3)  # patients a and b are right on both, c is wrong on both
    found = patient_intervals(probabilities, labels, list("aabbcc"), draws=20000, level=0.9)
    # Share of c in a draw is 0, 1/3, 2/3, 3/3 with probability 8, 12, 6, 1 of 27.
    assert found["balanced_accuracy"] == Interval(pytest.approx(1 / 3), 1.0, 20000, 3)
    wider = patient_intervals(probabilities, labels, list("aabbcc"), draws=20000, level=0.95)
    assert wider["balanced_accuracy"].low == 0.0  # 1 / 27 is more than 2.5 %


def test_only_draws_with_the_metric_are_counted():
    probabilities = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3], [0.2, 0.8]])
    found = patient_intervals(probabilities, torch.tensor([0, 0, 1, 1]), list("abcd"), draws=4000)
    # Both classes are in a draw of four but for the 2 × 16 of 256 that are of one class.
    assert found["auc"].draws == found["ap"].draws == pytest.approx(4000 * 224 / 256, rel=0.02)
    assert found["balanced_accuracy"].draws == found["macro_f1"].draws == 4000
    apart = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.2, 0.8]])
    found = patient_intervals(apart, torch.tensor([0, 0, 1, 1]), list("abcd"), draws=400)
    assert found["auc"].low == found["auc"].high == 1  # those left out count as nothing, not as 0


def test_one_patient_or_none_has_no_interval():
    probabilities, labels = random_split(10, 2, seed=3)
    nothing = Interval(
        pytest.approx(math.nan, nan_ok=True), pytest.approx(math.nan, nan_ok=True), 0, 1
    )
    assert patient_intervals(probabilities, labels, ["a"] * 10)["auc"] == nothing
    none = patient_intervals(probabilities[:0], labels[:0], [])["auc"]
    assert math.isnan(none.low) and (none.draws, none.patients) == (0, 0)
    one_class = patient_intervals(probabilities, torch.ones(10).long(), list("abcdefghij"))
    assert math.isnan(one_class["auc"].high) and one_class["auc"].draws == 0


def test_same_seed_same_interval_in_any_order_and_with_any_names():
    probabilities, labels = random_split(30, 3, seed=4)
    patients = np.random.default_rng(3).integers(0, 8, 30)
    first = patient_intervals(probabilities, labels, patients, draws=300, seed=5)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    names = [f"patient-{patients[i]}" for i in order]
    again = patient_intervals(probabilities[order], labels[order], names, draws=300, seed=5)
    for name in METRICS:
        assert vars(again[name]) == pytest.approx(vars(first[name]))
    tensor = patient_intervals(probabilities, labels, torch.from_numpy(patients), draws=300, seed=5)
    assert tensor == first
    other = patient_intervals(probabilities, labels, patients, draws=300, seed=6)
    assert other["auc"] != first["auc"]


def test_drawing_in_parts_changes_nothing(monkeypatch):
    probabilities, labels = random_split(30, 3, seed=4)
    patients = np.arange(30) % 8
    whole = patient_intervals(probabilities, labels, patients, draws=300)
    monkeypatch.setattr("medspark.finetune.bootstrap._ELEMENTS", 1000)
    assert patient_intervals(probabilities, labels, patients, draws=300) == whole


def coverage(n_patients, samples, repetitions, by_patient=True):
    rng = np.random.default_rng(0)
    hits = 0
    for r in range(repetitions):
        probabilities, labels, patients = clustered_scores(n_patients, samples, 0.75, rng)
        units = patients if by_patient else np.arange(len(patients))
        found = patient_intervals(probabilities, labels, units, draws=200, seed=r)["auc"]
        hits += found.low <= 0.75 <= found.high
    return hits / repetitions


def test_coverage_is_as_documented():
    """Two standard errors of 300 repetitions are 0.04 at 0.86 and 0.03 at 0.94."""
    assert coverage(8, 12, 300) == pytest.approx(0.86, abs=0.045)
    assert coverage(40, 4, 300) == pytest.approx(0.94, abs=0.035)


def test_samples_taken_for_independent_would_cover_far_less():
    assert coverage(8, 12, 150, by_patient=False) < 0.65


def test_2000_draws_take_less_than_a_second():
    probabilities, labels = random_split(96, 2, seed=6)
    start = time.perf_counter()
    patient_intervals(probabilities, labels, np.repeat(np.arange(8), 12), draws=2000)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("metric", METRICS)
def test_paired_difference_is_taken_draw_by_draw(metric):
    a, labels = random_split(40, 3, seed=7)
    b = (a + random_split(40, 3, seed=8)[0]) / 2
    patients = np.arange(40) % 10
    differences = []
    for counts in np.random.default_rng(1).multinomial(10, [0.1] * 10, size=60):
        index = torch.arange(40).repeat_interleave(torch.from_numpy(counts[patients]))
        one, two = (classification_metrics(x[index], labels[index])[metric] for x in (a, b))
        differences.append(one - two)
    found = paired_difference(a, b, labels, patients, metric, draws=60, seed=1)
    expected = np.quantile(differences, [0.025, 0.975])
    assert [found.low, found.high] == pytest.approx(expected, abs=2e-6)
    plain = [classification_metrics(x, labels)[metric] for x in (a, b)]
    assert found.estimate == pytest.approx(plain[0] - plain[1])
    assert (found.draws, found.patients) == (60, 10)
    swapped = paired_difference(b, a, labels, patients, metric, draws=60, seed=1)
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))


def test_a_classifier_does_not_differ_from_itself():
    probabilities, labels = random_split(40, 2, seed=7)
    found = paired_difference(probabilities, probabilities, labels, np.arange(40) % 10)
    assert (found.low, found.high, found.estimate) == (0, 0, 0)


def test_pairing_cancels_what_is_common_to_both():
    rng = np.random.default_rng(0)
    probabilities, labels, patients = clustered_scores(20, 6, 0.75, rng)
    noisy = (probabilities[:, 1].logit() + 0.3 * torch.from_numpy(rng.normal(size=120))).sigmoid()
    other = torch.stack([1 - noisy, noisy], dim=1)
    difference = paired_difference(probabilities, other, labels, patients)
    single = patient_intervals(probabilities, labels, patients)["auc"]
    assert difference.high - difference.low < (single.high - single.low) / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patients": list("abc")}, "4 samples, but patients of shape"),
        ({"patients": ["a", None, "b", "c"]}, "none of them missing"),
        ({"patients": [1.0, 2.0, math.nan, 3.0]}, "none of them missing"),
        ({"draws": 0}, "draws must be positive"),
        ({"level": 95}, "level within"),
        ({"labels": torch.tensor([0, 1, 2, 1])}, "labels must lie in 0..1"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {
        "probabilities": torch.full((4, 2), 0.5),
        "labels": torch.tensor([0, 1, 0, 1]),
        "patients": list("abcd"),
    }
    with pytest.raises(ValueError, match=message):
        patient_intervals(**(given | change))


def test_what_cannot_be_paired_is_named():
    probabilities, labels = random_split(4, 2, seed=0)
    with pytest.raises(ValueError, match="metric must be one of auc, ap"):
        paired_difference(probabilities, probabilities, labels, list("abcd"), "kappa")
    three = torch.full((4, 3), 1 / 3)
    with pytest.raises(ValueError, match="cannot pair"):
        paired_difference(probabilities, three, labels, list("abcd"))
