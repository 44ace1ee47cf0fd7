"""From one active set to another: `restrict`, and `densify_onto` with a token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from medspark.sparse import (
    BlockMask,
    BlockSparseTensor,
    Semantics,
    densify,
    launches,
    reference,
    use_backend,
)
from medspark.sparse.ops.transfer import densify_onto, restrict, transfer_features

# Size of the volume, cells of the input, cells of the output.
GRIDS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "same grid": ((4, 4, 4), (2, 2, 2), (2, 2, 2)),
    "to smaller cells": ((4, 4, 8), (2, 2, 2), (4, 4, 4)),
    "to larger cells": ((4, 4, 8), (4, 4, 4), (1, 2, 2)),
    "cells across": ((6, 6, 12), (2, 3, 4), (3, 2, 6)),
    "level coarser than both": ((2, 2, 2), (4, 4, 4), (8, 4, 2)),
    "image": ((4, 6), (2, 3), (4, 2)),
}


def voxels(mask: BlockMask, size: tuple[int, ...], rule: Any = "any") -> Tensor:
    """Active voxels `[B, 1, ...]` of a level, by the reference."""
    shown = reference.voxel_mask(mask.level(size, rule))
    return shown if len(size) == 3 else shown[:, :, 0]


def data(
    size: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Volume, token and gradient, all of them exact in bfloat16."""
    shapes = ((3, 5, *size), (5,), (3, 5, *size))
    x, token, grad = (torch.randn(shape).bfloat16().to(dtype) for shape in shapes)
    return x.requires_grad_(), token.requires_grad_(), grad


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", GRIDS)
def test_densify_onto_is_where(name, backend, dtype, ragged_mask) -> None:
    size, inner, outer = GRIDS[name]
    mask, out_mask = ragged_mask(inner), BlockMask(ragged_mask(outer, seed=1).visible.roll(1, 0))
    x, token, grad = data(size, dtype)
    with use_backend(backend):
        sparse = BlockSparseTensor.from_dense(x, mask)
        y = densify_onto(sparse, token, out_mask)
        dense = y.to_dense()
        dense.backward(grad)
    assert y.mask is out_mask
    assert y.spatial == size
    there, wanted = voxels(mask, size), voxels(out_mask, size)
    assert (there & wanted).any() and (wanted & ~there).any() and (there & ~wanted).any()
    column = token.view(1, -1, *(1,) * len(size))
    assert torch.equal(dense, torch.where(wanted, torch.where(there, x, column), 0))
    assert torch.equal(x.grad, torch.where(wanted & there, grad, 0))
    filled = torch.where(wanted & ~there, grad.double(), 0).transpose(0, 1).flatten(1)
    # One rounding of the result, and the reference's own summation.
    roundings = 1 if backend == "native" else filled.shape[1] ** 0.5
    limit = roundings * torch.finfo(dtype).eps * filled.abs().sum(1)
    assert ((token.grad.double() - filled.sum(1)).abs() <= limit).all()


@pytest.mark.parametrize("rule", ["any", "all", "majority", "every"])
def test_coarse_rule_of_the_tensor_decides(rule, ragged_mask) -> None:
    mask, out_mask = ragged_mask((4, 4, 4)), ragged_mask((6, 6, 6), seed=2)
    x, token, _ = data((2, 2, 2))
    y = densify_onto(BlockSparseTensor.from_dense(x, mask, Semantics(coarse=rule)), token, out_mask)
    there, wanted = (voxels(m, (2, 2, 2), rule) for m in (mask, out_mask))
    column = token.view(1, -1, 1, 1, 1)
    assert torch.equal(y.to_dense(), torch.where(wanted, torch.where(there, x, column), 0))
    assert y.semantics.coarse == rule


def test_without_token_zero_is_filled_in(ragged_mask) -> None:
    mask, out_mask = ragged_mask((2, 2, 2)), BlockMask(torch.ones(3, 1, 1, 1, dtype=torch.bool))
    x, _, _ = data((4, 4, 4))
    y = densify_onto(BlockSparseTensor.from_dense(x, mask), None, out_mask)
    assert torch.equal(y.to_dense(), torch.where(voxels(mask, (4, 4, 4)), x, 0))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", GRIDS)
