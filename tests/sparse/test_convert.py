"""Conversions to and from torch.sparse_coo, spconv and MinkowskiEngine.

Our side is tested with stand-ins that have the packages' attributes; the packages themselves, where they
are installed, must give back the same volume and agree on a convolution. MEDSPARK_REQUIRE_PEERS=1 makes
a missing package a failure.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from medspark.sparse import BlockMask, BlockSparseTensor, Semantics
from medspark.sparse.convert import (
    coordinates,
    from_minkowski,
    from_sparse_coo,
    from_spconv,
    to_minkowski,
    to_sparse_coo,
    to_spconv,
)

DOCS = Path(__file__).resolve().parents[2] / "docs" / "conversions.md"
HOW = {"spconv": "`pip install spconv`", "MinkowskiEngine": "build as docs/conversions.md says"}
# (cells, voxels): block-aligned, anisotropic, coarser than the cell on some axes and on all, 2D.
SIZES = {
    "isotropic": ((2, 2, 2), (4, 4, 4)),
    "anisotropic": ((2, 3, 2), (2, 6, 8)),
    "partly coarser": ((4, 2, 3), (2, 4, 3)),
    "coarser": ((4, 4, 2), (2, 2, 1)),
    "image": ((3, 2), (6, 8)),
}


def _peer(package: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real package, on one OpenMP thread because spconv's sums on the CPU race on more."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        return importlib.import_module("spconv.pytorch" if package == "spconv" else package)
    except ImportError as error:
        message = f"{package} cannot be imported ({error}): {HOW[package]}"
        if os.environ.get("MEDSPARK_REQUIRE_PEERS", "") not in ("", "0"):
            pytest.fail(f"{message} (MEDSPARK_REQUIRE_PEERS is set)")
        pytest.skip(message)


def _spconv_stand_in() -> dict[str, Any]:
    def tensor(features: Any, indices: Any, spatial_shape: Any, batch_size: int) -> Any:
        assert indices.dtype == torch.int32 and isinstance(spatial_shape, list)
        return SimpleNamespace(
            features=features, indices=indices, spatial_shape=spatial_shape, batch_size=batch_size
        )

    module = SimpleNamespace(SparseConvTensor=tensor)
    return {"spconv": SimpleNamespace(pytorch=module), "spconv.pytorch": module}


def _minkowski_stand_in() -> dict[str, Any]:
    def tensor(features: Any, coordinates: Any, tensor_stride: Any, coordinate_manager: Any) -> Any:
        assert coordinates.dtype == torch.int32 and coordinates.is_contiguous()
        order = torch.randperm(len(features))  # the engine may reorder its rows
        rows = {"F": features[order], "C": coordinates[order]}
        return SimpleNamespace(
            **rows, tensor_stride=tensor_stride, coordinate_manager=coordinate_manager
        )

    return {"MinkowskiEngine": SimpleNamespace(SparseTensor=tensor)}


TRIPS = ["torch.sparse_coo", *(name + kind for name in HOW for kind in (" stand-in", ""))]


@pytest.fixture(params=TRIPS)
def there_and_back(request, monkeypatch) -> Callable[..., BlockSparseTensor]:
    """Converts a masked volume and converts the result back."""
    package, _, stand_in = request.param.partition(" ")
    if package == "torch.sparse_coo":
        return lambda x, **where: from_sparse_coo(to_sparse_coo(x), **where)
    if stand_in:
        modules = _spconv_stand_in() if package == "spconv" else _minkowski_stand_in()
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
    else:
        _peer(package, monkeypatch)
    if package == "spconv":
        return lambda x, **where: from_spconv(to_spconv(x), **where)
    stride = (2, 3, 5)
    return lambda x, **where: from_minkowski(
        to_minkowski(x, tensor_stride=stride[: x.ndim - 2]),
        x.spatial,
        **where,
        **({"batch_size": x.shape[0]} if "cell" in where else {}),
    )


@pytest.fixture
def volume(ragged_mask) -> Callable[..., BlockSparseTensor]:
    """A random volume under a mask that shows some, no and all cells of its three samples."""

    def make(name: str = "isotropic", channels: int = 3, **options: Any) -> BlockSparseTensor:
        grid, spatial = SIZES[name]
        dense = torch.randn(3, channels, *spatial, dtype=options.pop("dtype", torch.float32))
        return BlockSparseTensor.from_dense(dense, ragged_mask(grid), Semantics(**options))

    return make


def _places(batch: int, spatial: tuple[int, ...]) -> torch.Tensor:
    """Dense volume whose channels are each voxel's own (sample, z, y, x)."""
    axes = [torch.arange(n, dtype=torch.float64) for n in (batch, *spatial)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=1)


