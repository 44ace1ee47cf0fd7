"""BlockSparseTensor as a value: metadata, elementwise functions, refusals, machinery."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medspark.sparse import BlockMask, BlockSparseTensor, Semantics, reference


@pytest.fixture
def x(ragged_mask) -> BlockSparseTensor:
    torch.manual_seed(0)
    return BlockSparseTensor.from_dense(torch.randn(3, 4, 4, 4, 4), ragged_mask((2, 2, 2)))


def test_it_is_a_tensor_with_the_dense_shape(x) -> None:
    assert isinstance(x, torch.Tensor)
    assert x.shape == (3, 4, 4, 4, 4) and x.size(1) == 4 and x.dim() == x.ndim == 5
    assert x.dtype == torch.float32 and x.device.type == "cpu" and not x.requires_grad
    assert x.features.shape == (x.level.n_blocks, 2, 2, 2, 4)
    assert "blocks" in repr(x)
    assert not x.is_cuda and x.is_floating_point()


ELEMENTWISE = {
    "relu": nn.ReLU(),
    "leaky": nn.LeakyReLU(0.1),
    "prelu": nn.PReLU(),
    "prelu per channel": nn.PReLU(4, init=0.1),
    "power per channel": lambda t: (t * t) ** torch.arange(4.0).view(1, 4, 1, 1, 1),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "relu6": nn.ReLU6(),
    "elu": nn.ELU(),
    "softplus": nn.Softplus(),
    "identity": nn.Identity(),
    "dropout in eval": nn.Dropout(0.5).eval(),
    "scale": lambda t: 2 * t / 3 + 1 - 0.5,
    "square": lambda t: t**2 - t * t + (-t).abs(),
    "gate": lambda t: t * torch.sigmoid(t.mean((2, 3, 4), keepdim=True)),
    "per channel": lambda t: t * torch.arange(4.0).view(1, 4, 1, 1, 1),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_functions_act_on_active_voxels(x, name) -> None:
    function = ELEMENTWISE[name]
    shown = reference.voxel_mask(x.level)
    y = function(x)
    if name == "gate":  # the mean runs over active voxels only
        mean = F.adaptive_avg_pool3d(x, 1)
        expected = x.to_dense() * torch.sigmoid(mean)
    else:
        expected = function(x.to_dense())
    assert isinstance(y, BlockSparseTensor)
    assert torch.allclose(y.to_dense(), torch.where(shown, expected, 0.0), atol=1e-6)


def test_in_place_functions_change_the_tensor(x) -> None:
    before = x.to_dense()
    assert nn.ReLU(inplace=True)(x) is x
    assert torch.equal(x.to_dense(), before.relu())
    same = x
    x += x.clone()
    assert x is same
    assert torch.equal(x.to_dense(), before.relu() * 2)


def test_sum_and_cat_need_the_same_mask(x) -> None:
    other = BlockSparseTensor.from_dense(torch.randn(3, 4, 4, 4, 4), x.mask.invert())
    with pytest.raises(ValueError, match="same active voxels"):
        x + other
    with pytest.raises(ValueError, match="same active voxels"):
        torch.cat([x, other], dim=1)
    twin = BlockSparseTensor.from_dense(
        torch.ones(3, 2, 4, 4, 4), BlockMask(x.mask.visible.clone())
    )
    joined = torch.cat([x, twin], dim=1)
    assert joined.shape == (3, 6, 4, 4, 4)
    assert torch.equal(joined.to_dense(), torch.cat([x.to_dense(), twin.to_dense()], 1))
    with pytest.raises(ValueError, match="dense operand"):
        x + torch.randn(3, 4, 4, 4, 4)


def test_channel_dropout_drops_whole_channels_per_sample(x) -> None:
    torch.manual_seed(1)
    y = nn.Dropout3d(0.5)(x).to_dense()
    ratio = torch.where(x.to_dense() != 0, y / x.to_dense(), 0)
    for b in (0, 2):
        for c in range(4):
            values = ratio[b, c][x.to_dense()[b, c] != 0]
            assert torch.allclose(values, values[0].expand_as(values))
            assert values[0].item() in (0.0, pytest.approx(2.0))


def test_unknown_functions_are_refused_by_name(x) -> None:
    for call, name in [
        (lambda: torch.fft.fftn(x), "fftn"),
        (lambda: x.view(3, -1), "view"),
        (lambda: F.pad(x, (1, 1), value=1.0), "pad"),
        (lambda: F.relu(F.pad(x, (1, 1))), "relu"),
        (lambda: F.conv3d(x.permute(0, 2, 3, 4, 1), torch.ones(1, 4, 1, 1, 1)), "conv3d"),
        (lambda: torch.flatten(x, 1), "flatten"),
        (lambda: x.sum(), "sum"),
        (lambda: x[0], "getitem"),
        (lambda: F.layer_norm(x, (4,)), "layer_norm"),
    ]:
        with pytest.raises(NotImplementedError, match=name):
            call()


def test_semantics_travel_through_a_network(ragged_mask) -> None:
    semantics = Semantics(coarse="every", max_pool="ignore")
    net = nn.Sequential(nn.Conv3d(1, 2, 3, 2, 1), nn.BatchNorm3d(2), nn.ReLU(), nn.MaxPool3d(2))
    y = net(
        BlockSparseTensor.from_dense(torch.randn(3, 1, 8, 8, 8), ragged_mask((4, 4, 4)), semantics)
    )
    assert y.semantics == semantics
    assert y.level.n_blocks == 3 * 8  # coarser than the cell: every voxel


def test_gradients_reach_the_dense_input_and_only_its_visible_part(ragged_mask) -> None:
    mask = ragged_mask((2, 2, 2))
    dense = torch.randn(3, 1, 8, 8, 8, requires_grad=True)
    net = nn.Sequential(nn.Conv3d(1, 4, 3, 1, 1), nn.InstanceNorm3d(4), nn.LeakyReLU(inplace=True))
    y = net(BlockSparseTensor.from_dense(dense, mask))
    assert y.requires_grad and y.grad_fn is not None
    y.features.square().sum().backward()
    shown = reference.voxel_mask(mask.level((8, 8, 8)))
    assert dense.grad[~shown].abs().sum() == 0
    assert dense.grad[shown].abs().sum() > 0
    assert not net(BlockSparseTensor.from_dense(dense, mask)).detach().requires_grad


def test_deepcopy_keeps_values_and_mask(x) -> None:
    twin = copy.deepcopy(x)
    assert torch.equal(twin.to_dense(), x.to_dense())
    assert twin.features is not x.features
    stored = io.BytesIO()
    torch.save(x, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)  # a class of ours: not for untrusted files
    assert torch.equal(loaded.to_dense(), x.to_dense()) and loaded.mask.equals(x.mask)


def test_non_reentrant_checkpointing_gives_the_same_gradients(ragged_mask) -> None:
    from torch.utils.checkpoint import checkpoint

    mask = ragged_mask((2, 2, 2))
    net = nn.Sequential(nn.Conv3d(2, 3, 3, 1, 1), nn.InstanceNorm3d(3), nn.ReLU())
    grads = []
    for run in (net, lambda t: checkpoint(net, t, use_reentrant=False)):
        dense = torch.ones(3, 2, 4, 4, 4).cumsum(2).requires_grad_()
        run(BlockSparseTensor.from_dense(dense, mask)).features.square().sum().backward()
        grads.append(dense.grad)
    assert torch.equal(*grads)