def test_restrict_keeps_the_values(name, backend, ragged_mask) -> None:
    size, inner, outer = GRIDS[name]
    cells = ragged_mask(inner)
    shown = voxels(cells, size)
    # Output cells all of whose voxels are active, some of them hidden again.
    kept = shown[:, 0]
    for axis, (n, g) in enumerate(zip(size, outer, strict=True), start=1):
        kept = kept.unflatten(axis, (min(n, g), -1)).all(axis + 1)
        kept = kept.repeat_interleave(max(g // n, 1), axis)
    kept &= torch.rand(kept.shape) < 0.8
    if name == "level coarser than both":
        kept[0] = True
        kept[0] = shown[0, 0].repeat_interleave(4, 0).repeat_interleave(2, 1)
    out_mask = BlockMask(kept)
    x, _, grad = data(size)
    with use_backend(backend):
        y = restrict(BlockSparseTensor.from_dense(x, cells), out_mask)
        dense = y.to_dense()
        dense.backward(grad)
    wanted = voxels(out_mask, size)
    assert wanted.any() and y.mask is out_mask
    assert torch.equal(dense, torch.where(wanted, x, 0))
    assert torch.equal(x.grad, torch.where(wanted, grad, 0))


def test_restrict_counts_what_is_missing_and_names_the_way_out() -> None:
    mask = BlockMask(torch.tensor([[[[True, False]]], [[[True, True]]]]))
    x = BlockSparseTensor.from_dense(torch.randn(2, 3, 2, 2, 12), mask)
    asks = BlockMask(torch.tensor([[[[True, True, False]]], [[[True, True, True]]]]))
    with pytest.raises(ValueError, match=r"8 of the 80 .*\(2, 2, 12\).*densify\(x, token, mask\)"):
        restrict(x, asks)
    with pytest.raises(ValueError, match="24 of the 72"):
        restrict(x, BlockMask(torch.tensor([[[[False, True]]], [[[True, True]]]])))
    allowed = BlockMask(torch.tensor([[[[True, False, False]]], [[[True, True, True]]]]))
    assert restrict(x, allowed).features.shape == (4, 2, 2, 4, 3)


def test_restrict_twice_is_restrict_once(ragged_mask) -> None:
    x = BlockSparseTensor.from_dense(torch.randn(3, 2, 4, 4, 4), ragged_mask((2, 2, 2)))
    none = BlockMask(torch.zeros(3, 2, 2, 2, dtype=torch.bool))
    assert restrict(x, x.mask).features.equal(x.features)
    assert restrict(restrict(x, x.mask), none).features.shape == (0, 2, 2, 2, 2)


def test_gradcheck(ragged_mask) -> None:
    x = BlockSparseTensor.from_dense(torch.randn(3, 2, 2, 4, 2).double(), ragged_mask((2, 2, 2)))
    out = ragged_mask((1, 4, 1), seed=3).level((2, 4, 2))
    token = torch.randn(2).double().requires_grad_()
    f = lambda features, token: transfer_features(x.with_features(features), out, token)  # noqa: E731
    assert torch.autograd.gradcheck(f, (x.features.detach().requires_grad_(), token))


@pytest.mark.parametrize("empty", ["input", "output", "both"])
def test_empty_masks(empty, ragged_mask) -> None:
    none = BlockMask(torch.zeros(3, 2, 2, 2, dtype=torch.bool))
    mask = none if empty != "output" else ragged_mask((2, 2, 2))
    out_mask = none if empty != "input" else ragged_mask((2, 2, 2))
    x, token, grad = data((4, 4, 4))
    dense = densify_onto(BlockSparseTensor.from_dense(x, mask), token, out_mask).to_dense()
    dense.backward(grad)
    wanted = voxels(out_mask, (4, 4, 4))
    assert torch.equal(dense, torch.where(wanted, token.view(1, -1, 1, 1, 1), 0))
    assert not x.grad.any()
    expected = torch.where(wanted, grad, 0).sum((0, 2, 3, 4))
    assert torch.allclose(token.grad, expected, rtol=1e-12, atol=1e-12)


def test_hidden_nan_stays_out(ragged_mask) -> None:
    mask = ragged_mask((2, 2, 2))
    x, token, _ = data((4, 4, 4))
    poisoned = torch.where(voxels(mask, (4, 4, 4)), x.detach(), torch.nan)
    out_mask = BlockMask(torch.ones(3, 1, 1, 1, dtype=torch.bool))
    clean, other = (
        densify_onto(BlockSparseTensor.from_dense(v, mask), token, out_mask).features
        for v in (x, poisoned)
    )
    assert torch.equal(clean, other) and torch.isfinite(other).all()


def test_same_bits_for_any_number_of_threads(ragged_mask) -> None:
    mask = ragged_mask((4, 4, 4))
    whole = BlockMask(torch.ones(3, 1, 1, 1, dtype=torch.bool))
    results = []
    before = torch.get_num_threads()
    for n in (1, 3):
        torch.manual_seed(0)
        x, token, grad = (t.detach().float() for t in data((16, 16, 16)))
        token.requires_grad_()
        torch.set_num_threads(n)
        y = densify_onto(BlockSparseTensor.from_dense(x, mask), token, whole).to_dense()
        y.backward(grad)
        results.append((y.detach(), token.grad))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_kernels_run(ragged_mask) -> None:
    x, token, grad = data((4, 4, 4))
    before = launches()
    y = densify_onto(
        BlockSparseTensor.from_dense(x, ragged_mask((2, 2, 2))), token, ragged_mask((4, 4, 4))
    )
    y.to_dense().backward(grad)
    count = {k: launches()[k] - before.get(k, 0) for k in ("transfer", "sum_untransferred")}
    assert count == {"transfer": 2, "sum_untransferred": 1}


def test_densify_with_a_mask_is_densify_onto(ragged_mask) -> None:
    x, token, _ = data((4, 4, 4))
    sparse, out_mask = (
        BlockSparseTensor.from_dense(x, ragged_mask((2, 2, 2))),
        ragged_mask((4, 1, 2)),
    )
    y = densify(sparse, token, out_mask)
    assert y.mask is out_mask
    assert torch.equal(y.features, densify_onto(sparse, token, out_mask).features)


@pytest.mark.parametrize("function", [restrict, lambda x, m: densify_onto(x, None, m)])
def test_a_mask_that_does_not_fit_is_an_error(function) -> None:
    mask = BlockMask(torch.ones(1, 2, 2, 2, dtype=torch.bool))
    x = BlockSparseTensor.from_dense(torch.randn(1, 3, 4, 4, 4), mask)
    with pytest.raises(ValueError, match="batch 2 does not fit"):
        function(x, BlockMask(torch.ones(2, 2, 2, 2, dtype=torch.bool)))
    with pytest.raises(ValueError, match=r"\(4, 4, 4\) does not map onto the \(3, 2, 2\) cells"):
        function(x, BlockMask(torch.ones(1, 3, 2, 2, dtype=torch.bool)))
    with pytest.raises(ValueError, match=r"does not map onto the \(2, 2\) cells"):
        function(x, BlockMask(torch.ones(1, 2, 2, dtype=torch.bool)))
    with pytest.raises(ValueError, match="3 elements"):
        densify_onto(x, torch.zeros(4), mask)
