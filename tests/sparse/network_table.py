"""Runs networks unmodified on masked volumes, in four ways, and writes docs/networks.md.

    python -m tests.sparse.network_table > docs/networks.md

The ways: native in float32 and float64, torch's float32 (the reference backend) and the float64 oracle.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from medspark.sparse import BlockMask, BlockSparseTensor, launches, reset_launches, use_backend

from .masked_dense import MaskedDense, same_random
from .networks import NETWORKS, Network

ROUNDING = 32 * torch.finfo(torch.float32).eps
# Native kernel of each function that has one.
KERNELS = {
    "conv2d": "conv3d", "conv3d": "conv3d",
    "conv_transpose2d": "conv3d_input", "conv_transpose3d": "conv3d_input",
    "max_pool2d": "max_pool3d", "max_pool3d": "max_pool3d",
    "avg_pool2d": "avg_pool3d", "avg_pool3d": "avg_pool3d",
    "interpolate": "resample3d",
}  # fmt: skip
NORMS = ("batch_norm", "instance_norm", "group_norm")


class Observer(TorchFunctionMode):
    """Counts the functions that meet masked volumes; random numbers are the same in every precision."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.last = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], BlockSparseTensor):
            self.calls[func.__name__] += 1
            self.last = resolve_name(func) or func.__name__
        return same_random(func, args, kwargs or {})


@dataclass
class Run:
    """What one backend makes of a network: dense outputs, gradients, calls and native launches."""

    training: list[Tensor] = field(default_factory=list)
    evaluation: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    forward: dict[str, int] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)
    forward_evaluation: dict[str, int] = field(default_factory=dict)


def flatten(outputs: Any) -> Iterator[Tensor]:
    """All tensors of nested outputs, dense."""
    for y in outputs if isinstance(outputs, (list, tuple)) else [outputs]:
        if isinstance(y, (list, tuple)):
            yield from flatten(y)
        else:
            yield y.to_dense() if isinstance(y, BlockSparseTensor) else y


def loss_of(outputs: list[Tensor]) -> Tensor:
    """A scalar that weighs every element of the outputs differently."""
    generator = torch.Generator().manual_seed(3)
    terms = [(t * torch.randn(t.shape, generator=generator)).mean() for t in outputs]
    return torch.stack(terms).sum()


def run(
    network: Network, net: nn.Module, x: Tensor, mask: BlockMask, backend: str, observer: Observer
) -> Run:
    """A training step without the update, then evaluation by the running statistics."""
    net, result = copy.deepcopy(net).to(x.dtype).train(), Run()
    volume = BlockSparseTensor.from_dense(x, mask)
    torch.manual_seed(0)
    with use_backend(backend):  # type: ignore[arg-type]
        reset_launches()
        with observer:
            outputs = network.call(net, volume)
        result.calls, result.forward = Counter(observer.calls), launches()
        result.training = list(flatten(outputs))
        loss_of(result.training).backward()
        result.total = launches()
        reset_launches()
        with torch.no_grad(), observer:
            result.evaluation = list(flatten(network.call(net.eval(), volume)))
        result.forward_evaluation = launches()
    result.training = [t.detach() for t in result.training]
    result.gradients = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    return result


def run_oracle(network: Network, net: nn.Module, x: Tensor, mask: BlockMask) -> Run:
    """The same by masked dense functions in float64."""
    net, result, oracle = copy.deepcopy(net).double().train(), Run(), MaskedDense(mask.visible)
    torch.manual_seed(0)
    with oracle:
        outputs = network.call(net, x.double())
    result.training = [oracle.keep(t) for t in flatten(outputs)]
    loss_of(result.training).backward()
    with torch.no_grad(), oracle:
        outputs = network.call(net.eval(), x.double())
    result.evaluation = [oracle.keep(t) for t in flatten(outputs)]
    result.training = [t.detach() for t in result.training]
    result.gradients = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    return result


def case(network: Network) -> tuple[nn.Module, Tensor, BlockMask]:
    """The network with a batch of three volumes: all cells visible, none, some."""
    torch.manual_seed(0)
    net = network.build()
    visible = torch.rand(3, *network.grid) < 0.5
    visible[0], visible[1] = True, False
    visible[2].view(-1)[:2] = torch.tensor([True, False])
    return net, torch.randn(3, 1, *network.volume), BlockMask(visible)


@dataclass
class Result:
    """The runs of one network, or the function that it lacks."""

    missing: str = ""
    own: Run = field(default_factory=Run)
    own64: Run = field(default_factory=Run)
    torchs: Run = field(default_factory=Run)
    exact: Run = field(default_factory=Run)

    @property
    def verdict(self) -> str:
        return f"no: {self.missing}" if self.missing else "training and evaluation"


