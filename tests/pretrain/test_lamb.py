"""LAMB against a computation of its own, closed forms and its own past."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from medspark.pretrain.lamb import Lamb

OPTIONS = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-4}


def lamb_by_hand(weights, gradients, decays, lr, betas, eps, clip):
    """Float64 numpy, parameter by parameter, written from the paper; gradients[t][i]."""
    b1, b2 = betas
    m, v = ([np.zeros_like(w) for w in weights] for _ in range(2))
    for t, now in enumerate(gradients, start=1):
        length = np.sqrt(sum(float((g * g).sum()) for g in now))
        factor = clip / length if clip and length > clip else 1.0
        for i, gradient in enumerate(now):
            g = gradient * factor
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g**2
            u = (m[i] / (1 - b1**t)) / (np.sqrt(v[i] / (1 - b2**t)) + eps)
            ratio = 1.0
            if decays[i]:
                u = u + decays[i] * weights[i]
                w_norm, u_norm = np.linalg.norm(weights[i]), np.linalg.norm(u)
                ratio = w_norm / u_norm if w_norm > 0 and u_norm > 0 else 1.0
            weights[i] = weights[i] - lr * ratio * u
    return weights


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(3, 2, 3), (4,), (2, 5), (6,)]
    return [rng.normal(size=s) * 10.0**i for i, s in enumerate(shapes)]


@pytest.mark.parametrize("clip", [0.0, 0.7, 1e6])
def test_equals_a_computation_by_hand(clip):
    rng = np.random.default_rng(1)
    start = parameters()
    # The lengths differ a lot, so that clipping changes the direction over the steps.
    gradients = [[rng.normal(size=w.shape) * 3.0**t for w in start] for t in range(6)]
    decays = [0.1, 0.0, 0.3, 0.0]
    expected = lamb_by_hand([w.copy() for w in start], gradients, decays, **OPTIONS, clip=clip)
    tensors = [torch.tensor(w, requires_grad=True) for w in start]
    groups = [{"params": [t], "weight_decay": d} for t, d in zip(tensors, decays, strict=True)]
    optimizer = Lamb(groups, **OPTIONS, max_grad_norm=clip)
    for now in gradients:
        for tensor, g in zip(tensors, now, strict=True):
            tensor.grad = torch.tensor(g)
        optimizer.step()
    for tensor, value in zip(tensors, expected, strict=True):
        np.testing.assert_allclose(tensor.detach().numpy(), value, rtol=1e-12, atol=1e-13)


def test_clipping_is_over_all_groups_and_leaves_the_gradients():
    tensors = [torch.tensor([3.0], requires_grad=True), torch.tensor([4.0], requires_grad=True)]
    optimizer = Lamb([{"params": [t]} for t in tensors], max_grad_norm=1.0, betas=(0.5, 0.5))
    for tensor in tensors:
        tensor.grad = tensor.detach().clone()
    optimizer.step()
    moments = [optimizer.state[t]["exp_avg"].item() for t in tensors]
    assert moments == pytest.approx([0.5 * 3 / 5, 0.5 * 4 / 5])
    assert [t.grad.item() for t in tensors] == [3.0, 4.0]


def test_first_step_in_closed_form():
    """m / (1 - b1) = g and v / (1 - b2) = g^2: a step of lr against the sign, or of lr |w|."""
    g = torch.tensor([[0.3, -2.0], [5.0, -0.01]], dtype=torch.float64)
    plain = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    decayed = torch.full((2, 2), 3.0, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    groups = [{"params": [plain]}, {"params": [decayed, zero], "weight_decay": 1e-12}]
    optimizer = Lamb(groups, lr=0.1, eps=0.0)
    for p in (plain, decayed, zero):
        p.grad = g
    optimizer.step()
    assert torch.allclose(plain, 1 - 0.1 * g.sign())
    # |w| = 6, |u| = 2: each value moves by lr * 6 / 2.
    assert torch.allclose(decayed, 3 - 0.1 * 3 * g.sign())
    assert torch.allclose(zero, -0.1 * g.sign())  # no norm to scale by


def test_step_length_does_not_depend_on_the_gradient_but_on_the_weight():
    for scale in (1e-3, 1.0, 1e3):
        w = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64, requires_grad=True)
        optimizer = Lamb([w], lr=0.01, weight_decay=0.05)
        before = w.detach().clone()
        w.grad = scale * torch.tensor([0.4, -1.0, 0.2], dtype=torch.float64)
        optimizer.step()
        assert (w.detach() - before).norm().item() == pytest.approx(0.01 * 3, rel=1e-9)


def test_descends_and_resumes_from_its_state():
    def train(net, optimizer, steps, first=0):
        for i in range(first, steps):
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(i))
            optimizer.zero_grad()
            loss = (net(x) - x.sum(1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    torch.manual_seed(0)
    net = nn.Linear(4, 1)
    untouched = copy.deepcopy(net)
    optimizer = Lamb(net.parameters(), lr=0.05, weight_decay=1e-3)
    train(net, optimizer, 10)
    other = copy.deepcopy(net)
    again = Lamb(other.parameters(), lr=1.0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(net, optimizer, 300, first=10) < 0.05
    train(other, again, 300, first=10)
    assert torch.equal(net.weight, other.weight) and torch.equal(net.bias, other.bias)
    assert not torch.equal(net.weight, untouched.weight)


def test_parameters_without_gradient_stay():
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer = Lamb([a, b], lr=0.1)
    a.grad = torch.ones(2)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert (b == 1).all() and (a != 1).all() and b not in optimizer.state


def test_options_out_of_range():
    with pytest.raises(ValueError, match=r"betas \(0.9, 1.0\)"):
        Lamb([torch.zeros(1, requires_grad=True)], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="lr -1"):
        Lamb([torch.zeros(1, requires_grad=True)], lr=-1.0)