@pytest.mark.parametrize("coarse", ["any", "all", "majority", "every"])
@pytest.mark.parametrize("name", SIZES)
def test_coordinates_name_the_voxel_of_each_row(name, coarse, ragged_mask) -> None:
    grid, spatial = SIZES[name]
    places = _places(3, spatial)
    x = BlockSparseTensor.from_dense(places, ragged_mask(grid), Semantics(coarse=coarse))
    rows = coordinates(x)
    assert rows.dtype == torch.int32 and rows.is_contiguous()
    assert rows.shape == (x.level.n_blocks * x.level.block_voxels, 1 + len(spatial))
    assert torch.equal(rows.double(), x.features.flatten(0, 3))


def test_coordinates_of_a_hand_made_mask() -> None:
    visible = torch.tensor([[[False, True]], [[True, False]]])  # 2 images of 1 x 2 cells
    x = BlockSparseTensor.from_dense(torch.zeros(2, 1, 2, 4), BlockMask(visible))
    first, second = [(0, 2), (0, 3), (1, 2), (1, 3)], [(0, 0), (0, 1), (1, 0), (1, 1)]
    expected = [[0, *place] for place in first] + [[1, *place] for place in second]
    assert coordinates(x).tolist() == expected


@pytest.mark.parametrize("name", SIZES)
def test_sparse_coo_is_the_dense_volume_channels_last(name, volume) -> None:
    x = volume(name)
    t = to_sparse_coo(x)
    assert t.shape == (3, *x.spatial, 3) and t.dense_dim() == 1 and t.is_coalesced()
    assert torch.equal(t.to_dense().movedim(-1, 1), x.to_dense())
    own = {"is_coalesced": True, "check_invariants": True}  # inside, sorted, each place once
    torch.sparse_coo_tensor(t.indices(), t.values(), t.shape, **own)


@pytest.mark.parametrize("coarse", ["any", "every"])
@pytest.mark.parametrize("name", SIZES)
def test_there_and_back_is_the_same_volume(name, coarse, volume, there_and_back) -> None:
    x = volume(name, coarse=coarse)
    y = there_and_back(x, mask=x.mask, semantics=x.semantics)
    assert y.mask.equals(x.mask) and y.semantics == x.semantics and y.shape == x.shape
    assert torch.equal(y.features, x.features)


@pytest.mark.parametrize("name", ["isotropic", "anisotropic", "image"])
def test_the_mask_is_found_again_from_the_cell(name, volume, there_and_back) -> None:
    x = volume(name)
    y = there_and_back(x, cell=x.level.block[-len(x.spatial) :])
    assert y.mask.equals(x.mask)
    assert torch.equal(y.features, x.features)


def test_gradients_run_through_both_ways(volume, there_and_back) -> None:
    x = volume("anisotropic", dtype=torch.float64)
    x.features.requires_grad_()
    weight = torch.randn_like(x.features)
    y = there_and_back(x, mask=x.mask)
    (gradient,) = torch.autograd.grad((y.features**2 * weight).sum(), x.features)
    assert torch.allclose(gradient, 2 * x.features * weight, rtol=1e-12)


@pytest.mark.parametrize("visible", [True, False])
def test_all_and_no_voxels(visible, there_and_back, request) -> None:
    mask = BlockMask(torch.full((2, 2, 2, 2), visible))
    x = BlockSparseTensor.from_dense(torch.randn(2, 3, 4, 4, 4), mask)
    if not visible and "Minkowski" in request.node.name:
        with pytest.raises(ValueError, match="no active voxel"):
            there_and_back(x, mask=mask)
        return
    assert torch.equal(there_and_back(x, mask=mask).features, x.features)


