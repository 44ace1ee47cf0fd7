"""Max and average pooling on packed blocks: both parities, values, gradients, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from medspark.sparse import (
    BlockMask,
    BlockSparseTensor,
    Semantics,
    launches,
    reference,
    use_backend,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

WINDOWS = {
    "k3 s2 p1": {"kernel_size": 3, "stride": 2, "padding": 1},
    "k2 s2": {"kernel_size": 2},
    "k3 s1 p1": {"kernel_size": 3, "stride": 1, "padding": 1},
    "anisotropic": {"kernel_size": (1, 2, 3), "stride": (1, 2, 1), "padding": (0, 0, 1)},
}


def run(function, x, mask, backend, semantics, window, **more) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    with use_backend(backend):
        y = function(
            BlockSparseTensor.from_dense(leaf, mask, semantics), **window, **more
        ).to_dense()
        seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        y.backward(seed.bfloat16().to(y.dtype))
    assert leaf.grad is not None
    return y.detach(), leaf.grad


def volume(mask: BlockMask, size: tuple[int, ...], shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(mask.batch_size, 5, *size, generator=generator) + shift
    return x.bfloat16().double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("hidden", ["zero", "ignore"])
def test_max_pool(name, hidden, dtype, ragged_mask, assert_as_accurate) -> None:
    mask = ragged_mask((2, 2, 2))
    x = volume(mask, (4, 4, 4), shift=-0.5)  # mostly negative, so that hidden zeros matter
    semantics = Semantics(max_pool=hidden)
    args = (mask, "reference", semantics, WINDOWS[name])
    exact = run(F.max_pool3d, x, *args)
    torchs = run(F.max_pool3d, x.to(dtype), *args)
    before = launches().get("max_pool3d", 0)
    own = run(F.max_pool3d, x.to(dtype), mask, "native", semantics, WINDOWS[name])
    assert launches()["max_pool3d"] == before + 1
    for a, b, c in zip(own, torchs, exact, strict=True):
        assert_as_accurate(a, b, c)


def test_ties_with_hidden_zeros_send_the_gradient_where_torch_sends_it(ragged_mask) -> None:
    mask = ragged_mask((2, 2, 2))
    x = volume(mask, (4, 4, 4)).relu()
    args = (Semantics(), {"kernel_size": 3, "stride": 2, "padding": 1})
    own = run(F.max_pool3d, x, mask, "native", *args)
    oracle = run(F.max_pool3d, x, mask, "reference", *args)
    assert torch.equal(own[0], oracle[0])
    assert torch.equal(own[1], oracle[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("divisor", ["kernel", "active"])
def test_avg_pool(name, divisor, dtype, ragged_mask, assert_as_accurate) -> None:
    mask = ragged_mask((2, 2, 2))
    x = volume(mask, (4, 4, 4))
    semantics = Semantics(avg_divisor=divisor)
    for more in ({}, {"count_include_pad": False}, {"divisor_override": 5}):
        exact = run(F.avg_pool3d, x, mask, "reference", semantics, WINDOWS[name], **more)
        torchs = run(F.avg_pool3d, x.to(dtype), mask, "reference", semantics, WINDOWS[name], **more)
        own = run(F.avg_pool3d, x.to(dtype), mask, "native", semantics, WINDOWS[name], **more)
        for a, b, c in zip(own, torchs, exact, strict=True):
            assert_as_accurate(a, b, c, f"{more}")


def test_ceil_mode_follows_torch() -> None:
    mask = BlockMask(torch.ones(1, 1, 1, 1, dtype=torch.bool))
    for n, k, s, p in itertools.product((4, 6), (2, 3), (2,), (0, 1)):
        if p > k // 2:
            continue
        x = torch.randn(1, 2, n, n, n)
        dense = F.max_pool3d(x, k, s, p, ceil_mode=True)
        if dense.shape[-1] * s != n:
            continue
        sparse = F.max_pool3d(BlockSparseTensor.from_dense(x, mask), k, s, p, ceil_mode=True)
        assert torch.equal(sparse.to_dense(), dense)
        own = F.avg_pool3d(BlockSparseTensor.from_dense(x, mask), k, s, p, ceil_mode=True)
        assert torch.allclose(own.to_dense(), F.avg_pool3d(x, k, s, p, ceil_mode=True), atol=1e-6)


def test_image_pools() -> None:
    mask = BlockMask(torch.tensor([[[True, False], [True, True]]]))
    x = torch.randn(1, 3, 4, 8)
    for function in (F.max_pool2d, F.avg_pool2d):
        own = function(BlockSparseTensor.from_dense(x, mask), 2).to_dense()
        shown = mask.visible.repeat_interleave(1, 1).repeat_interleave(2, 2)[:, None]
        masked = x * mask.visible.repeat_interleave(2, 1).repeat_interleave(4, 2)[:, None]
        assert torch.allclose(own, torch.where(shown, function(masked, 2), 0.0))


def test_window_without_active_voxel_gives_zero() -> None:
    visible = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    mask = BlockMask(visible)
    x = torch.randn(1, 2, 2, 2, 2)
    semantics = Semantics(coarse="every", max_pool="ignore", avg_divisor="active")
    sparse = BlockSparseTensor.from_dense(x, mask, semantics)
    for function in (F.max_pool3d, F.avg_pool3d):
        y = function(sparse, 2)
        assert y.level.n_blocks == 1
        assert y.features.abs().sum() == 0


@pytest.mark.parametrize("function", [F.max_pool3d, F.avg_pool3d])
def test_hidden_voxels_change_nothing(function, ragged_mask) -> None:
    mask = ragged_mask((2, 2, 2))
    x = volume(mask, (4, 4, 4)).float()
    hidden = ~reference.voxel_mask(mask.level((4, 4, 4)))
    clean, dirty = (
        function(BlockSparseTensor.from_dense(torch.where(hidden, v, x), mask), 3, 2, 1).features
        for v in (0.0, torch.nan)
    )
    assert torch.equal(clean, dirty)


def test_gradcheck(ragged_mask) -> None:
    mask = ragged_mask((2, 2, 2), batch=1)
    x = volume(mask, (4, 4, 4)) + torch.rand(1, 5, 4, 4, 4).double()  # no ties
    features = BlockSparseTensor.from_dense(x, mask).features.requires_grad_()
    for function in (F.max_pool3d, F.avg_pool3d):
        f = lambda t, g=function: g(BlockSparseTensor(t, mask, (4, 4, 4)), 3, 2, 1).features  # noqa: E731
        assert torch.autograd.gradcheck(f, (features,), fast_mode=True)


def test_errors(ragged_mask) -> None:
    mask = ragged_mask((2, 2, 2))
    x = BlockSparseTensor.from_dense(volume(mask, (4, 4, 4)), mask)
    with pytest.raises(NotImplementedError, match="indices"):
        F.max_pool3d(x, 2, return_indices=True)
    with pytest.raises(ValueError, match="does not map"):
        F.max_pool3d(x, 3, 1)
