"""Votes of neighbours, by hand."""

import math

import pytest
import torch

from medspark.finetune.knn import TEMPERATURES, K, NearestNeighbours, mean_sd, vote
from medspark.finetune.metrics import classification_metrics
from medspark.models.encoders import create_encoder

# Cosines to (1, 0): 1, 0.5, 0, -1; lengths must not matter.
REFERENCES = torch.tensor([[3.0, 0.0], [0.5, math.sqrt(0.75)], [0.0, 0.1], [-2.0, 0.0]])
LABELS = torch.tensor([0, 1, 1, 2])


def test_vote_of_two_neighbours():
    found = vote(torch.tensor([[7.0, 0.0]]), REFERENCES, LABELS, torch.ones(3), 2, 0.5)
    shared, second = 1 / 3, math.exp(-0.5 / 0.5)
    total = 1 + second + 1
    expected = [(1 + shared) / total, (second + shared) / total, shared / total]
    assert found[0].tolist() == pytest.approx(expected)


def test_vote_of_all_neighbours_with_weights():
    weights = torch.tensor([1.0, 2.0, 0.5])
    found = vote(torch.tensor([[0.0, -1.0]]), REFERENCES, LABELS, weights, 4, 1.0)
    # Cosines to (0, -1): 0, -sqrt(3)/2, -1, 0; the nearest has 0.
    votes = [1.0, 2 * (math.exp(-math.sqrt(0.75)) + math.exp(-1.0)), 0.5]
    total = sum(votes) + 1
    assert found[0].tolist() == pytest.approx([(v + 1 / 3) / total for v in votes])


def test_a_small_temperature_leaves_the_nearest_alone():
    found = vote(torch.tensor([[1.0, 0.1]]), REFERENCES, LABELS, torch.ones(3), 4, 1e-4)
    assert found[0].tolist() == pytest.approx([4 / 6, 1 / 6, 1 / 6], abs=1e-6)


def test_mixed_precision_does_not_reach_the_vote():
    generator = torch.Generator().manual_seed(0)
    features, references = (torch.randn(6, 64, generator=generator) for _ in range(2))
    given = (features, references, torch.arange(6) % 2, torch.ones(2), 3, 0.02)
    expected = vote(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vote(*given), expected)


def test_mean_and_sd_keep_nearly_constant_features_small():
    features = torch.tensor([[1.0, 5.0, 0.0], [3.0, 5.0, 0.0]])
    mean, sd = mean_sd(features)
    assert mean.tolist() == [2.0, 5.0, 0.0]
    floor = 0.01 * math.sqrt(1 / 3)
    assert sd.tolist() == pytest.approx([1.0, floor, floor])
    assert mean_sd(torch.ones(3, 2))[1].tolist() == [1.0, 1.0]
    wide, spread = mean_sd(torch.tensor([[0.0], [4.0], [2.0]]))
    assert (wide.item(), spread.item()) == pytest.approx((2.0, math.sqrt(8 / 3)))


@pytest.fixture
def module():
    encoder = create_encoder("resnet10", block_inplanes=[4, 4, 8, 8])
    generator = torch.Generator().manual_seed(0)
    found = NearestNeighbours(encoder, 2, 30)
    features, labels = torch.randn(30, 8, generator=generator), torch.arange(30) % 2
    features[labels == 1] += 0.7
    found.feature_mean, found.feature_sd = mean_sd(features)
    found.remember(features, labels)
    return found


@pytest.mark.parametrize("monitor", ["loss", "auc"])
def test_choice_is_the_best_of_the_stated_set(module, monitor):
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(20) % 2
    features = torch.randn(20, 8, generator=generator) + 0.7 * labels[:, None]
    standard = (features - module.feature_mean) / module.feature_sd
    kept = (module.references, module.reference_labels, module.class_weights)
    table = {
        (k, t): classification_metrics(vote(standard, *kept, k, t), labels)
        for k in K
        for t in TEMPERATURES
        if k <= 30
    }
    key, best = ("nll", min) if monitor == "loss" else ("auc", max)
    values = [m[key] for m in table.values()]
    assert max(values) > min(values)
    choice = module.choose(features, labels, monitor)
    assert choice.value == pytest.approx(best(values))
    assert table[choice.k, choice.temperature][key] == pytest.approx(best(values))
    assert (module.k, module.temperature) == (choice.k, choice.temperature)


def test_auc_of_one_class_is_no_criterion(module):
    with pytest.raises(ValueError, match="monitor=loss"):
        module.choose(torch.randn(4, 8), torch.zeros(4, dtype=torch.int64), "auc")


def test_few_references_are_enough():
    module = NearestNeighbours(create_encoder("resnet10", block_inplanes=[4, 4, 8, 8]), 2, 2)
    module.remember(torch.eye(8)[:2], torch.tensor([0, 1]))
    assert module.choose(torch.eye(8)[:2], torch.tensor([0, 1]), "loss").k == 1


def test_encoder_stays_in_eval_mode(module):
    before = {k: v.clone() for k, v in module.state_dict().items()}
    module(torch.randn(2, 1, 32, 32, 32))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert not any(p.requires_grad for p in module.parameters())
