"""Unmodified networks on masked volumes: what hidden voxels, full masks and 16 bits do to them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from medspark.sparse import BlockMask, BlockSparseTensor, reference

from .network_table import Observer, case, flatten, relative, run, works
from .networks import NETWORKS, Network

FEW = ["ResNet-18", "ResNet-18, images", "ResidualEncoderUNet"]
WORKING = [name for name in NETWORKS if works(name)]


def dense_and_own(network: Network, net: nn.Module, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of the network for tensors, and for masked volumes of which every cell is visible."""
    mask = BlockMask(torch.ones(x.shape[0], *network.grid, dtype=torch.bool))
    dense = list(flatten(network.call(copy.deepcopy(net), x)))
    return dense, list(flatten(network.call(net, BlockSparseTensor.from_dense(x, mask))))


@pytest.mark.parametrize("name", WORKING)
def test_all_visible_equals_the_dense_network(name: str) -> None:
    net, x, _ = case(NETWORKS[name])
    net = net.double().eval()
    keys = list(net.state_dict())
    with torch.no_grad():
        dense, own = dense_and_own(NETWORKS[name], net, x[:2].double())
    assert list(net.state_dict()) == keys
    for a, b in zip(own, dense, strict=True):
        assert a.shape == b.shape and relative(a, b) < 1e-12


@pytest.mark.parametrize("name", FEW)
def test_all_visible_trains_like_the_dense_network(name: str) -> None:
    net, x, _ = case(NETWORKS[name])
    dense, own = dense_and_own(NETWORKS[name], net.double(), x[:2].double())
    for a, b in zip(own, dense, strict=True):
        assert relative(a, b) < 1e-10


@pytest.mark.parametrize("name", WORKING)
def test_hidden_voxels_change_nothing_bit_for_bit(name: str) -> None:
    network = NETWORKS[name]
    net, x, mask = case(network)
    hidden = ~reference.voxel_mask(mask.level(network.volume)).view(3, 1, *network.volume)
    poisons = (torch.nan, 1e30, -torch.inf) if name in FEW else (torch.nan,)
    first, *others = [
        run(network, net, torch.where(hidden, poison, x), mask, "native", Observer())
        for poison in (0.0, *poisons)
    ]
    assert hidden.any() and all(t.isfinite().all() for t in first.gradients.values())
    for other in others:
        for mode in ("training", "evaluation"):
            pairs = zip(getattr(first, mode), getattr(other, mode), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
        assert all(torch.equal(g, other.gradients[key]) for key, g in first.gradients.items())


def test_bfloat16_network_runs_natively() -> None:
    network = NETWORKS["ResidualEncoderUNet encoder"]
    net, x, mask = case(network)
    exact = run(network, net, x.double(), mask, "reference", Observer())
    torchs = run(network, net, x.bfloat16(), mask, "reference", Observer())
    own = run(network, net, x.bfloat16(), mask, "native", Observer())
    assert own.forward["conv3d"] == own.calls["conv3d"] > 0, "a convolution fell back"
    for a, b, c in zip(own.training, torchs.training, exact.training, strict=True):
        assert relative(a, c) <= 2 * relative(b, c)
    assert all(g.isfinite().all() for g in own.gradients.values())


def volume() -> BlockSparseTensor:
    x = torch.randn(2, 3, 4, 4, 4).relu()
    x[:, 1] = 0.0  # a dead channel
    return BlockSparseTensor.from_dense(x, BlockMask(torch.tensor([True, False]).view(2, 1, 1, 1)))


def test_length_of_a_dead_channel_has_gradient_zero() -> None:
    x = volume().features.requires_grad_()
    length = torch.norm(volume().with_features(x), p=2, dim=(-3, -2, -1), keepdim=True)
    length.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and not x.grad[..., 1].any()


def test_cat_takes_a_dense_volume_at_the_active_voxels() -> None:
    x, dense = volume(), torch.randn(2, 2, 4, 4, 4)
    joined = torch.cat([x, dense], dim=1).to_dense()
    assert torch.equal(joined[0], torch.cat([x.to_dense()[0], dense[0]])) and not joined[1].any()
    with pytest.raises(ValueError, match=r"does not fit \(2, 3, 4, 4, 4\)"):
        torch.cat([x, dense[..., :2]], dim=1)


def test_data_shares_memory_without_a_graph() -> None:
    x = volume().with_features(volume().features.requires_grad_() * 2)
    assert not x.data.requires_grad and x.data.features.data_ptr() == x.features.data_ptr()
