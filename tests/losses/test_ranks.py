"""Contrastive training on two processes takes the steps of one with the joint batch.

Losses, queue, momentum copy, heads and shuffled keys together, in DistributedDataParallel, float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from medspark.losses import assign_codes, byol_loss, info_nce, nt_xent, sinkhorn
from medspark.losses import swapped_prediction_loss as swapped_loss
from medspark.losses.rows import gather_rows
from medspark.models.heads import Head, Prototypes, hold_prototypes
from medspark.models.momentum import MomentumNetwork, momentum_at
from medspark.models.queue import Queue
from medspark.models.shuffle import encode_keys, in_parts, shuffle, unshuffle
from medspark.sparse import convert_sync_batchnorm

from ..sparse.test_sync_batch_norm import two_ranks  # noqa: TID252 (tests is no package)

BATCH, DIM, STEPS = 8, 5, 3
HALVES = (slice(0, 4), slice(4, 8))  # of the samples: rank 0's and rank 1's


def views(step: int, count: int = 2) -> list[Tensor]:
    """Views [8, 5] of the samples of a step."""
    g = torch.Generator().manual_seed(step)
    x = torch.randn(1, BATCH, DIM, generator=g, dtype=torch.float64)
    return list(x + 0.5 * torch.randn(count, BATCH, DIM, generator=g, dtype=torch.float64))


class SimCLR(nn.Module):
    views, parts = 2, 1

    def __init__(self) -> None:
        super().__init__()
        self.net = Head(DIM, 6, 4, norm=True)

    def forward(self, x: list[Tensor], step: int) -> Tensor:
        return nt_xent(self.net(x[0]), self.net(x[1]), 0.5)

    def after(self, step: int) -> None:
        """Between backward and the optimiser's step."""

    def end(self, step: int) -> None:
        """After the optimiser's step."""


