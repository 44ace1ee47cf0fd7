"""Means and maxima over each sample's active voxels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from medspark.sparse import BlockSparseTensor, reference, use_backend

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def run(x, mask, backend, maximum, dtype):
    leaf = x.to(dtype).requires_grad_()
    pool = F.adaptive_max_pool3d if maximum else F.adaptive_avg_pool3d
    with use_backend(backend):
        y = pool(BlockSparseTensor.from_dense(leaf, mask), 1)
        y.backward(torch.arange(1.0, y.numel() + 1).view(y.shape).to(y.dtype))
    return y.detach(), leaf.grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("maximum", [False, True])
def test_native_equals_reference(maximum, dtype, ragged_mask, assert_as_accurate) -> None:
    mask = ragged_mask((2, 2, 2))
    x = torch.randn(3, 70, 4, 4, 4).bfloat16()
    exact = run(x.double(), mask, "reference", maximum, torch.float64)
    torchs = run(x, mask, "reference", maximum, dtype)
    own = run(x, mask, "native", maximum, dtype)
    assert own[0].shape == (3, 70, 1, 1, 1) and not isinstance(own[0], BlockSparseTensor)
    # bfloat16 ties: the reference may share a gradient between equal maxima, the kernel picks the first.
    pairs = list(zip(own, torchs, exact, strict=True))
    for a, b, c in pairs if not maximum else pairs[:1]:
        assert_as_accurate(a, b, c)
    assert own[0][1].abs().sum() == 0  # a sample without active voxels


def test_maximum_sends_the_gradient_to_one_voxel(ragged_mask) -> None:
    mask = ragged_mask((2, 2, 2))
    x = torch.randn(3, 4, 4, 4, 4)
    y, grad = run(x, mask, "native", True, torch.float32)
    for b in (0, 2):
        for c in range(4):
            where = grad[b, c].nonzero()
            assert len(where) == 1
            assert x[b, c][tuple(where[0])] == y[b, c, 0, 0, 0]
            assert grad[b, c][tuple(where[0])] == b * 4 + c + 1


def test_mean_over_space_is_the_same(ragged_mask) -> None:
    mask = ragged_mask((2, 2, 2))
    x = BlockSparseTensor.from_dense(torch.randn(3, 5, 4, 4, 4), mask)
    pooled = F.adaptive_avg_pool3d(x, 1)
    assert torch.equal(x.mean((2, 3, 4), keepdim=True), pooled)
    assert torch.equal(x.mean((-1, -2, -3)), pooled.flatten(1))
    assert torch.equal(x.amax((2, 3, 4)), F.adaptive_max_pool3d(x, 1).flatten(1))
    with pytest.raises(NotImplementedError, match="spatial axes"):
        x.mean((1, 2))
    with pytest.raises(NotImplementedError, match="size 1 only"):
        F.adaptive_avg_pool3d(x, 2)


@pytest.mark.parametrize("maximum", [False, True])
def test_gradcheck(maximum, ragged_mask) -> None:
    from medspark.sparse.ops.global_pool import global_pool

    mask = ragged_mask((2, 2, 2))
    x = BlockSparseTensor.from_dense(torch.randn(3, 3, 4, 4, 4).double(), mask)
    f = lambda t: global_pool(x.with_features(t), maximum)  # noqa: E731
    assert torch.autograd.gradcheck(f, (x.features.requires_grad_(),), fast_mode=True)


def test_sums_norms_and_channel_reductions(ragged_mask) -> None:
    mask = ragged_mask((2, 2, 2))
    dense = torch.randn(3, 5, 4, 4, 4, dtype=torch.float64)
    x = BlockSparseTensor.from_dense(dense, mask)
    shown = torch.where(reference.voxel_mask(x.level), dense, 0.0)
    assert torch.allclose(x.sum((2, 3, 4)), shown.sum((2, 3, 4)))
    length = torch.norm(x, p=2, dim=(-3, -2, -1), keepdim=True)
    assert torch.allclose(length, torch.norm(shown, p=2, dim=(-3, -2, -1), keepdim=True))
    assert torch.allclose(x.mean(1, keepdim=True).to_dense(), shown.mean(1, keepdim=True))
    assert torch.allclose(x.norm(dim=1, keepdim=True).to_dense(), shown.norm(dim=1, keepdim=True))
    features = x.features.clone().requires_grad_()  # sample 1 is empty: no 0 / 0 in the backward
    torch.norm(x.with_features(features), dim=(2, 3, 4)).sum().backward()
    assert torch.isfinite(features.grad).all()
    with pytest.raises(NotImplementedError, match="keepdim=True"):
        x.mean(1)
    with pytest.raises(NotImplementedError, match="p must be 2"):
        torch.norm(x, p=1, dim=(2, 3, 4))
