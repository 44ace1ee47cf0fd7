"""Interpolation of masked volumes: torch's coordinates, values, gradients, levels, errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import medspark.sparse.resize  # noqa: F401  (registers interpolate)
from medspark.sparse import (
    BlockMask,
    BlockSparseTensor,
    Semantics,
    launches,
    reference,
    use_backend,
)
from medspark.sparse.ops.resample3d import axis_table

DEFAULT = Semantics()
ALL = BlockMask(torch.ones(1, 1, 1, 1, dtype=torch.bool))
LINEAR = [{"mode": "trilinear", "align_corners": c} for c in (False, True)]
MODES: list[dict[str, Any]] = [{"mode": "nearest"}, {"mode": "nearest-exact"}, *LINEAR]
# Size and cells of the input, and what is asked for.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "twice": ((4, 4, 4), (2, 2, 2), {"scale_factor": 2}),
    "half": ((8, 8, 8), (2, 2, 2), {"scale_factor": 0.5}),
    "anisotropic": ((2, 6, 4), (2, 3, 1), {"scale_factor": (1, 0.5, 3)}),
    "to any size": ((6, 4, 4), (2, 2, 2), {"size": (10, 6, 2)}),
    "by a crooked scale": ((5, 6, 7), (1, 2, 1), {"scale_factor": (1.7, 1.34, 0.62)}),
    "the same, recomputed": (
        (5, 6, 7),
        (1, 2, 1),
        {"scale_factor": (1.7, 1.34, 0.62), "recompute_scale_factor": True},
    ),
    "to coarse voxels": ((8, 4, 4), (4, 4, 4), {"size": (2, 1, 4)}),
    "from coarse voxels": ((1, 2, 2), (4, 4, 4), {"size": (4, 8, 2)}),
    "to the same size": ((4, 4, 4), (2, 2, 2), {"size": 4}),
}


def run(
    x: Tensor, mask: BlockMask, backend: Any, semantics: Semantics = DEFAULT, **options: Any
) -> tuple[Tensor, Tensor]:
    """Dense result and gradient of the input."""
    leaf = x.clone().requires_grad_()
    with use_backend(backend):
        y = F.interpolate(BlockSparseTensor.from_dense(leaf, mask, semantics), **options).to_dense()
        seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
        y.backward(seed.bfloat16().to(y.dtype))
    assert leaf.grad is not None
    return y.detach(), leaf.grad


def mode_name(options: dict[str, Any]) -> str:
    return "-".join(map(str, options.values()))


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("how", MODES, ids=mode_name)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, how, dtype, ragged_mask, assert_as_accurate) -> None:
    size, grid, what = CASES[name]
    mask = ragged_mask(grid)
    x = torch.randn(3, 5, *size).bfloat16().double()
    exact = run(x, mask, "reference", **what, **how)
    torchs = run(x.to(dtype), mask, "reference", **what, **how)
    before = launches().get("resample3d", 0)
    own = run(x.to(dtype), mask, "native", **what, **how)
    assert launches()["resample3d"] == before + 2
    assert exact[0].any() and exact[1].any()
    for a, b, c in zip(own, torchs, exact, strict=True):
        assert_as_accurate(a, b, c)


def test_reference_equals_torch_on_a_masked_volume(ragged_mask) -> None:
    mask = ragged_mask((2, 2, 2))
    x = torch.randn(3, 2, 4, 4, 4)
    shown = reference.voxel_mask(mask.level((4, 4, 4)))
    wanted = reference.voxel_mask(mask.level((8, 2, 6)))
    for how in MODES:
        y, _ = run(x, mask, "reference", size=(8, 2, 6), **how)
        dense = F.interpolate(torch.where(shown, x, 0), (8, 2, 6), **how)
        assert torch.equal(y, torch.where(wanted, dense, 0))


def test_one_axis_by_hand() -> None:
    x = BlockSparseTensor.from_dense(torch.tensor([1.0, 2, 4, 8]).view(1, 1, 1, 1, 4), ALL)
    finer = F.interpolate(x, (1, 1, 8), mode="trilinear").to_dense().flatten()
    assert finer.tolist() == [1, 1.25, 1.75, 2.5, 3.5, 5, 7, 8]
    corners = F.interpolate(x, (1, 1, 7), mode="trilinear", align_corners=True).to_dense()
    assert torch.allclose(corners.flatten(), torch.tensor([1, 1.5, 2, 3, 4, 6, 8]))
    hidden = BlockMask(torch.tensor([[[[True, False]]]]))
    half = BlockSparseTensor.from_dense(x.to_dense(), hidden)
    edge = F.interpolate(half, (1, 1, 8), mode="trilinear").to_dense().flatten()
    assert edge.tolist() == [1, 1.25, 1.75, 1.5, 0, 0, 0, 0]  # the hidden neighbour counts as 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("how", MODES, ids=mode_name)
def test_coordinates_are_torchs(how, dtype) -> None:
    """Many ratios along one axis; for nearest, every index must be torch's own."""
    sizes = [{"size": (1, 1, n)} for n in (*range(1, 20, 2), 23, 24, 37, 40, 61)]
    scales = [{"scale_factor": (1, 1, s)} for s in (0.3, 0.7, 1.1, 1.5, 2, 2.3, 3, 4.1)]
    asked = [*sizes, *scales, {**scales[1], "recompute_scale_factor": True}]
    for n, what in itertools.product((1, 2, 3, 6, 7, 12, 14, 17, 18, 22, 23, 31), asked):
        if n * what.get("scale_factor", (1, 1, 1))[2] < 1:
            continue
        x = torch.randn(1, 1, 1, 1, n, dtype=dtype)
        dense = F.interpolate(x, **what, **how)
        own = F.interpolate(BlockSparseTensor.from_dense(x, ALL), **what, **how).to_dense()
        if how["mode"] == "trilinear":
            tolerance = 8 * torch.finfo(dtype).eps * x.abs().max().item() * n
            assert torch.allclose(own, dense, rtol=0, atol=tolerance), (n, what)
        else:
            assert torch.equal(own, dense), (n, what)


