"""Batch norm of two processes against one process with the whole batch."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from medspark.sparse import BlockMask, BlockSparseTensor
from medspark.sparse.sync_batch_norm import SyncBatchNorm, convert_sync_batchnorm

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 120  # seconds until two processes that wait for each other count as hung


def two_ranks(module: str, folder: Path, *args: str) -> list[Any]:
    """What `module.work(rank, *args)` returns in each of two processes joined by gloo."""
    start = (
        "import importlib, sys, torch; root, name, folder, rank, port, *args = sys.argv[1:];"
        "sys.path.append(root);"
        "here = importlib.import_module('tests.sparse.test_sync_batch_norm');"
        "here.join(int(rank), port);"
        "result = importlib.import_module(name).work(int(rank), *args);"
        "torch.save(result, f'{folder}/rank{rank}.pt');"
        "torch.distributed.destroy_process_group()"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in range(2):
        log = (folder / f"rank{rank}.log").open("w")
        command = [sys.executable, "-c", start, str(ROOT), module, str(folder), str(rank), port]
        ranks.append(
            subprocess.Popen(
                [*command, *args], stdout=log, stderr=log, cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
            )
        )  # fmt: skip
    try:
        codes = [rank.wait(LIMIT) for rank in ranks]
    except subprocess.TimeoutExpired:
        codes = [-1, -1]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    logs = [(folder / f"rank{rank}.log").read_text()[-4000:] for rank in range(2)]
    assert codes == [0, 0], f"exit codes {codes}\n" + "\n".join(logs)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def join(rank: int, port: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank, timeout=timedelta(seconds=30)
    )


@dataclass(frozen=True)
class Case:
    """Two training steps of one norm; rank 0 has the first sample, rank 1 the other two."""

    shown: tuple[tuple[int, ...], ...] = ((0, 3, 5), (1,), (2, 4, 6, 7))  # cells, per sample
    dtype: torch.dtype = torch.float64
    spatial: int = 3
    plain: bool = False
    momentum: float | None = 0.1
    affine: bool = True
    track: bool = True
    bias: bool = True
    mean: float = 5.0

    def norm(self) -> SyncBatchNorm:
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        norm = SyncBatchNorm(
            4, 1e-5, self.momentum, self.affine, self.track, dtype=wide, bias=self.bias
        )
        for i, parameter in enumerate(norm.parameters()):
            parameter.data.copy_(torch.linspace(0.5, 1.5, 4) - i)
        return norm

    def mask(self) -> BlockMask:
        visible = torch.zeros(3, 8, dtype=torch.bool)
        for sample, cells in enumerate(self.shown):
            visible[sample, list(cells)] = True
        return BlockMask(visible.view(3, *((2, 2, 2) if self.spatial == 3 else (2, 4))))

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Inputs and output gradients, dense, of numbers that every type holds exactly."""
        generator = torch.Generator().manual_seed(7)
        size = (3, 4, *((4, 6, 4) if self.spatial == 3 else (6, 8)))
        drawn = [torch.randn(size, generator=generator).bfloat16().double() for _ in range(4)]
        for x in drawn[::2]:
            x.mul_(2).add_(torch.arange(3.0).view(-1, *[1] * (x.ndim - 1))).add_(self.mean)
        rounded = [t.to(self.dtype) for t in drawn]
        return list(zip(rounded[::2], rounded[1::2], strict=True))


CASES = {
    "float64": Case(),
    "float32": Case(dtype=torch.float32),
    "large mean": Case(dtype=torch.float32, mean=1000.0),
    "bfloat16": Case(dtype=torch.bfloat16),
    "float16": Case(dtype=torch.float16),
    "images": Case(spatial=2),
    "rank 0 without voxels": Case(shown=((), (1,), (2, 4))),
    "rank 0 without voxels, bfloat16": Case(shown=((), (1,), (2, 4)), dtype=torch.bfloat16),
    "rank 1 without voxels": Case(shown=((1, 2), (), ())),
    "plain tensors": Case(plain=True),
    "plain images, float32": Case(plain=True, spatial=2, dtype=torch.float32),
    "cumulative average": Case(momentum=None),
    "no affine": Case(affine=False),
    "no bias": Case(bias=False),
    "no running statistics": Case(track=False),
}


