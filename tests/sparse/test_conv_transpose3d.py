"""Transposed convolution on packed blocks: values, gradients, geometry, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from medspark.sparse import BlockMask, BlockSparseTensor, launches, use_backend

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# grid, size, channels in and out, kernel, options
CASES: dict[str, tuple[Any, ...]] = {
    "k4 s2 p1": ((2, 2, 2), (4, 4, 4), 5, 7, 4, {"stride": 2, "padding": 1}),
    "k2 s2": ((2, 2, 2), (4, 4, 4), 20, 9, 2, {"stride": 2}),
    "k3 s2 with output padding": (
        (2, 2, 2), (4, 4, 4), 3, 4, 3, {"stride": 2, "padding": 1, "output_padding": 1},
    ),
    "k3 s1": ((2, 2, 2), (4, 4, 4), 3, 4, 3, {"padding": 1}),
    "groups": ((2, 2, 2), (4, 4, 4), 6, 8, 2, {"stride": 2, "groups": 2}),
    "anisotropic": (
        (1, 2, 2), (3, 4, 4), 3, 4, (1, 2, 4), {"stride": (1, 2, 2), "padding": (0, 0, 1)},
    ),
    "from a level coarser than the cell": ((4, 4, 4), (2, 2, 2), 3, 4, 2, {"stride": 2}),
    "image": ((2, 2), (4, 6), 3, 4, 2, {"stride": 2}),
}  # fmt: skip


def run(name: str, mask: BlockMask, dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
    _, size, c_in, c_out, kernel, options = CASES[name]
    generator = torch.Generator().manual_seed(0)
    kernel = (kernel,) * len(size) if isinstance(kernel, int) else kernel
    shapes = [(3, c_in, *size), (c_in, c_out // options.get("groups", 1), *kernel), (c_out,)]
    leaves = [torch.randn(s, generator=generator).bfloat16().to(dtype) for s in shapes]
    x, weight, bias = (leaf.requires_grad_() for leaf in leaves)
    function = F.conv_transpose3d if len(size) == 3 else F.conv_transpose2d
    with use_backend(backend):  # type: ignore[arg-type]
        sparse = function(BlockSparseTensor.from_dense(x, mask), weight, bias, **options)
        y = sparse.to_dense()
        y.backward(torch.randn(y.shape, generator=generator).bfloat16().to(dtype))
    return [y.detach(), *(t.grad for t in (x, weight, bias) if t.grad is not None)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_native_equals_reference(name, dtype, ragged_mask, assert_as_accurate) -> None:
    mask = ragged_mask(CASES[name][0])
    exact = run(name, mask, torch.float64, "reference")
    torchs = run(name, mask, dtype, "reference")
    before = launches().get("conv3d_input", 0)
    own = run(name, mask, dtype, "native")
    assert launches()["conv3d_input"] == before + 1
    assert len(own) == 4
    for what, a, b, c in zip(("y", "dx", "dw", "db"), own, torchs, exact, strict=True):
        assert_as_accurate(a, b, c, f"{name} {what}")
        assert c.abs().max() > 0


def test_visible_volume_gives_torchs_result() -> None:
    mask = BlockMask(torch.ones(2, 2, 2, 2, dtype=torch.bool))
    x, weight = torch.randn(2, 3, 4, 4, 4).double(), torch.randn(3, 5, 4, 4, 4).double()
    dense = F.conv_transpose3d(x, weight, None, 2, 1)
    own = F.conv_transpose3d(BlockSparseTensor.from_dense(x, mask), weight, None, 2, 1).to_dense()
    assert torch.allclose(own, dense, rtol=0, atol=1e-12)


def test_errors(ragged_mask) -> None:
    x = BlockSparseTensor.from_dense(torch.randn(3, 2, 4, 4, 4), ragged_mask((2, 2, 2)))
    with pytest.raises(ValueError, match="does not map onto cells"):
        F.conv_transpose3d(x, torch.randn(2, 3, 3, 3, 3), stride=2)
    with pytest.raises(ValueError, match="does not fit input"):
        F.conv_transpose3d(x, torch.randn(3, 2, 2, 2, 2), stride=2)
