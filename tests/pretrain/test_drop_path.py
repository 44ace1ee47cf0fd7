"""Stochastic depth by hooks is what a network with its own would do."""

import copy

import pytest
import torch
from torch import nn

from medspark.models import SparK, create_encoder
from medspark.pretrain.drop_path import branch_ends, drop_path, drop_rates
from medspark.sparse import BlockMask, BlockSparseTensor

ENCODERS = {
    "resnet18": {"block_inplanes": [4, 4, 8, 8], "feed_forward": False},
    "resnet50": {"block_inplanes": [2, 2, 4, 4], "feed_forward": False},
    "resenc": {
        "features_per_stage": [4, 4, 8],
        "strides": [1, 2, 2],
        "n_blocks_per_stage": [1, 2, 2],
    },
}
BLOCKS = {"resnet18": 8, "resnet50": 16, "resenc": 5}


def encoder_of(name):
    """In evaluation mode, so that a sample does not depend on the others; every branch does much."""
    torch.manual_seed(0)
    net = create_encoder(name, **ENCODERS[name]).double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm3d | nn.InstanceNorm3d) and module.affine:
            nn.init.normal_(module.weight, 1.0, 0.3)
    return net


def features(net, x):
    """What leaves the last residual block."""
    found = []
    block = [m for m in net.modules() if type(m).__name__ in
             ("ResNetBlock", "ResNetBottleneck", "BasicBlockD", "BottleneckD")][-1]  # fmt: skip
    handle = block.register_forward_hook(lambda m, a, out: found.append(out))
    net(x)
    handle.remove()
    return found[0]


class Scaled(nn.Module):
    """The last module of a branch times a constant: what drop path must amount to for one sample."""

    def __init__(self, inner, factor):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x):
        return self.inner(x) * self.factor


def by_hand(net, kept, rates, x):
    """A copy of the network whose branches are multiplied one by one."""
    twin = copy.deepcopy(net)
    for end, k, p in zip(branch_ends(twin), kept, rates, strict=True):
        parent = next(m for m in twin.modules() if end in m.children())
        name = next(n for n, c in parent.named_children() if c is end)
        setattr(parent, name, Scaled(end, float(k) / (1 - p)))
    return features(twin, x)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
def test_each_sample_loses_the_branches_that_were_drawn(name, sparse):
    net = encoder_of(name)
    blocks = BLOCKS[name]
    assert len(branch_ends(net)) == blocks
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 1, 64, 32, 32, generator=generator, dtype=torch.float64)
    draws = torch.rand(2, blocks, generator=generator)
    rates = drop_rates(blocks, 0.6)
    kept = draws >= torch.tensor(rates)
    assert not kept.all() and kept[:, 1:].any()

    def wrap(v):
        visible = torch.zeros(len(v), 2, 1, 1, dtype=torch.bool)
        visible[:, 1] = True
        return BlockSparseTensor.from_dense(v, BlockMask(visible)) if sparse else v

    with torch.no_grad():
        with drop_path(net, 0.6, draws):
            got = features(net, wrap(x))
        for b in range(2):
            alone = by_hand(net, kept[b], rates, wrap(x[b : b + 1]))
            a, e = (t.to_dense() if sparse else t for t in (got, alone))
            assert torch.allclose(a[b], e[0], rtol=1e-9, atol=1e-11)
        plain = features(net, wrap(x))
        a, p = (t.to_dense() if sparse else t for t in (got, plain))
        assert not torch.allclose(a, p, rtol=1e-3)


def test_leaves_nothing_behind_and_changes_no_key():
    spark = SparK.build("resnet10", encoder_kwargs={"block_inplanes": [4, 4, 4, 4]}, width=32)
    keys = list(spark.state_dict())
    with drop_path(spark.encoder, 0.5, torch.rand(2, 4)):
        assert list(spark.state_dict()) == keys
    assert all(not m._forward_hooks for m in spark.modules())
    with pytest.raises(KeyError, match="x"), drop_path(spark.encoder, 0.5, torch.rand(2, 4)):
        raise KeyError("x")
    assert all(not m._forward_hooks for m in spark.modules())


def test_rates_rise_from_the_first_block_to_the_last():
    assert drop_rates(5, 0.2) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert drop_rates(1, 0.2) == [0]


def test_expectation_stays():
    """Over all draws a branch contributes as much as without."""
    rate = drop_rates(2, 0.3)[1]
    draws = torch.arange(1000) / 1000
    assert ((draws >= rate) / (1 - rate)).mean().item() == pytest.approx(1.0, abs=2e-3)


def test_unknown_networks_and_wrong_draws_are_told():
    with pytest.raises(ValueError, match="Sequential has none of them"):
        branch_ends(nn.Sequential(nn.Conv3d(1, 1, 1)))
    with (
        pytest.raises(ValueError, match=r"draws \(2, 3\) should be \[B, 8\]"),
        drop_path(encoder_of("resnet18"), 0.1, torch.rand(2, 3)),
    ):
        pass