def train(norm: nn.Module, case: Case, samples: slice, device: str) -> dict[str, Tensor]:
    """Two steps on some samples; output and input gradient of the second as lists of active voxels."""
    norm, mask = norm.to(device), BlockMask(case.mask().visible[samples]).to(device)
    results = {}
    for dense, seed in case.batches():
        norm.zero_grad()
        x, grad = (
            BlockSparseTensor.from_dense(t[samples].double().to(device), mask)
            for t in (dense, seed)
        )
        if case.plain:
            leaf = dense[samples].to(device).requires_grad_()
            y = norm(leaf)
            y.backward(seed[samples].to(device))
            assert y.is_contiguous() and leaf.grad is not None
            results = {"y": y.detach(), "dx": leaf.grad}
        else:
            leaf = x.features.to(case.dtype).requires_grad_()
            out = norm(x.with_features(leaf))
            assert isinstance(out, BlockSparseTensor) and out.dtype == case.dtype
            out.features.backward(grad.features.to(case.dtype))
            assert leaf.grad is not None
            results = {"y": out.features.detach().flatten(0, 3), "dx": leaf.grad.flatten(0, 3)}
    for name, parameter in norm.named_parameters():
        assert parameter.grad is not None
        results[name] = parameter.grad
    results.update(norm.named_buffers())
    return {k: v.cpu() for k, v in results.items()}


def one_process(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """torch's own batch norm of the list of all active voxels."""
    sync = case.norm()
    norm = nn.BatchNorm1d(
        4, 1e-5, case.momentum, case.affine, case.track,
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
    )  # fmt: skip
    if not case.bias:
        norm.register_parameter("bias", None)
    norm.load_state_dict(sync.state_dict())
    results: dict[str, Tensor] = {}
    for x, seed in case.batches():
        norm.zero_grad()
        whole = BlockMask(torch.ones_like(case.mask().visible)) if case.plain else case.mask()
        rows, grads = (
            BlockSparseTensor.from_dense(t.double(), whole).features.flatten(0, 3).to(dtype)
            for t in (x, seed)
        )
        rows.requires_grad_()
        y = norm(rows)
        y.backward(grads)
        assert rows.grad is not None
        results = {"y": y.detach(), "dx": rows.grad}
        if case.plain:  # in the order of the dense tensor
            for key, value in results.items():
                blocks = BlockSparseTensor.from_dense(x.double(), whole).features
                sparse = BlockSparseTensor(
                    value.double().view_as(blocks), whole, tuple(x.shape[2:])
                )
                results[key] = sparse.to_dense().to(dtype)
    results.update({n: p.grad for n, p in norm.named_parameters() if p.grad is not None})
    return {**results, **dict(norm.named_buffers())}


def message(norm: nn.Module, x: BlockSparseTensor) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the message is compared later)
        norm(x)
    return str(caught.value)


def work(rank: int, device: str) -> dict[str, Any]:
    """In each of the two processes."""
    samples = (slice(0, 1), slice(1, 3))[rank]
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        results[name] = train(case.norm(), case, samples, device)
    with torch.autocast(device, torch.bfloat16):
        results["autocast"] = train(CASES["float32"].norm(), CASES["float32"], samples, device)
    alone = [dist.new_group([0]), dist.new_group([1])][rank]
    norm = convert_sync_batchnorm(nn.BatchNorm3d(4).double(), alone)
    results["group of one"] = train(norm, CASES["float64"], samples, device)

    visible = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    x = torch.randn(1, 4, 2, 2, 2, device=device, requires_grad=True)
    norm = SyncBatchNorm(4).to(device)
    empty = norm(BlockSparseTensor.from_dense(x, BlockMask(visible)))
    empty.features.sum().backward()
    assert x.grad is not None
    results["nothing anywhere"] = {
        "y": empty.features.detach().cpu(),
        "dx": x.grad.cpu(),
        **{k: v.cpu() for k, v in norm.named_buffers()},
    }
    visible[0, 0, 0, 0] = rank == 1
    one = BlockSparseTensor.from_dense(x, BlockMask(visible))
    results["one voxel"] = message(norm, one)
    results["channels"] = message(SyncBatchNorm(3).to(device), one)
    norm.eval()(one)  # evaluation waits for nobody: rank 1 alone calls it twice
    if rank:
        norm(one)
    return results


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    return two_ranks("tests.sparse.test_sync_batch_norm", folder, request.param)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name, ranks, assert_as_accurate) -> None:
    case = CASES[name]
    exact, torchs = one_process(case, torch.float64), one_process(case, case.dtype)
    first, second = ranks[0][name], ranks[1][name]
    assert first.keys() == second.keys() == exact.keys()
    for key, expected in exact.items():
        if key in ("y", "dx"):
            got = torch.cat([first[key], second[key]])
            assert got.dtype == case.dtype
        elif key in ("weight", "bias"):
            got = first[key] + second[key]
        else:  # the same bits on both
            got = first[key]
            assert torch.equal(got, second[key]), key
        if case.dtype == torch.float64 or not expected.is_floating_point():
            assert torch.allclose(got.double(), expected.double(), rtol=1e-12, atol=1e-12), key
        else:
            assert_as_accurate(got, torchs[key], expected, key)


