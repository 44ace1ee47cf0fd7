"""Every engine gives the numbers of the definition, in our order, or says why it cannot."""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

import adapters
import pytest
import torch
import torch.nn.functional as F
import workloads
from adapters import Engine, Unsupported
from workloads import PASSES, Case, Workload

from medspark.sparse import reference
from medspark.sparse._ext import load_extension

TINY = [
    Workload("k3", 8, 4, 5, 7),
    Workload("k3 s2", 8, 4, 4, 6, stride=2),
    Workload("k2 s2", 8, 4, 4, 6, kernel=2, stride=2),
    Workload("transposed", 4, 2, 4, 6, kernel=2, stride=2, transposed=True),
    Workload("groups", 8, 4, 4, 6, groups=2),
    Workload("depthwise", 8, 4, 4, 4, kernel=(1, 3, 5), groups=4),
    Workload("stem", 16, 8, 1, 6, kernel=7, stride=2, batch=2),
    Workload("blocks of 1", 6, 1, 8, 8, batch=2),
]
OURS = ["native", "reference", "dense", "dense channels_last", "halo", "numba"]
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def engine_of(name: str, case: Case) -> Engine:
    if name == "native" and load_extension() is None:
        pytest.skip("the kernels are not built")
    if name == "numba":
        pytest.importorskip("numba")
    return adapters.engines()[name](case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("work", TINY, ids=lambda w: w.name)
@pytest.mark.parametrize("name", OURS)
def test_engines_agree_with_the_definition(name, work, dtype) -> None:
    case = Case(work, 0.5, dtype)
    try:
        engine = engine_of(name, case)
    except Unsupported:
        assert (name, work.transposed) == ("halo", True)
        return
    for which in PASSES:
        if which not in engine.passes:
            with pytest.raises(Unsupported):
                engine.run(which)
            continue
        found = engine.check(which, engine.run(which))
        assert found["error"] < LIMITS[dtype], which
        assert bool(found["launches"]) == (name == "native")


@pytest.mark.parametrize("work", TINY, ids=lambda w: w.name)
def test_the_definition_agrees_with_torch(work) -> None:
    """The check itself: dense autograd in float64 leaves no error, a wrong voxel does."""
    case = Case(work, 0.5, torch.float64)
    levels = case.in_level, case.out_level
    x, dy = (
        reference.unpack(rows.view(level.n_blocks, *level.block, -1), level)
        for rows, level in zip((case.x, case.dy), levels, strict=True)
    )
    leaves = [x.requires_grad_(), case.weight.clone().requires_grad_()]
    conv = F.conv_transpose3d if work.transposed else F.conv3d
    y = conv(*leaves, None, work.stride, work.padding, groups=work.groups)
    dx, dw = torch.autograd.grad(y, leaves, dy)
    forward = reference.pack(y.detach(), levels[1]).flatten(0, 3)
    results = {
        "forward": forward, "grad_input": reference.pack(dx, levels[0]).flatten(0, 3),
        "grad_weight": dw,
    }  # fmt: skip
    for which, result in results.items():
        assert case.error(which, result) < 1e-12
        assert case.error(which, result.roll(1, 0)) > 1e-2 or result.shape[0] == 1
    assert case.pairs == workloads.count_pairs(
        case.fine, case.coarse, work.kernel, work.stride, work.padding
    )


def test_useful_work_of_a_pass() -> None:
    case = Case(Workload("all", 8, 4, 3, 5, groups=1), 0.0, torch.float32)
    flops, dense, moved = case.useful("forward")
    assert flops == 2 * 3 * 5 * (3 * 8 - 2) ** 3
    assert dense == 2 * 3 * 5 * 27 * 8**3
    assert moved == 4 * (8**3 * (3 + 5) + 3 * 5 * 27)
    both = case.useful("backward")
    assert both[:2] == (2 * flops, 2 * dense)
    assert both[2] == 4 * (8**3 * (3 + 5 + 3) + 2 * 3 * 5 * 27)


def test_an_engine_that_is_not_there_says_so(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "spconv", None)
    monkeypatch.setitem(sys.modules, "spconv.pytorch", None)
    case = Case(TINY[0], 0.5, torch.float32)
    ready, refused = adapters.build(["dense", "spconv"], case)
    assert list(ready) == ["dense"]
    assert "spconv is not installed" in refused["spconv"]
    _, refused = adapters.build(["spconv"], Case(TINY[0], 0.5, torch.bfloat16))
    assert refused == {"spconv": "spconv computes in float32 only"}


def test_native_that_did_not_run_native_is_an_error() -> None:
    case = Case(TINY[0], 0.5, torch.float32)
    native, reference_run = engine_of("native", case), engine_of("reference", case).run("forward")
    with pytest.raises(RuntimeError, match="other kernels"):
        native.check("forward", reference_run)


@pytest.mark.parametrize("name", ["spconv", "minkowski", "torchsparse"])
@pytest.mark.parametrize("work", TINY, ids=lambda w: w.name)
def test_peers_agree_with_the_definition(name, work) -> None:
    """Where they are installed."""
    case = Case(work, 0.5, torch.float32)
    try:
        engine = adapters.engines()[name](case)
    except Unsupported as why:
        required = os.environ.get("MEDSPARK_REQUIRE_PEERS", "") not in ("", "0")
        if required and name != "torchsparse" and "not installed" in str(why):
            pytest.fail(f"{why} (MEDSPARK_REQUIRE_PEERS is set)")
        pytest.skip(str(why))
    for which in engine.passes:
        assert engine.check(which, engine.run(which))["error"] < 1e-5


class PlainGatherScatter:
    """What torchsparse's function is documented to compute, with its arguments."""

    @staticmethod
    def apply(x: Any, weight: Any, maps: dict[str, Any], config: Any, transposed: bool) -> Any:
        pairs = maps["nbmaps"].long().split(maps["nbsizes"].tolist())
        assert weight.shape[0] == len(pairs)
        out = x.new_zeros(maps["sizes"][0 if transposed else 1], weight.shape[-1])
        for tap, pair in enumerate(pairs):
            source, target = pair.flip(1).unbind(1) if transposed else pair.unbind(1)
            out = out.index_add(0, target, x[source] @ weight[tap])
        return out


@pytest.mark.parametrize("work", [w for w in TINY if w.groups == 1], ids=lambda w: w.name)
def test_the_kernel_map_for_torchsparse(work, monkeypatch) -> None:
    """The adapter's side of it, where the library is not: its operator is replaced by plain torch."""
    parts = ["torchsparse", "nn", "functional", "conv", "func"]
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    module: Any = sys.modules[".".join(parts)]
    module.gather_scatter = ModuleType("gather_scatter")
    module.gather_scatter.GatherScatterConvolutionFuntion = PlainGatherScatter
    case = Case(work, 0.5, torch.float32)
    engine = adapters.engines()["torchsparse"](case)
    for which in engine.passes:
        assert engine.check(which, engine.run(which))["error"] < 1e-5