@pytest.mark.parametrize("back", ["torch.sparse_coo", "spconv", "MinkowskiEngine"])
def test_absent_voxels_are_zero_and_repeated_ones_are_summed(back) -> None:
    mask = BlockMask(torch.tensor([[[True, False]], [[True, True]]]))
    rows = torch.tensor([[1, 1, 3], [0, 0, 1], [1, 1, 3]], dtype=torch.int32)
    values = torch.tensor([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]], requires_grad=True)
    if back == "torch.sparse_coo":
        t = torch.sparse_coo_tensor(rows.t(), values, (2, 2, 4, 2), check_invariants=True)
        y = from_sparse_coo(t, mask)
    elif back == "spconv":
        y = from_spconv(_sites(indices=rows, features=values, spatial_shape=[2, 4]), mask)
    else:
        scaled = rows * torch.tensor([1, 2, 4], dtype=torch.int32)
        y = from_minkowski(SimpleNamespace(C=scaled, F=values, tensor_stride=[2, 4]), (2, 4), mask)
    expected = torch.zeros(2, 2, 2, 4)
    expected[1, :, 1, 3] = torch.tensor([5.0, 50.0])
    expected[0, :, 0, 1] = torch.tensor([2.0, 20.0])
    assert torch.equal(y.to_dense(), expected)
    weight = torch.arange(1.0, 33.0).view(2, 2, 2, 4)
    (y.to_dense() * weight).sum().backward()
    sample, y_axis, x_axis = rows.long().unbind(1)
    assert torch.equal(values.grad, weight[sample, :, y_axis, x_axis])


def test_conversions_stay_on_the_device(device) -> None:
    mask = BlockMask.random(2, (2, 3, 2), 0.5)
    features = torch.randn(mask.level((4, 6, 4)).n_blocks, 2, 2, 2, 3)
    x = BlockSparseTensor(features.to(device), mask.to(device), (4, 6, 4))
    t = to_sparse_coo(x)
    y = from_sparse_coo(t, mask)
    assert {coordinates(x).device.type, t.device.type, y.device.type} == {device.type}
    assert torch.equal(y.features.cpu(), features)
    assert from_sparse_coo(t, cell=(2, 2, 2)).mask.equals(mask)


def test_minkowski_takes_manager_and_stride(volume, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "MinkowskiEngine", _minkowski_stand_in()["MinkowskiEngine"])
    x = volume()
    t = to_minkowski(x, coordinate_manager="shared", tensor_stride=4)
    assert t.coordinate_manager == "shared" and t.tensor_stride == [4, 4, 4]
    assert set(t.C[:, 1:].flatten().tolist()) == {0, 4, 8, 12}
    assert t.C[:, 0].unique().tolist() == [0, 2]  # samples are not scaled
    assert from_minkowski(t, x.spatial, cell=(2, 2, 2)).shape[0] == 3
    last_empty = BlockMask(x.mask.visible.roll(1, 0))
    t = to_minkowski(BlockSparseTensor(x.features, last_empty, x.spatial))
    assert from_minkowski(t, x.spatial, last_empty).shape[0] == 3
    assert from_minkowski(t, x.spatial, cell=(2, 2, 2)).shape[0] == 2
    with pytest.raises(ValueError, match="positive stride for each of 3 axes"):
        to_minkowski(x, tensor_stride=(1, 2))
    with pytest.raises(TypeError, match="float32 and float64"):
        to_minkowski(x.with_features(x.features.half()))


def _sites(**changes: Any) -> Any:
    rows = torch.tensor([[0, 0, 0, 0], [1, 3, 2, 1]], dtype=torch.int32)
    sites = {"indices": rows, "features": torch.ones(2, 3), "spatial_shape": [4, 4, 4]}
    return SimpleNamespace(**(sites | {"batch_size": 2} | changes))