@pytest.mark.parametrize("how", MODES, ids=mode_name)
def test_transposed_table_is_the_transpose(how) -> None:
    mode = "linear" if how["mode"] == "trilinear" else how["mode"]
    corners = how.get("align_corners", False)
    for inside, outside, scale in ((4, 8, 0.0), (7, 3, 0.0), (5, 8, 1.7), (6, 6, 0.0), (1, 4, 0.0)):
        matrices = []
        for transposed, rows in ((False, outside), (True, inside)):
            args = (inside, outside, mode, corners, scale, transposed)
            start, index, weight = axis_table(*args, torch.float64, torch.device("cpu"))
            assert start[-1] == len(index) == len(weight) and len(start) == rows + 1
            matrix = torch.zeros(rows, inside + outside - rows, dtype=torch.float64)
            row = torch.arange(rows).repeat_interleave(start.diff())
            matrices.append(matrix.index_put((row, index.long()), weight, accumulate=True))
        assert torch.equal(matrices[0], matrices[1].T)
        assert torch.allclose(matrices[0].sum(1), torch.ones(outside, dtype=torch.float64))


@pytest.mark.parametrize("rule", ["any", "all", "majority", "every"])
@pytest.mark.parametrize("how", MODES[::2], ids=mode_name)
def test_coarse_rules(how, rule, ragged_mask) -> None:
    mask = ragged_mask((4, 4, 4))
    for size, target in (((8, 8, 8), (2, 2, 2)), ((2, 2, 1), (4, 8, 2)), ((2, 2, 2), (1, 4, 1))):
        x = torch.randn(3, 2, *size).double()
        args = (Semantics(coarse=rule),)
        own = run(x, mask, "native", *args, size=target, **how)
        for a, b in zip(own, run(x, mask, "reference", *args, size=target, **how), strict=True):
            assert torch.allclose(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("how", MODES, ids=mode_name)
def test_image(how, ragged_mask) -> None:
    mask = ragged_mask((2, 3))
    x = torch.randn(3, 2, 4, 6).double()
    how = {**how, "mode": how["mode"].replace("trilinear", "bilinear")}
    shown = mask.visible.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    for what in ({"scale_factor": 2}, {"size": (2, 9)}, {"scale_factor": (1.5, 0.5)}):
        dense = F.interpolate(torch.where(shown, x, 0), **what, **how)
        target = tuple(dense.shape[2:])
        wanted = reference.voxel_mask(mask.level(target))[:, :, 0]
        for backend in ("native", "reference"):
            y, _ = run(x, mask, backend, **what, **how)
            assert torch.allclose(y, torch.where(wanted, dense, 0), rtol=1e-13, atol=1e-13)


def test_modules_reach_it(ragged_mask) -> None:
    mask = ragged_mask((2, 2, 2))
    sparse = BlockSparseTensor.from_dense(torch.randn(3, 2, 4, 4, 4), mask)
    expected = F.interpolate(sparse, scale_factor=2, mode="trilinear", align_corners=True)
    up = nn.Upsample(scale_factor=2, mode="trilinear", align_corners=True)(sparse)
    assert torch.equal(up.features, expected.features)
    assert up.mask is mask and up.shape == (3, 2, 8, 8, 8)
    with pytest.warns(UserWarning, match="deprecated"):
        old = F.upsample(sparse, scale_factor=2, mode="trilinear", align_corners=True)
    assert torch.equal(old.features, expected.features)
    assert torch.equal(
        nn.Upsample(scale_factor=3)(sparse).to_dense(),
        sparse.to_dense().repeat_interleave(3, 2).repeat_interleave(3, 3).repeat_interleave(3, 4),
    )


@pytest.mark.parametrize("how", MODES, ids=mode_name)
def test_gradcheck(how, ragged_mask) -> None:
    mask = ragged_mask((2, 2, 1), batch=2)
    x = BlockSparseTensor.from_dense(torch.randn(2, 2, 4, 2, 3).double(), mask)
    f = lambda features: F.interpolate(x.with_features(features), (6, 4, 2), **how).features  # noqa: E731
    assert torch.autograd.gradcheck(f, (x.features.detach().requires_grad_(),))


@pytest.mark.parametrize("how", MODES, ids=mode_name)
def test_no_visible_cell(how) -> None:
    none = BlockMask(torch.zeros(2, 2, 2, 2, dtype=torch.bool))
    y, grad = run(torch.randn(2, 3, 4, 4, 4), none, "native", scale_factor=2, **how)
    assert y.shape == (2, 3, 8, 8, 8) and not y.any() and not grad.any()


@pytest.mark.parametrize("how", MODES, ids=mode_name)
def test_hidden_nan_stays_out(how, ragged_mask) -> None:
    mask = ragged_mask((2, 2, 2))
    x = torch.randn(3, 2, 4, 4, 4)
    poisoned = torch.where(reference.voxel_mask(mask.level((4, 4, 4))), x, torch.nan)
    for what in ({"scale_factor": 2}, {"size": 6}, {"size": 2}):
        clean, other = (run(v, mask, "native", **what, **how) for v in (x, poisoned))
        assert all(torch.equal(a, b) for a, b in zip(clean, other, strict=True))


def test_same_bits_for_any_number_of_threads(ragged_mask) -> None:
    mask = ragged_mask((4, 4, 4))
    x = torch.randn(3, 5, 16, 16, 16)
    before, results = torch.get_num_threads(), []
    for n in (1, 3):
        torch.set_num_threads(n)
        results.append(run(x, mask, "native", scale_factor=2, mode="trilinear"))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": 3}, ValueError, r"from \(4, 4, 4\) to \(3, 3, 3\).*does not map onto"),
        ({"scale_factor": 0.1}, ValueError, r"to \(0, 0, 0\)"),
        ({"scale_factor": 2, "mode": "area"}, NotImplementedError, "'area'.*to_dense"),
        ({"scale_factor": 2, "mode": "bicubic"}, NotImplementedError, "'bicubic'.*to_dense"),
        ({"scale_factor": 2, "mode": "bilinear"}, NotImplementedError, "'bilinear'.*'trilinear'"),
        ({"scale_factor": 2, "antialias": True}, NotImplementedError, "antialias.*to_dense"),
        ({"scale_factor": 2, "align_corners": True}, ValueError, "align_corners"),
        ({}, ValueError, "size or scale_factor"),
        ({"size": 8, "scale_factor": 2}, ValueError, "size or scale_factor"),
        ({"size": (8, 8)}, ValueError, "3 numbers"),
        ({"scale_factor": (2.0, 2.0)}, ValueError, "3 numbers"),
        ({"size": 8, "recompute_scale_factor": True}, ValueError, "recompute"),
    ],
)
def test_errors(options, error, message, ragged_mask) -> None:
    x = BlockSparseTensor.from_dense(torch.randn(3, 2, 4, 4, 4), ragged_mask((2, 2, 2)))
    with pytest.raises(error, match=message):
        F.interpolate(x, **options)