class MoCo(SimCLR):
    """Without synchronised norms: one process splits its batches in two instead."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.queue = MomentumNetwork(self.net), Queue(10, 4)

    def forward(self, x: list[Tensor], step: int) -> Tensor:
        self.keys.update(self.net, 0.9)
        queries = in_parts(self.net, x[0], self.parts)
        keys = encode_keys(self.keys, x[1], seed=step, parts=self.parts)
        loss = info_nce(queries, keys, self.queue.negatives())
        self.queue.enqueue(keys)
        return loss


class BYOL(SimCLR):
    def __init__(self) -> None:
        super().__init__()
        self.target, self.predictor = MomentumNetwork(self.net), Head(4, 6, 4, norm=True)

    def forward(self, x: list[Tensor], step: int) -> Tensor:
        p1, p2 = (self.predictor(self.net(view)) for view in x)
        return byol_loss((p1, p2), (self.target(x[0]), self.target(x[1])))

    def end(self, step: int) -> None:
        self.target.update(self.net, momentum_at(step + 1, STEPS, 0.8))


class SwAV(SimCLR):
    views = 4

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = Prototypes(4, 7)
        self.queues = nn.ModuleList(Queue(12, 4) for _ in range(2))

    def forward(self, x: list[Tensor], step: int) -> Tensor:
        self.prototypes.normalise()
        z = [self.net(view) for view in x]
        scores = [self.prototypes(each) for each in z]
        with torch.no_grad():
            queued = {i: self.prototypes(q.share()) for i, q in enumerate(self.queues)}
        loss = swapped_loss(scores, assign_codes(scores, (0, 1), 0.1, queued=queued), 0.2)
        for queue, rows in zip(self.queues, z, strict=False):
            queue.enqueue(rows)
        return loss

    def after(self, step: int) -> None:
        hold_prototypes(self.prototypes, step, 1)


METHODS = {method.__name__: method for method in (SimCLR, MoCo, BYOL, SwAV)}


def build(name: str) -> SimCLR:
    torch.manual_seed(1)
    return METHODS[name]().double()


def train(method: SimCLR, model: nn.Module, samples: slice) -> dict[str, Any]:
    """Loss, gradients and state after each of a few steps."""
    optimizer = torch.optim.SGD(
        [p for p in method.parameters() if p.requires_grad], lr=0.3, momentum=0.9
    )
    record: dict[str, Any] = {"loss": [], "grads": [], "state": []}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model([view[samples] for view in views(step, method.views)], step)
        loss.backward()
        record["grads"].append(
            {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}
        )
        method.after(step)
        optimizer.step()
        method.end(step)
        record["loss"].append(loss.detach())
        record["state"].append({k: v.clone() for k, v in method.state_dict().items()})
    return record


def refused(rank: int) -> str:
    try:
        gather_rows(torch.ones(2 + rank, 3))
    except ValueError as error:
        return str(error)
    return ""


def work(rank: int) -> dict[str, Any]:
    """In each of the two processes."""
    here = HALVES[rank]
    results: dict[str, Any] = {"refused": refused(rank)}
    for name in METHODS:
        method = build(name)
        if name != "MoCo":
            method = convert_sync_batchnorm(method)  # type: ignore[assignment]
        results[name] = train(method, DistributedDataParallel(method), here)
    a, b = views(0)
    results["shuffled"] = shuffle(a[here], 3)
    results["back"] = unshuffle(results["shuffled"], 3)
    results["own"] = nt_xent(a[here], b[here], joint=False)
    # Unequal numbers of samples.
    results["codes"] = sinkhorn(a[slice(0, 3) if rank == 0 else slice(3, 8)] / 5)
    net = Head(DIM, 6, 4, norm=False)
    momentum = MomentumNetwork(DistributedDataParallel(net))
    zeros = Head(DIM, 6, 4, norm=False)
    for parameter in zeros.parameters():
        nn.init.zeros_(parameter)
    momentum.update(zeros, 0.25)
    momentum.update(DistributedDataParallel(zeros), 0.5)
    results["wrapped"] = all(
        torch.equal(new, 0.125 * old)
        for new, old in zip(momentum.parameters(), net.parameters(), strict=True)
    )
    a[0, 0] = torch.nan
    results["nan"] = torch.stack([nt_xent(a[here], b[here]), sinkhorn(a[here]).sum()])
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return two_ranks("tests.losses.test_ranks", tmp_path_factory.mktemp("ranks"))


def same(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_take_the_steps_of_one(name, ranks):
    method = build(name)
    start = {key: value.clone() for key, value in method.state_dict().items()}
    method.parts = 2 if name == "MoCo" else 1
    expected = train(method, method, slice(0, BATCH))
    for step in range(STEPS):
        losses = torch.stack([rank[name]["loss"][step] for rank in ranks])
        assert same(losses.mean(), expected["loss"][step])
        for rank in ranks:
            got = rank[name]
            assert got["grads"][step].keys() == expected["grads"][step].keys()
            for key, grad in expected["grads"][step].items():
                assert same(got["grads"][step][key], grad), key
            for key, value in expected["state"][step].items():
                # MoCo's running statistics are those of a rank's own samples.
                if name != "MoCo" or not ("running" in key or "tracked" in key):
                    assert same(got["state"][step][key], value), key
    assert not any(
        torch.equal(start[key], method.state_dict()[key]) for key in expected["grads"][2]
    )


@pytest.mark.parametrize("name", ["MoCo", "SwAV"])
def test_all_processes_hold_the_same_queue(name, ranks):
    first, second = (rank[name]["state"][-1] for rank in ranks)
    keys = [key for key in first if "queue" in key]
    assert len(keys) == (3 if name == "MoCo" else 6)
    assert all(torch.equal(first[key], second[key]) for key in keys)


def test_moco_of_one_process_without_parts_is_another():
    """What the equality above rests on: company does matter."""
    joint, split = build("MoCo"), build("MoCo")
    split.parts = 2
    losses = [train(each, each, slice(0, BATCH))["loss"][-1] for each in (joint, split)]
    assert not torch.allclose(*losses, rtol=1e-3)


def test_shuffled_samples_cross_the_processes_and_come_back(ranks):
    a, _ = views(0)
    shuffled = torch.cat([rank["shuffled"] for rank in ranks])
    assert torch.equal(shuffled, shuffle(a, 3))
    assert not torch.equal(shuffled[:4].sort(0)[0], a[:4].sort(0)[0])
    assert torch.equal(torch.cat([rank["back"] for rank in ranks]), a)


def test_without_joint_a_process_is_on_its_own(ranks):
    a, b = views(0)
    for rank, half in zip(ranks, HALVES, strict=True):
        assert same(rank["own"], nt_xent(a[half], b[half]))


def test_codes_are_balanced_over_unequal_batches(ranks):
    a, _ = views(0)
    assert [len(rank["codes"]) for rank in ranks] == [3, 5]
    assert same(torch.cat([rank["codes"] for rank in ranks]), sinkhorn(a / 5))
    assert not torch.allclose(ranks[0]["codes"], sinkhorn(a[:3] / 5), rtol=1e-2)


def test_nan_of_one_process_reaches_all(ranks):
    assert all(rank["nan"].isnan().all() for rank in ranks)


def test_a_momentum_copy_follows_wrapped_networks(ranks):
    assert all(rank["wrapped"] for rank in ranks)


def test_unequal_batches_are_refused_by_all(ranks):
    for rank in ranks:
        assert "same size" in rank["refused"] and "[2, 3]" in rank["refused"]
