"""InfoNCE against a queue: closed forms, loops, and where gradients must not go."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from medspark.losses import info_nce


def inputs(rows: int = 4, queued: int = 6, dim: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2 * rows + queued, dim, generator=g, dtype=torch.float64)
    q, k, queue = x.split([rows, rows, queued])
    return q * 2, k * 0.5, F.normalize(queue, dim=1)


def loop_loss(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> float:
    total = 0.0
    for q, k in zip(queries.tolist(), keys.tolist(), strict=True):
        scores = []
        for other in [k, *queue.tolist()]:
            dot = sum(a * b for a, b in zip(q, other, strict=True))
            scores.append(dot / math.hypot(*q) / math.hypot(*other) / temperature)
        total += math.log(sum(math.exp(s) for s in scores)) - scores[0]
    return total / len(queries)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 2.0])
@pytest.mark.parametrize("queued", [1, 6])
def test_equals_the_loop(queued, temperature):
    q, k, queue = inputs(queued=queued)
    expected = loop_loss(q, k, queue, temperature)
    assert info_nce(q, k, queue, temperature).item() == pytest.approx(expected, rel=1e-12)


def test_closed_forms():
    one, other = torch.eye(2, dtype=torch.float64)
    q = one.expand(3, 2)
    # Keys that cannot be told from the queue's; a queue that is orthogonal, or opposite.
    assert info_nce(q, q, one.expand(7, 2)).item() == pytest.approx(math.log(8))
    expected = math.log(1 + 7 * math.exp(-1 / 0.2))
    assert info_nce(q, q, other.expand(7, 2)).item() == pytest.approx(expected)
    expected = math.log(1 + 7 * math.exp(-2 / 0.2))
    assert info_nce(q, 5 * q, -one.expand(7, 2)).item() == pytest.approx(expected)


def test_an_empty_queue_teaches_nothing():
    q, k, queue = inputs()
    q.requires_grad_()
    loss = info_nce(q, k, queue[:0])
    loss.backward()
    assert loss.item() == 0
    assert q.grad is not None and q.grad.abs().max() < 1e-15


def test_no_gradient_reaches_keys_or_queue():
    q, k, queue = (x.requires_grad_() for x in inputs())
    info_nce(q, k, queue).backward()
    assert k.grad is None and queue.grad is None
    assert q.grad is not None and (q.grad != 0).all()


def test_gradients_of_the_queries():
    q, k, queue = inputs()
    assert torch.autograd.gradcheck(lambda x: info_nce(x, k, queue, 0.3), (q.requires_grad_(),))


def test_order_and_scale_do_not_matter():
    q, k, queue = inputs()
    expected = info_nce(q, k, queue).item()
    order = torch.tensor([2, 0, 3, 1])
    for changed in (
        info_nce(q[order], k[order], queue),
        info_nce(q, k, queue.flip(0)),
        info_nce(3 * q, k / 7, queue),
    ):
        assert changed.item() == pytest.approx(expected, rel=1e-12)
    assert abs(info_nce(q, k[order], queue).item() - expected) > 0.01


def test_autocast_does_not_lower_the_precision(device):
    q, k, queue = (x.float().to(device) for x in inputs())
    expected = info_nce(q, k, queue)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(info_nce(q, k, queue), expected)
        low = info_nce(q.bfloat16(), k.bfloat16(), queue)
    rounded = info_nce(q.bfloat16().float(), k.bfloat16().float(), queue)
    assert low.dtype == torch.float32 and torch.equal(low, rounded)


def test_small_temperatures_do_not_overflow():
    q, k, queue = inputs()
    exact = info_nce(q, k, queue, 1e-3).item()
    loss = info_nce(q.float(), k.float(), queue.float(), 1e-3)
    assert loss.item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_makes_the_loss_nan(place, bad):
    tensors = inputs()
    tensors[place][0, 0] = bad
    loss = info_nce(*tensors)
    assert not loss.isfinite()
    if math.isnan(bad) or place < 2:
        assert loss.isnan()


def test_errors_name_the_numbers():
    q, k, queue = inputs()
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(3, 3\)"):
        info_nce(q, k[:3], queue)
    with pytest.raises(ValueError, match=r"\(6, 2\).*\[K, 3\]"):
        info_nce(q, k, queue[:, :2])
    with pytest.raises(ValueError, match="temperature must be positive"):
        info_nce(q, k, queue, 0)
