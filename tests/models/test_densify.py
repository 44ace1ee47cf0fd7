"""Densify: norm over visible voxels, then the token, then the projection."""

import pytest
import torch
from torch import nn

from medspark.models import Densify
from medspark.sparse import BlockMask, BlockSparseTensor


@pytest.fixture(params=[2, 3])
def level(request):
    torch.manual_seed(0)
    dims = request.param
    mask = BlockMask.random(2, (2, 3, 2)[-dims:], 0.6)
    dense = torch.randn(2, 6, *(8, 12, 8)[-dims:]) * 2 + 1
    visible = mask.visible
    for axis in range(1, dims + 1):
        visible = visible.repeat_interleave(4, dim=axis)
    return dense, mask, visible.unsqueeze(1)


def test_norm_then_token_then_projection(level):
    dense, mask, visible = level
    dims = dense.ndim - 2
    densify = Densify(6, 8, dims=dims)
    with torch.no_grad():
        densify.norm.weight.uniform_(0.5, 2)
        densify.norm.bias.uniform_(-1, 1)
    seen = dense.movedim(1, -1)[visible[:, 0]]
    mean, var = seen.mean(0), seen.var(0, correction=0)
    shape = (1, 6, *[1] * dims)
    expected = (dense - mean.view(shape)) / (var.view(shape) + densify.norm.eps).sqrt()
    expected = expected * densify.norm.weight.view(shape) + densify.norm.bias.view(shape)
    expected = torch.where(visible, expected, densify.mask_token.view(shape))
    conv = nn.functional.conv2d if dims == 2 else nn.functional.conv3d
    expected = conv(expected, densify.projection.weight, densify.projection.bias, padding=1)
    got = densify(BlockSparseTensor.from_dense(dense, mask))
    assert type(got) is torch.Tensor
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_instance_norm_is_per_sample(level):
    dense, mask, visible = level
    densify = Densify(6, 6, coarsest=True, norm="instance", dims=dense.ndim - 2)
    got = densify(BlockSparseTensor.from_dense(dense, mask))
    for sample, where in zip(got, visible[:, 0], strict=True):
        torch.testing.assert_close(sample[:, where].mean(1), torch.zeros(6), atol=1e-5, rtol=0)
        variance = sample[:, where].var(1, correction=0)
        torch.testing.assert_close(variance, torch.ones(6), atol=1e-3, rtol=0)


def test_identity_keeps_values_and_puts_the_token(level):
    dense, mask, visible = level
    dims = dense.ndim - 2
    densify = Densify(6, 6, coarsest=True, norm="identity", dims=dims)
    got = densify(BlockSparseTensor.from_dense(dense, mask))
    token = densify.mask_token.view(1, 6, *[1] * dims)
    assert torch.equal(got, torch.where(visible, dense, token))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    ("coarsest", "width", "kernel"), [(True, 8, 1), (False, 8, 3), (False, 6, 3), (True, 6, None)]
)
def test_projection(dims, coarsest, width, kernel):
    projection = Densify(6, width, coarsest=coarsest, dims=dims).projection
    if kernel is None:
        assert isinstance(projection, nn.Identity)
    else:
        assert projection.kernel_size == (kernel,) * dims
        assert projection.bias is not None


def test_token_is_small_and_cut():
    torch.manual_seed(0)
    token = Densify(4096, 4096, coarsest=True).mask_token
    assert token.shape == (4096,)
    assert token.abs().max() <= 0.02
    # a normal of SD .02 cut at one SD has SD .5396 * .02
    assert token.std().item() == pytest.approx(0.5396 * 0.02, rel=0.03)


def test_token_and_features_learn(level):
    dense, mask, _ = level
    densify = Densify(6, 8, dims=dense.ndim - 2)
    x = dense.clone().requires_grad_()
    densify(BlockSparseTensor.from_dense(x, mask)).square().sum().backward()
    assert (densify.mask_token.grad != 0).all()
    assert (x.grad != 0).any()


def test_unknown_norm():
    with pytest.raises(ValueError, match=r"'layer'.*batch, instance, identity"):
        Densify(4, 4, norm="layer")


def test_unknown_number_of_axes():
    with pytest.raises(ValueError, match=r"2 spatial axes .* or 3 .*, not 1"):
        Densify(4, 4, dims=1)
