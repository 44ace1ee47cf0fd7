"""The momentum copy: its average, its schedule, and where gradients must not go."""

import copy
import math

import pytest
import torch
from torch import nn

from medspark.models.momentum import MomentumNetwork, momentum_at
from medspark.sparse import convert_sync_batchnorm


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def moved(online: nn.Module) -> nn.Module:
    """Other weights, statistics and counts."""
    with torch.no_grad():
        for p in online.parameters():
            p.add_(torch.randn_like(p))
    online.train()(torch.randn(8, 3))
    return online


def test_starts_as_a_copy_that_shares_nothing():
    online = moved(network())
    online(torch.randn(5, 3)).sum().backward()
    momentum = MomentumNetwork(online)
    assert set(momentum.state_dict()) == {f"network.{key}" for key in online.state_dict()}
    for key, value in online.state_dict().items():
        assert torch.equal(momentum.state_dict()[f"network.{key}"], value)
    before = {key: value.clone() for key, value in momentum.state_dict().items()}
    moved(online)
    assert all(torch.equal(momentum.state_dict()[key], value) for key, value in before.items())
    assert all(p.grad is None for p in momentum.parameters())


def test_average_by_hand():
    online = nn.Linear(1, 1)
    with torch.no_grad():
        online.weight.fill_(2.0)
        momentum = MomentumNetwork(online)
        for value, expected in ((10.0, 2.8), (2.8, 2.8), (-7.2, 1.8)):  # tau .9
            online.weight.fill_(value)
            momentum.update(online, 0.9)
            assert momentum.network.weight.item() == pytest.approx(expected)


@pytest.mark.parametrize("buffers", [False, True])
def test_what_is_averaged(buffers):
    online = moved(network())
    momentum = MomentumNetwork(online, buffers=buffers)
    old = {key: value.clone() for key, value in momentum.network.state_dict().items()}
    moved(online)
    momentum.update(online, 0.75)
    weights = {name for name, _ in online.named_parameters()}
    for key, new in online.state_dict().items():
        expected = old[key]
        if key in weights or (buffers and new.is_floating_point()):
            expected = 0.75 * old[key] + 0.25 * new
        elif buffers:
            expected = new
        assert torch.allclose(momentum.network.state_dict()[key], expected), key


def test_zero_copies_and_one_does_nothing_to_the_bit():
    online = moved(network())
    momentum = MomentumNetwork(online, buffers=True)
    old = {key: value.clone() for key, value in momentum.network.state_dict().items()}
    moved(online)
    momentum.update(online, 1.0)
    assert all(torch.equal(momentum.network.state_dict()[key], old[key]) for key in old)
    momentum.update(online, 0.0)
    for key, value in online.state_dict().items():
        assert torch.equal(momentum.network.state_dict()[key], value)


def test_no_gradient_ever_enters():
    online = network()
    momentum = MomentumNetwork(online)
    x = torch.randn(5, 3, requires_grad=True)
    target = momentum(x)
    assert not target.requires_grad
    (online(x) - target).square().mean().backward()
    momentum.update(online, 0.5)
    for p in momentum.parameters():
        assert p.grad is None and not p.requires_grad and p.is_leaf


def test_own_statistics_follow_its_own_forward_passes():
    online = network()
    momentum = MomentumNetwork(online)
    momentum.train()(torch.randn(8, 3))
    assert momentum.network[1].num_batches_tracked == 1
    assert online[1].num_batches_tracked == 0
    momentum.eval()(torch.randn(8, 3))
    assert momentum.network[1].num_batches_tracked == 1


def test_keeps_float32_beside_a_network_of_16_bits():
    online = nn.Linear(1, 1).bfloat16()
    momentum = MomentumNetwork(online)
    with torch.no_grad():
        online.weight.fill_(1.0)
        momentum.update(online, 0.0)
        online.weight.fill_(2.0)
        for _ in range(100):
            momentum.update(online, 0.999)
    assert momentum.network.weight.dtype == torch.float32
    assert momentum.network.weight.item() == pytest.approx(2 - 0.999**100, rel=1e-5)
    with pytest.raises(ValueError, match=r"bfloat16 .*bf16-mixed"):
        momentum.bfloat16().update(online, 0.5)


def test_resumes_to_the_same_bits_and_survives_deepcopy():
    online = moved(network())
    momentum = MomentumNetwork(online)
    moved(online)
    momentum.update(online, 0.9)
    resumed = MomentumNetwork(network())
    resumed.load_state_dict(momentum.state_dict())
    twin = copy.deepcopy(momentum)
    moved(online)
    for each in (momentum, resumed, twin):
        each.update(online, 0.9)
    for key, value in momentum.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value)
        assert torch.equal(twin.state_dict()[key], value)
    assert all(not p.requires_grad for p in twin.parameters())


def test_batch_norms_may_become_synchronised_later():
    online = moved(network())
    momentum = MomentumNetwork(online, buffers=True)
    online = convert_sync_batchnorm(moved(online))
    expected = momentum.network[1].weight * 0.5 + online.get_parameter("1.weight") * 0.5
    momentum.update(online, 0.5)
    assert torch.allclose(momentum.network[1].weight, expected)
    momentum = convert_sync_batchnorm(momentum)
    assert all(not p.requires_grad for p in momentum.parameters())
    assert torch.equal(MomentumNetwork(online)(torch.ones(2, 3)), online(torch.ones(2, 3)))


def test_shared_weights_stay_shared():
    online = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    online[1].weight = online[0].weight
    momentum = MomentumNetwork(online)
    assert momentum.network[1].weight is momentum.network[0].weight
    before = momentum.network[0].weight.clone()
    with torch.no_grad():
        online[0].weight += 1
    momentum.update(online, 0.5)
    assert torch.allclose(momentum.network[1].weight, before + 0.5)


def test_schedule():
    assert momentum_at(0, 1000, 0.996) == 0.996
    assert momentum_at(500, 1000, 0.996) == pytest.approx(0.998)
    assert momentum_at(1000, 1000, 0.996) == momentum_at(2000, 1000, 0.996) == 1.0
    quarter = 1 - 0.004 * (math.cos(math.pi / 4) + 1) / 2
    assert momentum_at(250, 1000, 0.996) == pytest.approx(quarter, rel=1e-15)
    assert {momentum_at(step, 10, 0.999, 0.999) for step in range(12)} == {0.999}
    rising = [momentum_at(step, 300, 0.99) for step in range(301)]
    assert rising == sorted(rising)  # never back, as it went where its period was an epoch's


def test_errors_name_the_numbers():
    momentum = MomentumNetwork(network())
    with pytest.raises(ValueError, match=r"0\.bias is \(4,\).*missing online"):
        momentum.update(nn.Sequential(nn.Identity()), 0.5)
    with pytest.raises(ValueError, match=r"\(4, 3\).*\(4, 5\) online"):
        momentum.update(nn.Sequential(nn.Linear(5, 4), *network()[1:]), 0.5)
    for tau in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            momentum.update(network(), tau)
    with pytest.raises(ValueError, match="at least one step"):
        momentum_at(0, 0, 0.9)
    with pytest.raises(ValueError, match=r"from 1\.2"):
        momentum_at(0, 10, 1.2)
