"""Batch and instance norm over active voxels: values, gradients, running statistics, odd counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medspark.sparse import BlockMask, BlockSparseTensor, launches, use_backend

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

NORMS = {
    "batch": nn.BatchNorm3d(6),
    "batch without affine": nn.BatchNorm3d(6, affine=False),
    "instance": nn.InstanceNorm3d(6, affine=True),
    "group": nn.GroupNorm(3, 6),
    "one group": nn.GroupNorm(1, 6, affine=False),
    "instance, running": nn.InstanceNorm3d(6, track_running_stats=True),
}


def run(name, x, mask, backend, dtype) -> list[torch.Tensor]:
    import copy

    norm = copy.deepcopy(NORMS[name]).to(torch.float64 if dtype == torch.float64 else torch.float32)
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 1.5, 6))
            norm.bias.copy_(torch.linspace(-1, 1, 6))
    leaf = x.to(dtype).requires_grad_()
    with use_backend(backend):
        y = norm(BlockSparseTensor.from_dense(leaf, mask)).to_dense()
        seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
        y.backward(seed.to(y.dtype))
    buffers = [b for n, b in norm.named_buffers() if "num" not in n]
    return [y.detach(), leaf.grad, *(p.grad for p in norm.parameters()), *buffers]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_native_equals_reference(name, dtype, ragged_mask, assert_as_accurate) -> None:
    mask = ragged_mask((2, 2, 2))
    # Thousands of rows, so that chunks are merged; means that differ from chunk to chunk, and are
    # so far from 0 that a naive variance would lose its digits.
    slope = torch.linspace(0, 40, 16).view(1, 1, 16, 1, 1)
    x = (torch.randn(3, 6, 16, 16, 8) * 3 + 20 + slope).bfloat16()
    exact = run(name, x.double(), mask, "reference", torch.float64)
    torchs = run(name, x, mask, "reference", dtype)
    before = launches().get("norm", 0)
    own = run(name, x, mask, "native", dtype)
    assert launches()["norm"] == before + 1
    for a, b, c in zip(own, torchs, exact, strict=True):
        assert_as_accurate(a, b, c)


def test_batch_norm_equals_torch_on_the_list_of_active_voxels(ragged_mask) -> None:
    mask = ragged_mask((2, 2, 2))
    x = BlockSparseTensor.from_dense(torch.randn(3, 6, 4, 4, 4).double(), mask)
    sparse, dense = nn.BatchNorm3d(6).double(), nn.BatchNorm1d(6).double()
    y, expected = sparse(x), dense(x.features.reshape(-1, 6))
    assert torch.allclose(y.features.reshape(-1, 6), expected, atol=1e-12)
    assert torch.allclose(sparse.running_mean, dense.running_mean)
    assert torch.allclose(sparse.running_var, dense.running_var)
    sparse.eval(), dense.eval()
    assert torch.equal(sparse(x).features.reshape(-1, 6), dense(x.features.reshape(-1, 6)))


def test_group_norm_of_a_visible_volume_is_torchs() -> None:
    mask = BlockMask(torch.ones(2, 2, 2, 2, dtype=torch.bool))
    norm = nn.GroupNorm(3, 6).double()
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 4, 4, 4).double()
    for backend in ("native", "reference"):
        with use_backend(backend):  # type: ignore[arg-type]
            assert torch.allclose(norm(BlockSparseTensor.from_dense(x, mask)).to_dense(), norm(x))


def test_one_active_voxel_is_an_error_and_none_is_not() -> None:
    visible = torch.zeros(2, 2, 2, 2, dtype=torch.bool)
    norm = nn.BatchNorm3d(3)
    empty = norm(BlockSparseTensor.from_dense(torch.randn(2, 3, 2, 2, 2), BlockMask(visible)))
    assert empty.features.shape == (0, 1, 1, 1, 3)
    assert torch.equal(norm.running_mean, torch.zeros(3))
    visible = visible.clone()
    visible[0, 0, 0, 0] = True
    one = BlockSparseTensor.from_dense(torch.randn(2, 3, 2, 2, 2), BlockMask(visible))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(one)
    norm.eval()(one)
    assert torch.equal(nn.InstanceNorm3d(3)(one).features, torch.zeros(1, 1, 1, 1, 3))


def test_same_bits_for_any_number_of_threads() -> None:
    mask = BlockMask.random(2, (4, 4, 4), 0.5, torch.Generator().manual_seed(0))
    x = torch.randn(2, 6, 32, 32, 32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("batch", x, mask, "native", torch.float32))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("per_sample", [False, True])
def test_gradcheck(per_sample, ragged_mask) -> None:
    from medspark.sparse.ops.norm import norm_features

    mask = ragged_mask((2, 2, 2))
    x = BlockSparseTensor.from_dense(torch.randn(3, 2, 2, 2, 4).double(), mask)
    features, weight, bias = (
        t.requires_grad_()
        for t in (x.features, torch.rand(2).double() + 0.5, torch.rand(2).double())
    )

    def f(features, weight, bias):
        return norm_features(x.with_features(features), weight, bias, 1e-5, per_sample)[0]

    assert torch.autograd.gradcheck(f, (features, weight, bias), fast_mode=True)