def measure(name: str) -> Result:
    network = NETWORKS[name]
    net, x, mask = case(network)
    observer, result = Observer(), Result()
    try:
        result.own = run(network, net, x, mask, "native", observer)
    except NotImplementedError:
        result.missing = observer.last
        return result
    result.own64 = run(network, net, x.double(), mask, "native", Observer())
    result.torchs = run(network, net, x, mask, "reference", Observer())
    result.exact = run_oracle(network, net, x, mask)
    return result


def relative(got: Tensor, exact: Tensor, floor: float = 1e-6) -> float:
    """Distance in units of the exact length."""
    return ((got.double() - exact).norm() / max(exact.norm().item(), floor)).item()


def convolutions(calls: Counter[str]) -> int:
    """Convolutions of masked volumes, transposed ones included."""
    return sum(n for function, n in calls.items() if function.startswith("conv"))


def gradient_errors(result: Result) -> tuple[float, float]:
    """Relative error of all gradients together, native and torch's."""
    runs = (result.own, result.torchs, result.exact)
    own, torchs, exact = (torch.cat([g.flatten() for g in r.gradients.values()]) for r in runs)
    return relative(own, exact), relative(torchs, exact)


def _row(name: str, result: Result) -> str:
    network = NETWORKS[name]
    size = " x ".join(map(str, network.volume))
    cell = " x ".join(str(n // g) for n, g in zip(network.volume, network.grid, strict=True))
    cells = [name, network.source, f"{len(network.volume)}D", size, cell, result.verdict]
    own, torchs, exact = result.own, result.torchs, result.exact
    if result.missing:
        return "| " + " | ".join([*cells, "", "", "", ""]) + " |"
    native = sum(own.forward.get(kernel, 0) for kernel in ("conv3d", "conv3d_input"))
    cells.append(f"{native} of {convolutions(own.calls)}")
    for mode in ("training", "evaluation"):
        pairs = list(zip(*(getattr(r, mode) for r in (own, torchs, exact)), strict=True))
        ours = max(relative(a, c) for a, _, c in pairs)
        theirs = max(relative(b, c) for _, b, c in pairs)
        cells.append(f"{ours:.0e} ({theirs:.0e})")
    cells.append("{:.0e} ({:.0e})".format(*gradient_errors(result)))
    return "| " + " | ".join(cells) + " |"


HEAD = """\
# Networks that run on masked volumes

Each network below is called as its package builds it, on a `BlockSparseTensor` instead of a tensor: no
layer is exchanged, no `state_dict` key changes. `tests/sparse/test_network_table.py` runs them all and
fails where this table is wrong; `python -m tests.sparse.network_table > docs/networks.md` writes it.

A batch of three volumes with one channel and the given size (voxels) and cell goes through the network:
all cells of the first are visible, none of the second, some of the third. The total stride is larger than
the cell in most of them, so that levels coarser than the cell occur. One training pass with its backward
is followed by a pass in evaluation mode, which uses the running statistics.

*Native* counts the convolutions of masked volumes that ran on medspark's kernels, and all of them. The
last three columns are distances from the float64 oracle relative to its length, of the outputs and of the
gradients of all parameters; in brackets the same for torch's own float32 operations. The oracle
(`tests/sparse/masked_dense.py`) is the dense network with hidden voxels set to 0 in front of every function;
in float64 the kernels agree with it to 1e-10. Where both distances are large, float32 is at its limit: one
ReLU near 0 that flips moves all gradients before it.

| Network | Source | Dims | Volume | Cell | Works in | Native | Training output | Evaluation output \
| Gradients |
|---|---|---|---|---|---|---|---|---|---|
"""


def table() -> str:
    """The whole of docs/networks.md."""
    rows = [_row(name, measure(name)) for name in NETWORKS]
    notes = [f"- {name}: {n.remark}" for name, n in NETWORKS.items() if n.remark]
    return HEAD + "\n".join(rows) + "\n\n" + "\n".join(notes) + "\n"


@cache
def verdicts() -> dict[str, str]:
    """Name and verdict of each row of docs/networks.md."""
    lines = (Path(__file__).resolve().parents[2] / "docs" / "networks.md").read_text().splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("| ")]
    return {row[0].strip(): row[5].strip() for row in rows[1:]}


def works(name: str) -> bool:
    """Whether docs/networks.md says so."""
    return not verdicts().get(name, "").startswith("no")


if __name__ == "__main__":
    print(table(), end="")
