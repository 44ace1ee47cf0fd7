"""Sinkhorn codes and swapped prediction against loops, marginals and the optimality they stand for."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medspark.losses import (
    assign_codes,
    normalise_prototypes,
    sinkhorn,
    swapped_prediction_loss,
    swav_loss,
)

SAMPLES, PROTOTYPES, VIEWS = 6, 4, 5


def cosines(samples: int = SAMPLES, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(samples, PROTOTYPES, generator=g, dtype=torch.float64) * 2 - 1


def many_views() -> list[Tensor]:
    return [cosines(seed=i) for i in range(VIEWS)]


def loop_codes(scores: Tensor, epsilon: float, iterations: int) -> list[list[float]]:
    """Matrix scaling as in the paper's pseudo-code, without logarithms, number by number."""
    q = [[math.exp(s / epsilon) for s in row] for row in scores.tolist()]  # [B][K]
    samples, prototypes = len(q), len(q[0])
    for _ in range(iterations):
        for k in range(prototypes):
            mass = sum(row[k] for row in q)
            for row in q:
                row[k] /= mass * prototypes
        for row in q:
            mass = sum(row)
            row[:] = [value / (mass * samples) for value in row]
    return [[value * samples for value in row] for row in q]


def loop_loss(scores: list[Tensor], codes: dict[int, Tensor], temperature: float) -> float:
    terms = []
    for i, code in codes.items():
        for v, other in enumerate(scores):
            if v == i:
                continue
            for q, s in zip(code.tolist(), other.tolist(), strict=True):
                total = math.log(sum(math.exp(x / temperature) for x in s))
                terms.append(-sum(a * (x / temperature - total) for a, x in zip(q, s, strict=True)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("epsilon", [0.05, 0.5])
@pytest.mark.parametrize("iterations", [1, 3])
def test_codes_equal_the_loop(epsilon, iterations):
    scores = cosines()
    expected = torch.tensor(loop_codes(scores, epsilon, iterations), dtype=torch.float64)
    codes = sinkhorn(scores, epsilon, iterations)
    assert torch.allclose(codes, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("iterations", [1, 3, 300])
def test_marginals(iterations):
    codes = sinkhorn(cosines(), 0.2, iterations)
    assert (codes > 0).all()
    assert torch.allclose(codes.sum(1), torch.ones(SAMPLES).double(), rtol=1e-12)
    share = (codes.sum(0) - SAMPLES / PROTOTYPES).abs().max()
    assert share < 1e-12 if iterations == 300 else share > 1e-6


def test_equal_scores_give_uniform_codes():
    codes = sinkhorn(torch.full((5, 8), 0.3), 0.05)
    assert torch.allclose(codes, torch.full((5, 8), 1 / 8))


def test_codes_separate_what_scores_do():
    codes = sinkhorn(torch.eye(4), 0.05)
    assert torch.allclose(codes, torch.eye(4), atol=1e-6)


def test_one_popular_prototype_is_shared_out():
    """All samples like prototype 0 best: an argmax would give it all of them."""
    scores = cosines(8) * 0.1
    scores[:, 0] += 0.8
    codes = sinkhorn(scores, 0.05, 200)
    assert (scores.argmax(1) == 0).all()
    assert codes.sum(0).tolist() == pytest.approx([2.0] * 4)


def test_codes_maximise_the_objective_of_equation_3():
    scores, epsilon = cosines(), 0.2
    codes = sinkhorn(scores, epsilon, 500)

    def objective(q: Tensor) -> float:
        q = q / SAMPLES
        return ((q * scores).sum() - epsilon * (q * q.log()).sum()).item()

    best = objective(codes)
    for b in range(1, SAMPLES):
        for k in range(1, PROTOTYPES):
            for step in (-1e-3, 1e-3):  # keeps all marginals
                moved = codes.clone()
                moved[[0, b], [0, k]] += step * codes.min()
                moved[[0, b], [k, 0]] -= step * codes.min()
                assert objective(moved) < best


def test_order_and_a_constant_per_prototype_do_not_matter():
    scores = cosines()
    expected = sinkhorn(scores)
    order = torch.tensor([3, 1, 0, 2])
    assert torch.allclose(sinkhorn(scores.flip(0)), expected.flip(0))
    assert torch.allclose(sinkhorn(scores[:, order]), expected[:, order])
    assert torch.allclose(sinkhorn(scores + torch.arange(4.0).double()), expected)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-2])
def test_small_epsilons_do_not_overflow_in_float32(epsilon):
    scores = cosines()
    low = sinkhorn(scores.float(), epsilon)  # exp(1000) is beyond float32 and float64
    assert low.dtype == torch.float32
    assert torch.allclose(low.double(), sinkhorn(scores, epsilon), atol=2e-3)
    assert torch.allclose(low.sum(1), torch.ones(SAMPLES))


def test_codes_carry_no_gradient():
    assert not sinkhorn(cosines().requires_grad_()).requires_grad


@pytest.mark.parametrize("assign", [(0, 1), (0,), (3, 1, 0)])
def test_loss_equals_the_loop(assign):
    scores = many_views()
    codes = assign_codes(scores, assign, 0.3, 2)
    assert list(codes) == list(assign)
    for view, code in codes.items():
        assert torch.equal(code, sinkhorn(scores[view], 0.3, 2))
    loss = swapped_prediction_loss(scores, codes, 0.4)
    assert loss.item() == pytest.approx(loop_loss(scores, codes, 0.4), rel=1e-12)
    assert swav_loss(scores, assign, 0.4, 0.3, 2).item() == loss.item()


def test_uniform_scores_lose_the_logarithm_of_their_number():
    assert swav_loss([torch.zeros(3, 8)] * 4).item() == pytest.approx(math.log(8))


def test_a_view_does_not_predict_itself():
    scores = [x.requires_grad_() for x in many_views()]
    swav_loss(scores, (0,)).backward()
    assert scores[0].grad is None
    for other in scores[1:]:
        assert other.grad is not None and (other.grad != 0).all()


def test_queued_scores_take_part_in_the_balance_alone():
    scores, queued = many_views(), {0: cosines(9, seed=10), 1: cosines(9, seed=11)}
    codes = assign_codes(scores, (0, 1), queued=queued)
    for view in (0, 1):
        joint = loop_codes(torch.cat([scores[view], queued[view]]), 0.05, 3)[:SAMPLES]
        assert torch.allclose(codes[view], torch.tensor(joint, dtype=torch.float64))
    assert not torch.allclose(codes[0], sinkhorn(scores[0]), atol=1e-3)
    empty = {view: scores[view][:0] for view in (0, 1)}
    assert torch.equal(assign_codes(scores, queued=empty)[0], sinkhorn(scores[0]))


def test_gradients():
    codes = assign_codes(many_views())
    scores = [x.requires_grad_() for x in many_views()[:3]]
    assert torch.autograd.gradcheck(
        lambda *s: swapped_prediction_loss(s, codes, 0.4), tuple(scores)
    )


def test_no_gradient_passes_through_the_codes():
    codes = assign_codes(many_views())
    scores = [x.requires_grad_() for x in many_views()]
    grads = torch.autograd.grad(swav_loss(scores), scores)
    fixed = torch.autograd.grad(swapped_prediction_loss(scores, codes), scores)
    for got, expected in zip(grads, fixed, strict=True):
        assert torch.equal(got, expected)


def test_autocast_does_not_lower_the_precision(device):
    scores = [x.float().to(device) for x in many_views()]
    expected = swav_loss(scores)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(swav_loss(scores), expected)
        low = swav_loss([x.bfloat16() for x in scores])
        assert sinkhorn(scores[0].bfloat16()).dtype == torch.float32
    rounded = swav_loss([x.bfloat16().float() for x in scores])
    assert low.dtype == torch.float32 and torch.equal(low, rounded)


@pytest.mark.parametrize("view", [0, 4])
def test_nan_makes_the_loss_nan(view):
    scores = many_views()
    scores[view][0, 0] = math.nan
    assert swav_loss(scores).isnan()
    assert sinkhorn(scores[view], iterations=1).isnan().all()


def test_prototypes_get_length_one_in_place():
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
    normalise_prototypes(weight)
    assert torch.allclose(weight, torch.tensor([[0.6, 0.8], [0.0, -1.0]]))
    assert weight.requires_grad and weight.grad_fn is None
    assert torch.allclose(F.normalize(weight, dim=1), weight)


def test_errors_name_the_numbers():
    scores = many_views()
    with pytest.raises(ValueError, match="not empty"):
        sinkhorn(scores[0][:0])
    with pytest.raises(ValueError, match=r"\(4,\)"):
        sinkhorn(scores[0][0])
    with pytest.raises(ValueError, match="epsilon must be positive"):
        sinkhorn(scores[0], 0)
    with pytest.raises(ValueError, match="iterations must be positive"):
        sinkhorn(scores[0], iterations=0)
    with pytest.raises(ValueError, match=r"\(6, 4\), \(5, 4\)"):
        swav_loss([scores[0], scores[1][:5]])
    with pytest.raises(ValueError, match="2 views or more"):
        swav_loss(scores[:1], (0,))
    for assign in ((), (0, 0), (5,), (-1,)):
        with pytest.raises(ValueError, match="different numbers below 5"):
            swav_loss(scores, assign)
    with pytest.raises(ValueError, match=r"view 1.*missing"):
        swav_loss(scores, queued={0: scores[0]})
    with pytest.raises(ValueError, match=r"view 0.*\(6, 3\)"):
        swav_loss(scores, (0,), queued={0: scores[0][:, :3]})