SHOWN = torch.tensor([True, False, True, True]).view(1, 4, 1, 1).expand(2, 4, 4, 4)
BAD_SITES = {
    "coordinates must be integers, got torch.float32": {"indices": torch.zeros(2, 4)},
    "features must be floating point": {"features": torch.ones(2, 3, dtype=torch.int64)},
    "row 1, (sample, z, y, x) = (1, 3, 2, 1), holds NaN": {
        "features": torch.tensor([[0.0, 0.0], [torch.nan, 0.0]])
    },
    "needs coordinates [N, 4]": {"indices": torch.zeros(2, 3, dtype=torch.int32)},
    "got [2, 4] and [1, 3]": {"features": torch.ones(1, 3)},
    "(1, 3, 2, 1), lies outside the 1 samples": {"batch_size": 1},
    "(0, 0, -1, 0), lies outside": {"indices": torch.tensor([[0, 0, 0, 0], [0, 0, -1, 0]])},
    "(1, 3, 2, 1), lies outside the 2 samples of size (3, 4, 4)": {"spatial_shape": [3, 4, 4]},
    "row 1, (sample, z, y, x) = (1, 1, 0, 2), lies in a hidden cell": {
        "indices": torch.tensor([[0, 0, 3, 3], [1, 1, 0, 2]])
    },
    "a mask of 2 samples for 3 samples": {"batch_size": 3},
    "does not map onto": {"spatial_shape": [4, 4, 6]},
    "2 or 3 spatial axes": {"spatial_shape": [4, 4, 4, 4]},
}


@pytest.mark.parametrize("message", BAD_SITES)
def test_bad_sites_are_refused(message) -> None:
    error = TypeError if " must be " in message else ValueError
    with pytest.raises(error, match=re.escape(message)):
        from_spconv(_sites(**BAD_SITES[message]), BlockMask(SHOWN))


def test_bad_arguments_are_refused(volume) -> None:
    mask = BlockMask(SHOWN)
    for both in ({}, {"mask": mask, "cell": (1, 1, 1)}):
        with pytest.raises(ValueError, match="either mask"):
            from_spconv(_sites(), **both)
    for cell in ((3, 1, 1), (2, 2), (0, 1, 1)):
        with pytest.raises(ValueError, match="do not tile"):
            from_spconv(_sites(), cell=cell)
    with pytest.raises(TypeError, match="got layout"):
        from_sparse_coo(torch.zeros(1, 2, 2, 2, 1), mask)
    with pytest.raises(ValueError, match=r"to_sparse\(x.ndim - 1\)"):
        from_sparse_coo(torch.zeros(1, 2, 2, 2, 1).to_sparse(), mask)
    t = SimpleNamespace(C=_sites().indices, F=torch.ones(2, 3), tensor_stride=[1, 2, 2])
    with pytest.raises(ValueError, match=r"\(1, 3, 2, 1\), is no multiple of the tensor stride"):
        from_minkowski(t, (4, 4, 4), mask)
    t = SimpleNamespace(C=t.C[:0], F=t.F[:0], tensor_stride=[1, 1, 1])
    with pytest.raises(ValueError, match="give batch_size="):
        from_minkowski(t, (4, 4, 4), cell=(1, 1, 1))
    for function in (coordinates, to_sparse_coo, to_spconv, to_minkowski):
        with pytest.raises(TypeError, match="expected a BlockSparseTensor, got Tensor"):
            function(torch.zeros(1, 1, 2, 2, 2))


