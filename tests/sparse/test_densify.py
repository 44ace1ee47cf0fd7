"""Gather and densify: exact copies both ways, token gradients, strides."""

from __future__ import annotations

import pytest
import torch

from medspark.sparse import BlockMask, BlockSparseTensor, densify, reference, use_backend

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_densify_is_where(backend, dtype, ragged_mask) -> None:
    mask = ragged_mask((2, 1, 3))
    x = torch.randn(3, 5, 4, 2, 6).to(dtype).requires_grad_()
    token = torch.randn(5).to(dtype).requires_grad_()
    shown = reference.voxel_mask(mask.level((4, 2, 6)))
    seed = torch.randn(3, 5, 4, 2, 6).to(dtype)
    with use_backend(backend):
        dense = densify(BlockSparseTensor.from_dense(x, mask), token)
        dense.backward(seed)
    assert torch.equal(dense, torch.where(shown, x, token.view(1, -1, 1, 1, 1)))
    assert torch.equal(x.grad, torch.where(shown, seed, 0))
    expected = torch.where(shown, 0, seed.double()).sum((0, 2, 3, 4))
    tolerance = torch.finfo(dtype).eps * 24 * expected.abs().max()
    assert (token.grad.double() - expected).abs().max() <= tolerance


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "expanded"])
def test_gather_reads_any_strides(layout, ragged_mask) -> None:
    mask = ragged_mask((2, 2, 2))
    x = torch.randn(3, 4, 4, 4, 4)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    if layout == "transposed":
        x = x.transpose(2, 4)
    if layout == "expanded":
        x = x[:, :1].expand(-1, 4, -1, -1, -1)
    sparse = BlockSparseTensor.from_dense(x, mask)
    assert torch.equal(sparse.features, reference.pack(x.contiguous(), sparse.level))
    assert torch.equal(sparse.to_dense(), torch.where(reference.voxel_mask(sparse.level), x, 0))


def test_gradcheck(ragged_mask) -> None:
    mask = ragged_mask((2, 2, 2))
    x = BlockSparseTensor.from_dense(torch.randn(3, 2, 2, 4, 2).double(), mask)
    token = torch.randn(2).double().requires_grad_()
    f = lambda features, token: densify(x.with_features(features), token)  # noqa: E731
    assert torch.autograd.gradcheck(f, (x.features.requires_grad_(), token), fast_mode=True)
    g = lambda dense: BlockSparseTensor.from_dense(dense, mask).features  # noqa: E731
    assert torch.autograd.gradcheck(
        g, (torch.randn(3, 2, 2, 4, 2).double().requires_grad_(),), fast_mode=True
    )


def test_image(ragged_mask) -> None:
    mask = ragged_mask((2, 3))
    x = torch.randn(3, 2, 4, 6)
    dense = densify(BlockSparseTensor.from_dense(x, mask), torch.full((2,), 9.0))
    shown = mask.visible.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    assert torch.equal(dense, torch.where(shown, x, 9.0))


def test_errors() -> None:
    mask = BlockMask(torch.ones(1, 2, 2, 2, dtype=torch.bool))
    x = BlockSparseTensor.from_dense(torch.randn(1, 3, 4, 4, 4), mask)
    with pytest.raises(ValueError, match="3 elements"):
        densify(x, torch.zeros(4))
    with pytest.raises(ValueError, match="does not fit"):
        BlockSparseTensor.from_dense(torch.randn(2, 3, 4, 4, 4), mask)
    with pytest.raises(ValueError, match="must be"):
        BlockSparseTensor(torch.randn(7, 2, 2, 2, 3), mask, (4, 4, 4))


def test_the_dense_volume_can_be_changed_in_place(ragged_mask) -> None:
    features = BlockSparseTensor.from_dense(torch.randn(3, 2, 4, 4, 4), ragged_mask((2, 2, 2)))
    leaf = features.features.clone().requires_grad_()
    dense = features.with_features(leaf).to_dense()
    assert dense.is_contiguous(memory_format=torch.channels_last_3d)
    torch.relu_(dense).sum().backward()
    assert torch.equal(leaf.grad, (leaf > 0).to(leaf.dtype))
