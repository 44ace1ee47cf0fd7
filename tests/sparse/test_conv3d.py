"""conv3d on packed blocks: values, gradients, geometry, precision, determinism."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Case:
    """A convolution: cells and voxels per axis, channels, window."""

    grid: tuple[int, ...]
    size: tuple[int, ...]
    channels: tuple[int, int]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...] = (1, 1, 1)
    groups: int = 1
    bias: bool = True


def cube(n: int) -> tuple[int, int, int]:
    return n, n, n


CASES = {
    "3x3x3": Case(cube(2), cube(8), (5, 7), cube(3), cube(1), cube(1)),
    "wide": Case(cube(2), cube(4), (40, 70), cube(3), cube(1), cube(1), bias=False),
    "many rows": Case(cube(2), cube(16), (20, 9), cube(3), cube(1), cube(1)),
    "stride 2": Case(cube(2), cube(8), (4, 6), cube(3), cube(2), cube(1)),
    "stride 3": Case(cube(2), cube(12), (4, 6), cube(3), cube(3), cube(0)),
    "kernel 2 stride 2": Case(cube(2), cube(8), (17, 33), cube(2), cube(2), cube(0)),
    "stem": Case(cube(2), cube(16), (1, 8), cube(7), cube(2), cube(3), bias=False),
    "1x1x1": Case(cube(3), cube(6), (20, 9), cube(1), cube(1), cube(0)),
    "1x1x1 stride 2": Case(cube(2), cube(8), (3, 5), cube(1), cube(2), cube(0)),
    "reach beyond the block": Case(cube(4), cube(4), (18, 5), cube(5), cube(1), cube(2)),
    "7x7x7 on single voxels": Case(cube(3), cube(3), (2, 3), cube(7), cube(1), cube(3)),
    "dilation": Case(cube(2), cube(8), (3, 4), cube(3), cube(1), cube(2), cube(2)),
    "dilated stride": Case(cube(2), cube(8), (3, 4), cube(3), cube(2), cube(2), cube(2)),
    "groups": Case(cube(2), cube(4), (6, 9), cube(3), cube(1), cube(1), groups=3),
    "depthwise": Case(cube(2), cube(4), (6, 6), cube(3), cube(1), cube(1), groups=6),
    "wide depthwise": Case(cube(2), cube(12), (37, 37), cube(3), cube(1), cube(1), groups=37),
    "strided depthwise": Case(cube(2), cube(8), (70, 70), cube(3), cube(2), cube(1), groups=70),
    "wide groups": Case(cube(2), cube(4), (40, 80), cube(3), cube(1), cube(1), groups=2),
    "anisotropic": Case((1, 2, 3), (3, 8, 6), (4, 5), (1, 3, 5), (1, 2, 1), (0, 1, 2)),
    "into levels coarser than the cell": Case(cube(4), cube(4), (3, 4), cube(3), cube(2), cube(1)),
    "coarser than the cell": Case(cube(4), cube(2), (3, 4), cube(3), cube(1), cube(1)),
    "image": Case((2, 3), (8, 12), (3, 5), (3, 3), (2, 2), (1, 1), (1, 1)),
}


def build(case: Case, mask: BlockMask, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(mask.batch_size, case.channels[0], *case.size, generator=generator)
    shape = (case.channels[1], case.channels[0] // case.groups, *case.kernel)
    weight = torch.randn(shape, generator=generator)
    bias = torch.randn(case.channels[1], generator=generator)
    # Rounded first, so that every precision sees the same numbers.
    tensors = [t.bfloat16().to(dtype).requires_grad_() for t in (x, weight, bias)]
    return tensors[0], tensors[1], tensors[2] if case.bias else None  # type: ignore[return-value]


def run(
    case: Case, mask: BlockMask, dtype: torch.dtype, backend: str, rule: str = "any"
) -> list[torch.Tensor]:
    """Output and the gradients of input, weight and bias, all dense."""
    x, weight, bias = build(case, mask, dtype)
    conv = F.conv3d if len(case.size) == 3 else F.conv2d
    with use_backend(backend):  # type: ignore[arg-type]
        sparse = BlockSparseTensor.from_dense(x, mask, Semantics(coarse=rule))  # type: ignore[arg-type]
        y = conv(sparse, weight, bias, case.stride, case.padding, case.dilation, case.groups)
        assert isinstance(y, BlockSparseTensor)
        y = y.to_dense()
        seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(dtype)
        y.backward(seed)
    inputs = [t for t in (x, weight, bias) if t is not None]
    return [y.detach(), *(t.grad for t in inputs if t.grad is not None)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_native_equals_reference(name, dtype, ragged_mask, assert_as_accurate) -> None:
    case = CASES[name]
    mask = ragged_mask(case.grid)
    exact = run(case, mask, torch.float64, "reference")
    torchs = run(case, mask, dtype, "reference")
    before = launches()
    own = run(case, mask, dtype, "native")
    ran = {k: n - before.get(k, 0) for k, n in launches().items()}
    assert ran["conv3d"] == ran["conv3d_input"] == ran["conv3d_weight"] == 1
    for what, a, b, c in zip(("y", "dx", "dw", "db"), own, torchs, exact, strict=False):
        assert_as_accurate(a, b, c, f"{name} {what}")
        assert c.abs().max() > 0


@pytest.mark.parametrize("rule", ["any", "all", "majority", "every"])
def test_coarse_rules_decide_the_output(rule, ragged_mask, assert_as_accurate) -> None:
    case = CASES["into levels coarser than the cell"]
    mask = ragged_mask(case.grid)
    exact = run(case, mask, torch.float64, "reference", rule)
    for a, c in zip(run(case, mask, torch.float64, "native", rule), exact, strict=True):
        assert_as_accurate(a, c, c)
    active = reference.voxel_mask(mask.level(cube(2), rule))
    assert torch.equal(exact[0].ne(0).any(1, keepdim=True), active)


def test_all_visible_equals_dense() -> None:
    case = CASES["stride 2"]
    mask = BlockMask(torch.ones(2, *case.grid, dtype=torch.bool))
    x, weight, bias = build(case, mask, torch.float64)
    dense = F.conv3d(x, weight, bias, case.stride, case.padding)
    own = run(case, mask, torch.float64, "native")
    assert torch.allclose(own[0], dense, rtol=0, atol=1e-13 * dense.abs().max().item())


def test_no_visible_cell_gives_empty_output_and_zero_gradient() -> None:
    case = CASES["3x3x3"]
    mask = BlockMask(torch.zeros(2, *case.grid, dtype=torch.bool))
    y, dx, dw, db = run(case, mask, torch.float32, "native")
    assert y.abs().sum() == dx.abs().sum() == dw.abs().sum() == db.abs().sum() == 0
    assert dw.shape == (7, 5, 3, 3, 3)


@pytest.mark.parametrize(
    "name", ["many rows", "stem", "wide", "wide depthwise", "into levels coarser than the cell"]
)
def test_same_bits_for_any_number_of_threads(name, ragged_mask) -> None:
    case = CASES[name]
    mask = ragged_mask(case.grid)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(case, mask, torch.float32, "native"))
    finally:
        torch.set_num_threads(before)
    # y, dx and dw come from the core; db is torch's sum, whose order follows its threads.
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0][:3], other[:3], strict=True))


@pytest.mark.parametrize("name", ["3x3x3", "stem", "stride 2"])
def test_hidden_voxels_change_nothing(name, ragged_mask) -> None:
    case = CASES[name]
    mask = ragged_mask(case.grid)
    x, weight, bias = build(case, mask, torch.float32)
    hidden = ~reference.voxel_mask(mask.level(case.size))
    outputs = []
    for poison in (0.0, torch.nan, torch.inf, -1e30):
        dirty = torch.where(hidden, poison, x.detach())
        sparse = BlockSparseTensor.from_dense(dirty, mask)
        outputs.append(F.conv3d(sparse, weight, bias, case.stride, case.padding).features)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@pytest.mark.parametrize("name", ["stride 2", "groups", "stem"])
def test_gradcheck(name, ragged_mask) -> None:
    case = CASES[name]
    mask = BlockMask(ragged_mask(case.grid, batch=1).visible)
    x, weight, bias = build(case, mask, torch.float64)
    features = BlockSparseTensor.from_dense(x.detach(), mask).features.requires_grad_()
    inputs = (features, weight) if bias is None else (features, weight, bias)

    def f(features, weight, bias=None):
        sparse = BlockSparseTensor(features, mask, case.size)
        args = (case.stride, case.padding, case.dilation, case.groups)
        return F.conv3d(sparse, weight, bias, *args).features

    assert torch.autograd.gradcheck(f, inputs, fast_mode=True)


def test_autocast_computes_in_bf16_and_keeps_fp32_gradients(ragged_mask) -> None:
    case = CASES["3x3x3"]
    mask = ragged_mask(case.grid)
    x, weight, bias = build(case, mask, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = F.conv3d(BlockSparseTensor.from_dense(x, mask), weight, bias, 1, 1)
    assert y.dtype == torch.bfloat16
    y.features.float().sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert torch.equal(y.to_dense(), run(case, mask, torch.bfloat16, "native")[0])


def test_errors() -> None:
    mask = BlockMask(torch.ones(1, 2, 2, 2, dtype=torch.bool))
    x = BlockSparseTensor.from_dense(torch.randn(1, 2, 8, 8, 8), mask)
    with pytest.raises(ValueError, match="does not map onto"):
        F.conv3d(x, torch.randn(2, 2, 3, 3, 3))
    with pytest.raises(ValueError, match="does not fit input"):
        F.conv3d(x, torch.randn(2, 3, 3, 3, 3), padding=1)
    with pytest.raises(TypeError, match="float64"):
        F.conv3d(x, torch.randn(2, 2, 3, 3, 3).double(), padding=1)
    with pytest.raises(TypeError, match="int32"):
        F.conv3d(x.to(torch.int32), torch.ones(2, 2, 3, 3, 3, dtype=torch.int32), padding=1)


@pytest.mark.parametrize("kernels", ["portable", "avx2"])
def test_kernels_of_older_processors_agree(kernels, ragged_mask, tmp_path) -> None:
    """A process on other microkernels, the choice being made once per process."""
    names = ["wide", "stem", "stride 2", "wide groups", "wide depthwise"]
    script = (
        "import sys, torch\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "import test_conv3d as t\n"
        "from medspark.sparse import BlockMask\n"
        "from medspark.sparse._ext import native\n"
        "masks, names, kinds = torch.load(sys.argv[2])\n"
        "found = [t.run(t.CASES[n], BlockMask(masks[n]), d, 'native') for n in names for d in kinds]\n"
        "torch.save((native().cpu_kernels(), found), sys.argv[3])\n"
    )
    kinds = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    masks = {name: ragged_mask(CASES[name].grid).visible for name in names}
    given, result = tmp_path / "given.pt", tmp_path / "result.pt"
    torch.save((masks, names, kinds), given)
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(given), str(result)]
    subprocess.run(command, check=True, env={**os.environ, "MEDSPARK_CPU": kernels})
    used, found = torch.load(result)
    assert used in (kernels, "portable")  # a processor without AVX2 falls to the baseline
    for (name, kind), other in zip(itertools.product(names, kinds), found, strict=True):
        own = run(CASES[name], BlockMask(masks[name]), kind, "native")
        for a, b in zip(other, own, strict=True):
            bound = 64 * torch.finfo(kind).eps * b.double().abs().max()
            assert (a.double() - b.double()).abs().max() <= bound, (name, kind)
