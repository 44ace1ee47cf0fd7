"""DistributedDataParallel of an unmodified network on masked volumes: two processes equal one."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medspark.sparse import BlockMask, BlockSparseTensor
from medspark.sparse.sync_batch_norm import convert_sync_batchnorm

from .test_sync_batch_norm import two_ranks

SAMPLES = (slice(0, 1), slice(1, 4))  # of rank 0 and 1
SHOWN = ((0, 3, 5, 6), (1,), (), (2, 4, 6, 7))  # visible cells of each sample


class Network(nn.Module):
    """A residual network that knows nothing of masks; `side` is used only where a sample asks for it."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 6, 3, padding=1)
        self.norm1, self.norm2 = norm(6, affine=True), norm(6, affine=True)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool3d(2)
        self.block = nn.Conv3d(6, 6, 3, padding=1, bias=False)
        self.head, self.side = nn.Linear(6, 3), nn.Linear(6, 3)

    def features(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.stem(x)))
        pooled: Tensor = self.pool(self.relu(self.norm2(self.block(y)) + y))
        return pooled

    def forward(self, x: Tensor, ask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.features(x)
        pooled = y.mean((2, 3, 4))
        out = self.head(pooled)
        if ask is not None and ask.any():
            out = out + torch.where(ask[:, None], self.side(pooled), 0)
        return y, out


class MapOnly(Network):
    """The network without its head: the only output is the feature map."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__(norm)
        del self.head, self.side

    def forward(self, x: Tensor, ask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return self.features(x)


@dataclass(frozen=True)
class Case:
    shown: tuple[tuple[int, ...], ...] = SHOWN
    options: dict[str, Any] = field(default_factory=dict)
    norm: type[nn.Module] = nn.BatchNorm3d
    network: type[Network] = Network
    ask: tuple[bool, ...] = (True, True, False, True)
    parts: int = 1  # micro-batches, accumulated with no_sync
    outside: bool = True  # whether feature map and output leave the DDP module, or only the loss


CASES = {
    "plain": Case(),
    "rank 0 all hidden": Case(shown=((), *SHOWN[1:])),
    "rank 1 all hidden": Case(shown=(SHOWN[0], (), (), ())),
    "gradients as bucket views": Case(options={"gradient_as_bucket_view": True}),
    "feature map": Case(network=MapOnly),
    "accumulated": Case(norm=nn.InstanceNorm3d, parts=3),
    "accumulated, rank 0 all hidden": Case(
        norm=nn.InstanceNorm3d, parts=3, shown=((), *SHOWN[1:])
    ),
    "static graph": Case(options={"static_graph": True}, outside=False),
    "unused": Case(
        options={"find_unused_parameters": True}, ask=(False,) * 4, outside=False
    ),
    "used by rank 0 only": Case(
        options={"find_unused_parameters": True}, ask=(True, False, False, False), outside=False
    ),
    "feature map, static graph": Case(network=MapOnly, options={"static_graph": True}),
    "map and output, static graph": Case(options={"static_graph": True}),
    "feature map, unused": Case(network=MapOnly, options={"find_unused_parameters": True}),
    "map and output, unused": Case(
        options={"find_unused_parameters": True}, ask=(True, False, False, False)
    ),
    "unused, rank 0 all hidden": Case(
        options={"find_unused_parameters": True}, shown=((), *SHOWN[1:]), outside=False
    ),
}  # fmt: skip


class Loss(nn.Module):
    """The network and its loss in one, as trainers wrap them; the map stays inside."""

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, ask: Tensor, seeds: dict[str, Tensor]) -> Tensor:
        return loss_of(self.net(x, ask), seeds)


def data(case: Case, samples: slice) -> tuple[BlockSparseTensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    x, *seeds = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((4, 1, 8, 8, 8), (4, 6, 4, 4, 4), (4, 3))
    )
    visible = torch.zeros(4, 8, dtype=torch.bool)
    for sample, cells in enumerate(case.shown):
        visible[sample, list(cells)] = True
    mask = BlockMask(visible.view(4, 2, 2, 2)[samples])
    volume = BlockSparseTensor.from_dense(x[samples] + 1, mask)
    named = {"map": seeds[0][samples], "out": seeds[1][samples]}
    return volume, torch.tensor(case.ask)[samples], named


def loss_of(output: Any, seeds: dict[str, Tensor]) -> Tensor:
    """A sum over samples, so that ranks with different numbers of samples add up."""
    feature_map, out = output if isinstance(output, tuple) else (output, None)
    assert isinstance(feature_map, BlockSparseTensor)
    loss = (feature_map.to_dense().square() * seeds["map"]).sum()
    return loss if out is None else loss + (out.square() * seeds["out"]).sum()


def build(case: Case) -> Network:
    torch.manual_seed(1)
    return case.network(case.norm).double()


def steps(
    net: nn.Module, model: nn.Module, case: Case, parts: list[slice], share: float
) -> dict[str, Any]:
    """Three steps of SGD; the gradients of the first, and where the three lead."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    first: dict[str, Any] = {}
    for _ in range(3):
        optimizer.zero_grad()
        for i, part in enumerate(parts):
            volume, ask, seeds = data(case, part)
            last = i + 1 == len(parts)
            with nullcontext() if last or model is net else model.no_sync():
                if isinstance(getattr(model, "module", model), Loss):
                    loss = model(volume, ask, seeds)
                else:
                    loss = loss_of(model(volume, ask), seeds)
                (loss * share).backward()
        if not first:
            first = {n: p.grad for n, p in net.named_parameters()}
            first = {n: None if g is None else g.clone() for n, g in first.items()}
        optimizer.step()
    return {"grads": first, "state": {k: v.detach() for k, v in net.state_dict().items()}}


def work(rank: int) -> dict[str, Any]:
    """In each of the two processes."""
    results = {}
    for name, case in CASES.items():
        net = convert_sync_batchnorm(build(case))
        inner = net if case.outside else Loss(net)  # type: ignore[arg-type]
        model = DistributedDataParallel(inner, **case.options)
        here = range(*SAMPLES[rank].indices(4))
        # Every rank takes as many parts; those of the rank with fewer samples may be empty.
        cuts = [here[0] + len(here) * i // case.parts for i in range(case.parts + 1)]
        parts = [slice(a, b) for a, b in pairwise(cuts)]
        results[name] = steps(net, model, case, parts, 2 / 4)  # two ranks average, four samples
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return two_ranks("tests.sparse.test_ddp", tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one(name, ranks) -> None:
    case = CASES[name]
    net = build(case)
    expected = steps(net, net, case, [slice(0, 4)], 1 / 4)
    for results in ranks:
        got = results[name]
        assert got["grads"].keys() == expected["grads"].keys()
        for key, exact in expected["grads"].items():
            if exact is None:
                assert got["grads"][key] is None, key
            else:
                assert torch.allclose(got["grads"][key], exact, rtol=1e-10, atol=1e-12), key
        assert got["state"].keys() == expected["state"].keys()
        for key, exact in expected["state"].items():
            assert torch.allclose(got["state"][key], exact, rtol=1e-10, atol=1e-12), key
    moved = build(case).state_dict()
    assert not torch.allclose(moved["stem.weight"], expected["state"]["stem.weight"], rtol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_processes_stay_identical_bit_for_bit(name, ranks) -> None:
    first, second = (results[name]["state"] for results in ranks)
    assert all(torch.equal(first[key], second[key]) for key in first)
