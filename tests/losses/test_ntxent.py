"""NT-Xent against closed forms, loops that spell equation 1 out, and MONAI."""

import math

import pytest
import torch
from torch import Tensor

from medspark.losses import nt_xent


def views(samples: int = 5, dim: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, samples, dim, generator=g, dtype=torch.float64)
    return first * 3, second


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def loop_loss(first: Tensor, second: Tensor, temperature: float) -> float:
    """Equation 1 and the mean over both directions, one number at a time."""
    n = len(first)
    z = first.tolist() + second.tolist()
    total = 0.0
    for i in range(2 * n):
        terms = {k: cosine(z[i], z[k]) / temperature for k in range(2 * n) if k != i}
        total += -terms[(i + n) % (2 * n)] + math.log(sum(math.exp(t) for t in terms.values()))
    return total / (2 * n)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 3.0])
@pytest.mark.parametrize("samples", [2, 5])
def test_equals_the_loop(samples, temperature):
    first, second = views(samples)
    expected = loop_loss(first, second, temperature)
    assert nt_xent(first, second, temperature).item() == pytest.approx(expected, rel=1e-12)


def test_identical_views_cannot_be_told_apart():
    x = torch.ones(6, 4, dtype=torch.float64)
    assert nt_xent(x, 2 * x, 0.3).item() == pytest.approx(math.log(2 * 6 - 1))


def test_orthogonal_samples():
    x = torch.eye(4, dtype=torch.float64)
    expected = math.log(1 + 6 * math.exp(-1 / 0.5))
    assert nt_xent(x, x, 0.5).item() == pytest.approx(expected)


def test_by_hand():
    # Cosines of the first view of sample 1: 0 with its partner, -1 and 0 with those of sample 2.
    first, second = torch.tensor([[1.0, 0], [-1, 0]]), torch.tensor([[0.0, 1], [0, -1]])
    assert nt_xent(first, second, 1.0).item() == pytest.approx(math.log(2 + math.exp(-1)))


def test_equals_monai():
    losses = pytest.importorskip("monai.losses")
    first, second = (x.float() for x in views(7))
    expected = losses.ContrastiveLoss(temperature=0.2)(first, second)
    assert nt_xent(first, second, 0.2).item() == pytest.approx(expected.item(), rel=1e-5)


def test_equals_pytorch_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    first, second = (x.float() for x in views(7))
    labels = torch.arange(7).repeat(2)
    expected = losses.NTXentLoss(temperature=0.2)(torch.cat([first, second]), labels)
    assert nt_xent(first, second, 0.2).item() == pytest.approx(expected.item(), rel=1e-5)


def test_order_scale_and_rotation_do_not_matter():
    first, second = views()
    expected = nt_xent(first, second).item()
    order = torch.randperm(5)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    lengths = torch.rand(5, 1, dtype=torch.float64) + 0.1
    for changed in (
        nt_xent(second, first),
        nt_xent(first[order], second[order]),
        nt_xent(first * lengths, second / lengths),
        nt_xent(first @ turn, second @ turn),
    ):
        assert changed.item() == pytest.approx(expected, rel=1e-12)
    assert abs(nt_xent(first, second[order]).item() - expected) > 0.1


def test_gradients():
    first, second = (x.requires_grad_() for x in views(4))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.5), (first, second))


def test_small_temperatures_do_not_overflow():
    first, second = views()
    exact = nt_xent(first, second, 1e-3).item()  # exp(1000) is beyond float32
    first, second = first.float().requires_grad_(), second.float()
    loss = nt_xent(first, second, 1e-3)
    loss.backward()
    assert loss.item() == pytest.approx(exact, rel=1e-4)
    assert first.grad is not None and first.grad.isfinite().all()


def test_autocast_does_not_lower_the_precision(device):
    first, second = (x.float().to(device) for x in views())
    expected = nt_xent(first, second)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = nt_xent(first, second)
        low = nt_xent(first.bfloat16(), second.bfloat16())
    assert torch.equal(loss, expected)
    rounded = (x.bfloat16().float() for x in (first, second))
    assert low.dtype == torch.float32 and torch.equal(low, nt_xent(*rounded))


def test_a_row_of_zeros_has_cosine_zero_and_a_finite_gradient():
    first, second = torch.eye(2, 3).double(), torch.eye(2, 3).double()
    first[0] = 0
    first.requires_grad_()
    loss = nt_xent(first, second, 1.0)
    loss.backward()
    # First view of sample 1: 0 with all three others. Second: the same. Those of sample 2: 1 and 0, 0.
    expected = (2 * math.log(3) + 2 * (math.log(math.e + 2) - 1)) / 4
    assert loss.item() == pytest.approx(expected)
    assert first.grad is not None and first.grad.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_makes_the_loss_nan(bad):
    first, second = views()
    first[1, 2] = bad
    assert nt_xent(first, second).isnan()


def test_errors_name_the_numbers():
    first, second = views()
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(4, 3\)"):
        nt_xent(first, second[:4])
    with pytest.raises(ValueError, match=r"\[B, D\]"):
        nt_xent(first[None], second[None])
    with pytest.raises(ValueError, match="no negatives"):
        nt_xent(first[:1], second[:1])
    with pytest.raises(ValueError, match="at least 1"):
        nt_xent(first[:0], second[:0])
    for temperature in (0, -1, math.nan):
        with pytest.raises(ValueError, match="temperature must be positive"):
            nt_xent(first, second, temperature)
