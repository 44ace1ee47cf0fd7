"""Channels-last views, zero padding, channel slicing, output masks: what networks do between layers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medspark.sparse import (
    BlockMask,
    BlockSparseTensor,
    conv,
    conv_transpose,
    densify,
    reference,
    restrict,
    use_backend,
)
from medspark.sparse.tensor import ChannelsLastView, PaddedView


@pytest.fixture
def x(ragged_mask) -> BlockSparseTensor:
    return BlockSparseTensor.from_dense(torch.randn(3, 4, 8, 8, 8).double(), ragged_mask((2, 2, 2)))


def shown(x: BlockSparseTensor, dense: Tensor) -> Tensor:
    return torch.where(reference.voxel_mask(x.level), dense, 0.0)


class Block(nn.Module):
    """ConvNeXt, arXiv 2201.03545: depthwise, layer norm and perceptron with channels last, layer scale."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        kind = nn.Conv3d if axes == 3 else nn.Conv2d
        self.depthwise = kind(channels, channels, 7, padding=3, groups=channels)
        self.norm, self.gamma = nn.LayerNorm(channels), nn.Parameter(torch.rand(channels))
        self.grow, self.shrink = (
            nn.Linear(channels, 3 * channels),
            nn.Linear(3 * channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        last = (0, *range(2, x.ndim), 1)
        back = (0, x.ndim - 1, *range(1, x.ndim - 1))
        y = self.norm(self.depthwise(x).permute(last))
        y = self.gamma * self.shrink(F.gelu(self.grow(y)))
        drop = torch.full((x.shape[0], *(1,) * (x.ndim - 1)), 1.25, dtype=y.dtype)
        return x + y.permute(*back) * drop


@pytest.mark.parametrize("axes", [2, 3])
def test_channels_last_blocks_equal_the_oracle(axes, ragged_mask) -> None:
    block = Block(4, axes).double()
    dense = torch.randn(3, 4, *(8,) * axes).double()
    mask = ragged_mask((2,) * axes)
    runs = []
    for backend in ("native", "reference"):
        leaf = dense.clone().requires_grad_()
        block.zero_grad()
        with use_backend(backend):  # type: ignore[arg-type]
            sparse = BlockSparseTensor.from_dense(leaf, mask)
            y = block(sparse).to_dense()
            y.square().sum().backward()
        runs.append([y.detach(), leaf.grad, *(p.grad for p in block.parameters())])
    for a, b in zip(*runs, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    # Voxel by voxel the perceptron is torch's own: with everything visible the block is.
    whole = BlockMask(torch.ones(3, *(2,) * axes, dtype=torch.bool))
    assert torch.allclose(
        block(BlockSparseTensor.from_dense(dense, whole)).to_dense(), block(dense)
    )


def test_a_channels_last_view_keeps_memory_and_shape(x) -> None:
    view = x.permute(0, 2, 3, 4, 1)
    assert isinstance(view, ChannelsLastView) and view.shape == (3, 8, 8, 8, 4)
    assert view.features is x.features and view.size(-1) == 4
    assert torch.equal(view.permute(0, 4, 1, 2, 3).to_dense(), x.to_dense())
    assert torch.equal(x.movedim(1, -1).movedim(-1, 1).to_dense(), x.to_dense())
    wide = F.linear(view, torch.ones(6, 4).double())
    assert wide.shape == (3, 8, 8, 8, 6)
    scaled = view * torch.arange(4.0).double()
    expected = x.to_dense() * torch.arange(4.0).view(1, 4, 1, 1, 1)
    assert torch.equal(scaled.permute(0, 4, 1, 2, 3).to_dense(), expected)
    with pytest.raises(ValueError, match="same layout"):
        view + x
    with pytest.raises(NotImplementedError, match="to the end and back"):
        x.permute(0, 1, 4, 3, 2)
    with pytest.raises(NotImplementedError, match="per voxel"):
        F.layer_norm(view, (8, 4))
    with pytest.raises(NotImplementedError, match="permute the channels back"):
        view.to_dense()


PADS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "even stride": ((0, 1, 0, 1, 0, 1), lambda t: F.conv3d(t, W[..., :3, :3, :3], None, 2)),
    "one axis": ((1, 1), lambda t: F.conv3d(t, W[..., :1, :1, :3], None, 1)),
    "beside own padding": ((0, 2, 0, 2, 0, 2), lambda t: F.conv3d(t, W, None, 1, 1)),
}
W = torch.randn(5, 4, 5, 5, 5, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", PADS)
def test_zero_padding_is_part_of_the_next_convolution(x, name, backend) -> None:
    pad, function = PADS[name]
    with use_backend(backend):
        padded = F.pad(x, pad)
        assert isinstance(padded, PaddedView)
        assert padded.shape == F.pad(x.to_dense(), pad).shape
        y = function(padded)
    assert type(y) is BlockSparseTensor
    assert torch.allclose(y.to_dense(), shown(y, function(F.pad(x.to_dense(), pad))), atol=1e-10)
    again = function(F.pad(F.pad(x, pad[:2]), (0, 0, *pad[2:])))
    assert torch.allclose(again.to_dense(), y.to_dense(), atol=1e-10)


def test_padding_that_cannot_be_redeemed_is_refused(x) -> None:
    assert F.pad(x, (0, 0, 0, 0)) is x
    for call in (
        lambda: F.pad(x, (1, 1), value=1.0),
        lambda: F.pad(x, (1, 1), mode="reflect"),
        lambda: F.pad(x, (-1, 1)),
        lambda: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 1)),
    ):
        with pytest.raises(NotImplementedError, match="pad the volume before"):
            call()
    with pytest.raises(NotImplementedError, match="followed by a convolution"):
        F.relu(F.pad(x, (1, 1)))


def test_views_survive_hooks_and_copies_but_not_files(x) -> None:
    pad = nn.ConstantPad3d((0, 1, 0, 1, 0, 1), 0.0)
    pad.register_full_backward_hook(lambda module, given, out: None)
    leaf = x.with_features(x.features.clone().requires_grad_() * 1)
    hooked = pad(leaf)  # passes through an autograd.Function, which gives back what it is given
    assert isinstance(hooked, PaddedView) and hooked.shape == (3, 4, 9, 9, 9)
    expected = F.conv3d(F.pad(x, (0, 1, 0, 1, 0, 1)), W[..., :3, :3, :3], None, 2)
    assert torch.equal(
        F.conv3d(hooked, W[..., :3, :3, :3], None, 2).to_dense(), expected.to_dense()
    )
    for view in (F.pad(x, (0, 1)), x.permute(0, 2, 3, 4, 1)):
        twin = copy.deepcopy(view)
        assert type(twin) is type(view) and twin.shape == view.shape
        with pytest.raises(NotImplementedError, match="cannot be stored"):
            torch.save(view, io.BytesIO())


def test_same_padding_with_an_even_kernel(x) -> None:
    weight = W[..., :2, :4, :3]
    y = F.conv3d(x, weight, padding="same")
    assert torch.allclose(y.to_dense(), shown(y, F.conv3d(x.to_dense(), weight, padding="same")))
    one = F.conv3d(x, W[..., :1, :1, :1], padding="valid")
    assert torch.allclose(one.to_dense(), shown(one, F.conv3d(x.to_dense(), W[..., :1, :1, :1])))


def test_drop_path_as_networks_write_it(x) -> None:
    factor = x.new_empty((3, 1, 1, 1, 1)).bernoulli_(0.5)
    assert type(factor) is Tensor and factor.dtype == torch.float64
    assert torch.equal((x.div(0.5) * factor).to_dense(), x.to_dense() / 0.5 * factor)
    assert torch.equal(torch.ones_like(x).to_dense(), shown(x, torch.ones_like(x.to_dense())))


def test_channels_can_be_sliced_and_repeated(x) -> None:
    dense = x.to_dense()
    for a, b in zip(x.chunk(2, dim=1), dense.chunk(2, dim=1), strict=True):
        assert torch.equal(a.to_dense(), b)
    for a, b in zip(torch.split(x, [1, 3], dim=1), dense.split([1, 3], dim=1), strict=True):
        assert torch.equal(a.to_dense(), b)
    assert torch.equal(x[:, 1:3].to_dense(), dense[:, 1:3]) and x[:, :] is x
    assert torch.equal(x.repeat(1, 2, 1, 1, 1).to_dense(), dense.repeat(1, 2, 1, 1, 1))
    for call in (
        lambda: x[0],
        lambda: x[:, :, :4],
        lambda: x.chunk(2),
        lambda: x.repeat(2, 1, 1, 1, 1),
    ):
        with pytest.raises(NotImplementedError, match="channels"):
            call()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", ["same size", "stride 2", "transposed"])
def test_output_masks_choose_what_is_computed(x, kind, backend) -> None:
    out_mask = BlockMask.random(3, (4, 4, 4), 0.7, torch.Generator().manual_seed(3))
    weight = W[:4, :, :4, :4, :4] if kind == "transposed" else W[..., :3, :3, :3]
    options = {"padding": 1, "stride": 1 if kind == "same size" else 2}
    leaf = x.to_dense().requires_grad_()
    with use_backend(backend):
        sparse = BlockSparseTensor.from_dense(leaf, x.mask)
        function = conv_transpose if kind == "transposed" else conv
        y = function(sparse, weight, None, **options, out_mask=out_mask)
        seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(4)).double()
        y.to_dense().backward(seed)
    assert y.mask is out_mask
    twin = x.to_dense().requires_grad_()
    dense = (F.conv_transpose3d if kind == "transposed" else F.conv3d)(
        twin, weight, None, **options
    )
    expected = shown(y, dense)
    assert torch.allclose(y.to_dense(), expected, atol=1e-10)
    expected.backward(seed)
    assert torch.allclose(leaf.grad, shown(x, twin.grad), atol=1e-10)


def test_densify_onto_a_mask_and_restrict_back(x) -> None:
    token = torch.arange(4.0).double()
    other = BlockMask(torch.ones(3, 4, 4, 4, dtype=torch.bool))
    filled = densify(x, token, other)
    assert isinstance(filled, BlockSparseTensor)
    assert torch.equal(filled.to_dense(), densify(x, token))
    assert torch.equal(restrict(filled, x.mask).to_dense(), x.to_dense())
    with pytest.raises(ValueError, match="batch"):
        conv(x, W[..., :3, :3, :3], padding=1, out_mask=BlockMask(torch.ones(1, 2, 2, 2) > 0))
