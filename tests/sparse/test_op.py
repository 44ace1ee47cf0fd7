"""Both doors of every op: `torch.library.opcheck`, the compiler's view, and argument checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from medspark.sparse import BlockMask
from medspark.sparse.ops.conv3d import Geometry, _call, conv3d_features

MASK = BlockMask.random(2, (2, 2, 2), 0.4, torch.Generator().manual_seed(0))
FINE, COARSE = MASK.level((4, 4, 4)), MASK.level((2, 2, 2))
LEVELS = (FINE.cells, FINE.blocks, [2, 2, 2], COARSE.cells, COARSE.blocks, [1, 1, 1])
WINDOW = ([2, 2, 2], [1, 1, 1], [1, 1, 1])
WHOLE = BlockMask(torch.ones(2, 1, 1, 1, dtype=torch.bool)).level((4, 4, 4))
TO_WHOLE = (FINE.cells, FINE.blocks, [2, 2, 2], WHOLE.cells, WHOLE.blocks, [4, 4, 4])
N, M = FINE.n_blocks, COARSE.n_blocks


def packed(
    n: int, block: int, channels: int, dtype: torch.dtype, grad: bool = True
) -> torch.Tensor:
    return torch.randn(n, block, block, block, channels).to(dtype).requires_grad_(grad)


def calls(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments of one call of each op."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, y = packed(N, 2, 3, dtype), packed(M, 1, 5, dtype, False)
    weight = torch.randn(5, 3, 3, 3, 3).to(dtype).requires_grad_()
    stats = torch.stack([torch.zeros(2, 3, dtype=wide), torch.ones(2, 3, dtype=wide)])
    starts = FINE.segment_starts(True)
    table = (FINE.cells, FINE.blocks, [2, 2, 2])
    pool = (*LEVELS, [3, 3, 3], [2, 2, 2], [1, 1, 1])
    affine = torch.rand(3, dtype=wide).requires_grad_(), torch.rand(3, dtype=wide).requires_grad_()
    grad3 = packed(M, 1, 3, dtype, False)
    return {
        "conv3d": (x, weight, torch.randn(5).to(dtype).requires_grad_(), *LEVELS, *WINDOW, 1),
        "conv3d_input": (y, weight.detach(), *LEVELS, *WINDOW, 1),
        "conv3d_weight": (x.detach(), y, weight.detach(), *LEVELS, *WINDOW, 1),
        "conv_transpose3d": (
            y.clone().requires_grad_(), weight, torch.randn(3).to(dtype).requires_grad_(),
            *LEVELS, *WINDOW, 1,
        ),
        "max_pool3d": (x, *pool, [1, 1, 1], True),
        "max_pool3d_input": (grad3, torch.zeros(M, 1, 1, 1, 3, dtype=torch.int16), *pool, [1, 1, 1], True),
        "avg_pool3d": (x, *pool, False, True, 0),
        "avg_pool3d_input": (grad3, *pool, False, True, 0),
        "norm": (x, *affine, starts, 1e-5),
        "norm_input": (x.detach(), x.detach() + 1, affine[0].detach(), stats, starts, 1e-5),
        "global_pool": (x, starts, True, [N, 2, 2, 2, 3]),
        "global_pool_input": (
            torch.randn(2, 3).to(dtype), torch.zeros(2, 3, dtype=torch.int64), starts, False, [N, 2, 2, 2, 3],
        ),
        "densify": (x, torch.randn(3).to(dtype).requires_grad_(), *table),
        "gather": (torch.randn(2, 3, 4, 4, 4).to(dtype).requires_grad_(), *table),
        "sum_hidden": (torch.randn(2, 3, 4, 4, 4).to(dtype), *table),
        "transfer": (x, torch.randn(3).to(dtype).requires_grad_(), *TO_WHOLE),
        "sum_untransferred": (packed(WHOLE.n_blocks, 4, 3, dtype, False), *TO_WHOLE),
        "resample3d": (x, *LEVELS, "linear", False, [0.0, 0.0, 0.0], False),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", calls(torch.float32))
def test_opcheck(name, dtype) -> None:
    torch.manual_seed(0)
    torch.library.opcheck(getattr(torch.ops.medspark, name), calls(dtype)[name])


def test_every_registered_op_is_checked() -> None:
    registered = {
        schema.name.partition("::")[2]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("medspark::")
    }
    assert registered == set(calls(torch.float32))


def test_compiled_graph_equals_eager() -> None:
    weight = torch.randn(5, 3, 3, 3, 3, requires_grad=True)

    def step(features: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        geometry = Geometry.between(FINE, COARSE, [2, 2, 2], [1, 1, 1], [1, 1, 1], 1)
        return conv3d_features(features, FINE, COARSE, weight, None, geometry).relu()

    features = packed(N, 2, 3, torch.float32)
    eager = step(features, weight)
    compiled: Callable[..., torch.Tensor] = torch.compile(step, backend="aot_eager")
    assert torch.equal(compiled(features, weight), eager)
    grads = [
        torch.autograd.grad(f(features, weight).sum(), (features, weight)) for f in (step, compiled)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("conv3d", {0: packed(N + 1, 2, 3, torch.float32)}, ValueError),
        ("conv3d", {1: torch.randn(5, 3, 3, 3, 3).double()}, TypeError),
        ("conv3d", {2: torch.randn(4)}, ValueError),
        ("conv3d", {3: FINE.cells.long()}, TypeError),
        ("conv3d", {9: [2, 0, 2]}, ValueError),
        ("conv3d", {10: [-1, 1, 1]}, ValueError),
        ("conv3d", {0: packed(N, 2, 9, torch.float32), 12: 3}, ValueError),
        ("avg_pool3d", {7: [0, 3, 3]}, ValueError),
        ("max_pool3d", {10: [1, 1, 0]}, ValueError),
        ("conv3d_weight", {1: packed(M, 1, 4, torch.float32, False)}, ValueError),
        ("norm", {1: torch.rand(4)}, ValueError),
        ("densify", {1: torch.rand(4)}, ValueError),
        ("gather", {0: torch.randn(2, 3, 4, 4, 6)}, ValueError),
        ("transfer", {0: packed(N + 1, 2, 3, torch.float32)}, ValueError),
        ("transfer", {1: torch.rand(4)}, ValueError),
        ("transfer", {7: [4, 4, 2]}, ValueError),
        ("transfer", {6: WHOLE.blocks.long()}, TypeError),
        ("sum_untransferred", {0: packed(N, 4, 3, torch.float32)}, ValueError),
        ("resample3d", {0: packed(N + 1, 2, 3, torch.float32)}, ValueError),
        ("resample3d", {7: "cubic"}, ValueError),
        ("resample3d", {9: [1.0, 1.0]}, ValueError),
        ("resample3d", {4: COARSE.cells[:1]}, ValueError),
        ("max_pool3d", {0: packed(N, 2, 3, torch.float32, False).to(torch.int32)}, TypeError),
    ],
)
def test_raw_addresses_are_never_taken_of_wrong_tensors(name, change, error) -> None:
    arguments = list(calls(torch.float32)[name])
    for position, value in change.items():
        arguments[position] = value
    with pytest.raises(error):
        getattr(torch.ops.medspark, name)(*arguments)


def test_a_kept_description_is_not_used_for_another_device() -> None:
    """It holds addresses of the mask's tables, which were checked for the device they are on."""
    config, shape = Geometry.between(FINE, COARSE, *WINDOW, 1), torch.Size([5, 3, 3, 3, 3])
    features = packed(N, 2, 3, torch.float32, False)
    assert _call(features, shape, config) is _call(features, shape, config)
    with pytest.raises(RuntimeError, match="move the mask"):
        _call(features.to("meta"), shape, config)