def test_missing_packages_say_how_to_get_them(volume, monkeypatch) -> None:
    for name in ("spconv", "spconv.pytorch", "MinkowskiEngine"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install spconv"):
        to_spconv(volume())
    with pytest.raises(ImportError, match=r"docs/conversions\.md"):
        to_minkowski(volume())


def _assert_rounding(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape and expected.abs().max() > 0
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= 16 * torch.finfo(torch.float32).eps


def _spconv_layer(package: Any, weight: torch.Tensor, stride: int) -> Callable[[Any], Any]:
    kind = getattr(package, f"{'SubM' if stride == 1 else 'Sparse'}Conv{weight.ndim - 2}d")
    layer = kind(weight.shape[1], weight.shape[0], 3, stride=stride, padding=1, bias=False)
    layer.weight.data = weight.movedim(1, -1).contiguous()  # [C_out, kz, ky, kx, C_in]
    return layer


def _minkowski_layer(package: Any, weight: torch.Tensor, stride: int) -> Callable[[Any], Any]:
    layer = package.MinkowskiConvolution(
        weight.shape[1], weight.shape[0], 3, stride=stride, dimension=weight.ndim - 2
    )
    # [27, C_in, C_out], z fastest
    layer.kernel.data = weight.permute(*reversed(range(weight.ndim))).flatten(0, -3).contiguous()
    return layer


def _convolve(x: torch.Tensor, weight: torch.Tensor, stride: int = 1) -> torch.Tensor:
    return (F.conv3d if x.ndim == 5 else F.conv2d)(x, weight, padding=1, stride=stride)


@pytest.mark.parametrize("name", ["anisotropic", "image"])
@pytest.mark.parametrize("package", ["spconv", "MinkowskiEngine"])
def test_the_package_computes_our_convolution(package, name, volume, monkeypatch) -> None:
    """Coordinates, rows and weights are in the right order: values and gradients agree."""
    peer = _peer(package, monkeypatch)
    x = volume(name, channels=4)
    weight = torch.randn(5, 4, *[3] * len(x.spatial))
    x.features.requires_grad_()
    ours = _convolve(x, weight)
    if package == "spconv":
        # Its backward asks for a CUDA stream, also on the CPU.
        ops = importlib.import_module("spconv.pytorch.ops")
        monkeypatch.setattr(ops, "get_current_stream", lambda: 0)
        theirs = from_spconv(_spconv_layer(peer, weight, 1)(to_spconv(x)), x.mask)
    else:
        y = _minkowski_layer(peer, weight, 1)(to_minkowski(x))
        theirs = from_minkowski(y, x.spatial, x.mask)
    _assert_rounding(theirs.features, ours.features)
    cotangent = torch.randn_like(ours.features)
    gradients = [
        torch.autograd.grad((y.features * cotangent).sum(), x.features) for y in (ours, theirs)
    ]
    _assert_rounding(gradients[1][0], gradients[0][0])


@pytest.mark.parametrize("name", ["isotropic", "image"])
def test_a_strided_minkowski_layer_comes_back_under_the_mask(name, volume, monkeypatch) -> None:
    peer = _peer("MinkowskiEngine", monkeypatch)
    x = volume(name, channels=4)
    weight = torch.randn(5, 4, *[3] * len(x.spatial))
    ours = _convolve(x, weight, stride=2)
    y = _minkowski_layer(peer, weight, 2)(to_minkowski(x))
    assert y.tensor_stride == [2] * len(x.spatial)
    theirs = from_minkowski(y, ours.spatial, x.mask)
    _assert_rounding(theirs.features, ours.features)


@pytest.mark.parametrize("name", ["isotropic", "image"])
def test_a_strided_spconv_layer_dilates(name, volume, monkeypatch) -> None:
    peer = _peer("spconv", monkeypatch)
    x = volume(name, channels=4)
    weight = torch.randn(5, 4, *[3] * len(x.spatial))
    t = _spconv_layer(peer, weight, 2)(to_spconv(x))
    with pytest.raises(ValueError, match="hidden cell"):
        from_spconv(t, x.mask)
    dense = _convolve(x.to_dense(), weight, stride=2)
    _assert_rounding(from_spconv(t, cell=(1,) * len(x.spatial)).to_dense(), dense)


def _documented(package: str | None) -> list[str]:
    """The Python examples that import this package, or neither."""
    blocks = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), flags=re.M | re.S)
    return [b for b in blocks if next((n for n in HOW if f"import {n}" in b), None) == package]


@pytest.mark.parametrize("package", [None, "spconv", "MinkowskiEngine"])
def test_the_documented_examples_run(package, monkeypatch) -> None:
    if package is not None:
        _peer(package, monkeypatch)
    assert _documented(package)
    space: dict[str, Any] = {}
    for block in _documented(None) + (_documented(package) if package else []):
        exec(compile(block, str(DOCS), "exec"), space)
