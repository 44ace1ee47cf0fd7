"""A step on a masked volume holds little more than its visible share of the dense step's tensors."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from medspark.sparse import BlockSparseTensor

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NETWORKS = ("ResidualEncoderUNet encoder", "ConvNeXt")


@pytest.fixture
def bench(monkeypatch) -> Any:
    """benchmarks/bench_memory.py, whose accounting of tensors this is a small case of."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("bench_memory")


def step(bench: Any, network: str, visible: float = 1.0) -> tuple[int, int]:
    """Bytes held at most by the tensors of a forward and backward pass, and by the largest of them."""
    case = bench.Case(network, volume=48, cell=8, visible=visible)
    run, resident = bench.prepare(*bench.build(network), case)
    with bench.LiveBytes(resident) as tensors:
        run()
    return tensors.peak, tensors.largest


@pytest.mark.parametrize("network", NETWORKS)
def test_a_masked_step_is_small(bench, network) -> None:
    dense = step(bench, network)
    assert min(dense) > 0
    for visible, goal in bench.GOALS.items():
        held = step(bench, network, visible)
        ratios = [own / other for own, other in zip(held, dense, strict=True)]
        assert max(ratios) <= goal, f"{ratios} of dense at {visible} visible"
        assert held == step(bench, network, visible), "the same step, the same bytes"


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("visible", [0.05, 0.4])
def test_an_op_that_makes_the_volume_dense_is_seen(bench, monkeypatch, visible, every) -> None:
    network, sparse = "ResidualEncoderUNet encoder", BlockSparseTensor._handlers[F.leaky_relu]
    calls = []

    def through_dense(x: BlockSparseTensor, negative_slope: float, inplace: bool) -> Any:
        calls.append(x)
        if len(calls) > 1 and not every:
            return sparse(x, negative_slope, inplace)
        y = F.leaky_relu(x.to_dense(), negative_slope)
        return BlockSparseTensor.from_dense(y, x.mask, x.semantics)

    peak, largest = step(bench, network)
    monkeypatch.setitem(BlockSparseTensor._handlers, F.leaky_relu, through_dense)
    held = step(bench, network, visible)
    assert held[1] > bench.GOALS[visible] * largest, "one call is seen in the largest tensor"
    if every:
        assert held[0] > bench.GOALS[visible] * peak, "many are seen in the sum as well"


def test_bytes_are_counted_once_and_given_back(bench) -> None:
    resident = torch.zeros(1000)
    with bench.LiveBytes([resident]) as tensors:
        a = resident + 1  # 4000 bytes
        b = a.view(10, 100).t()  # the same bytes
        resident.mul_(2)
        assert tensors.live == tensors.peak == tensors.largest == 4000
        c = torch.cat([a, a])
        del a
        assert tensors.live == 12000  # the view keeps them
        del b, c
        assert (tensors.live, tensors.peak, tensors.largest) == (0, 12000, 8000)
