"""BYOL's regression loss: its three landmarks, its symmetry, and where gradients must not go."""

import math

import pytest
import torch
from torch import Tensor

from medspark.losses import byol_loss, regression_loss


def inputs() -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    return list(torch.randn(4, 5, 3, generator=g, dtype=torch.float64))


def loop_loss(predictions: Tensor, targets: Tensor) -> float:
    """Equation 2 as a squared distance."""
    total = 0.0
    for p, t in zip(predictions.tolist(), targets.tolist(), strict=True):
        pairs = zip(p, t, strict=True)
        total += sum((a / math.hypot(*p) - b / math.hypot(*t)) ** 2 for a, b in pairs)
    return total / len(predictions)


def test_landmarks():
    x = torch.tensor([[3.0, 4.0], [0.0, 2.0]], dtype=torch.float64)
    turned = torch.tensor([[-4.0, 3.0], [2.0, 0.0]], dtype=torch.float64)
    assert regression_loss(x, 7 * x).item() == pytest.approx(0, abs=1e-15)
    assert regression_loss(x, turned).item() == pytest.approx(2)
    assert regression_loss(x, -x).item() == pytest.approx(4)
    assert byol_loss((x, x), (-x, -x)).item() == pytest.approx(8)


def test_equals_the_squared_distance():
    p, t, *_ = inputs()
    assert regression_loss(p, t).item() == pytest.approx(loop_loss(p, t), rel=1e-12)


def test_each_view_is_predicted_from_the_other_and_both_count():
    p1, p2, t1, t2 = inputs()
    expected = loop_loss(p1, t2) + loop_loss(p2, t1)
    assert byol_loss((p1, p2), (t1, t2)).item() == pytest.approx(expected, rel=1e-12)
    swapped = byol_loss((p2, p1), (t2, t1))
    assert swapped.item() == pytest.approx(expected, rel=1e-12)


def test_no_gradient_reaches_the_targets():
    p1, p2, t1, t2 = (x.requires_grad_() for x in inputs())
    byol_loss((p1, p2), (t1, t2)).backward()
    assert t1.grad is None and t2.grad is None
    for p in (p1, p2):
        assert p.grad is not None and (p.grad != 0).all()
        assert (p.grad * p).sum(1).abs().max() < 1e-15  # lengths do not matter


def test_gradients_of_the_predictions():
    p1, p2, t1, t2 = inputs()
    pair = (p1.requires_grad_(), p2.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: byol_loss((a, b), (t1, t2)), pair)


def test_order_does_not_matter():
    p, t, *_ = inputs()
    order = torch.tensor([4, 2, 0, 1, 3])
    changed = regression_loss(p[order], t[order]).item()
    assert changed == pytest.approx(regression_loss(p, t).item(), rel=1e-12)


def test_autocast_does_not_lower_the_precision(device):
    p, t, *_ = (x.float().to(device) for x in inputs())
    expected = regression_loss(p, t)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(regression_loss(p, t), expected)
        low = regression_loss(p.bfloat16(), t.bfloat16())
    rounded = regression_loss(p.bfloat16().float(), t.bfloat16().float())
    assert low.dtype == torch.float32 and torch.equal(low, rounded)


@pytest.mark.parametrize("place", range(4))
def test_nan_makes_the_loss_nan(place):
    tensors = inputs()
    tensors[place][0, 0] = math.nan
    assert byol_loss((tensors[0], tensors[1]), (tensors[2], tensors[3])).isnan()


def test_errors_name_the_numbers():
    p, t, *_ = inputs()
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(5, 2\)"):
        regression_loss(p, t[:, :2])