def test_autocast_leaves_it_alone_as_it_does_batch_norm(ranks) -> None:
    for results in ranks:
        for key, value in results["autocast"].items():
            assert torch.equal(value, results["float32"][key]), key


def test_a_group_of_one_is_batch_norm_of_its_own_voxels(ranks) -> None:
    case = CASES["float64"]
    for rank, samples in enumerate((slice(0, 1), slice(1, 3))):
        expected = train(nn.BatchNorm3d(4).double(), case, samples, "cpu")
        for key, value in ranks[rank]["group of one"].items():
            assert torch.allclose(value, expected[key], rtol=1e-12, atol=1e-12), key


def test_nothing_anywhere_changes_nothing(ranks) -> None:
    for results in ranks:
        got = results["nothing anywhere"]
        assert got["y"].shape == (0, 1, 1, 1, 4)
        assert torch.equal(got["dx"], torch.zeros(1, 4, 2, 2, 2))
        assert torch.equal(got["running_mean"], torch.zeros(4))
        assert torch.equal(got["running_var"], torch.ones(4))
        assert got["num_batches_tracked"] == 0


def test_errors_are_the_same_on_all_processes(ranks) -> None:
    for results in ranks:
        assert results["one voxel"].startswith("Expected more than 1 value per channel")
        assert "3 channels got an input of (1, 4, 2, 2, 2)" in results["channels"]


@pytest.mark.parametrize("training", [True, False])
def test_without_processes_it_is_batch_norm(training) -> None:
    mask = CASES["float64"].mask()
    x = BlockSparseTensor.from_dense(CASES["float64"].batches()[0][0], mask)
    norm = CASES["float64"].norm().train(training)
    expected = nn.BatchNorm3d(4).double().train(training)
    expected.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x).features, expected(x).features)
    assert torch.equal(norm(x.to_dense()), expected(x.to_dense()))
    for a, b in zip(norm.buffers(), expected.buffers(), strict=True):
        assert torch.equal(a, b)


class Twice(nn.Module):
    """A network in which one norm has two names, and an empty place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv3d(1, 4, 1), nn.BatchNorm3d(4, momentum=None))
        self.second = self.first[1]
        self.third = nn.SyncBatchNorm(4, eps=1e-3, affine=False)
        self.images = nn.ModuleDict({"2": nn.BatchNorm2d(4), "1": nn.BatchNorm1d(4)})
        self.nothing = None
        self.register_module("absent", None)
        self.images["2"].register_parameter("bias", None)
        self.images["2"].weight.requires_grad_(False)
        self.images["1"].eval()


def norms(net: nn.Module) -> Iterator[nn.Module]:
    return (m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def test_conversion_keeps_everything_but_the_class() -> None:
    net = Twice().bfloat16()
    before, settings = copy.deepcopy(net), [m.training for m in norms(net)]
    tensors = {k: v.data_ptr() for k, v in net.state_dict(keep_vars=True).items()}
    parameters = [id(p) for p in net.parameters()]
    converted = convert_sync_batchnorm(net)
    assert converted is net and net.second is net.first[1] and net.absent is None
    assert all(type(m) is SyncBatchNorm for m in norms(net))
    assert [m.training for m in norms(net)] == settings
    assert {k: v.data_ptr() for k, v in net.state_dict(keep_vars=True).items()} == tensors
    assert [id(p) for p in net.parameters()] == parameters
    assert [p.requires_grad for p in net.parameters()] == [
        p.requires_grad for p in before.parameters()
    ]
    for new, old in zip(norms(net), norms(before), strict=True):
        for name in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
            assert getattr(new, name) == getattr(old, name)
    before.load_state_dict(net.state_dict())
    assert [str(k) for k, _ in net.named_modules()] == [k for k, _ in before.named_modules()]


def test_conversion_of_groups_single_norms_and_lazy_ones() -> None:
    group: Any = object()  # only handed through
    norm = convert_sync_batchnorm(nn.BatchNorm2d(3), group)
    assert type(norm) is SyncBatchNorm and norm.process_group is group
    assert convert_sync_batchnorm(norm).process_group is group
    torchs = nn.SyncBatchNorm(3, process_group=group)
    assert convert_sync_batchnorm(torchs).process_group is group
    with pytest.raises(TypeError, match="run LazyBatchNorm3d on an input once"):
        convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm3d()))
    other = nn.InstanceNorm3d(3)
    assert convert_sync_batchnorm(other) is other
