"""Peak memory of a training step on a masked volume, against the same network on the dense one.

A step is forward + backward, batch 1: of the unmodified network on a `BlockSparseTensor`, and on the whole
volume times the mask. Each step runs in a fresh process, after one on a small volume that loads what is
loaded lazily, with the parameters, their gradients and the input volume in place. The table shows MB of

    activations  peak above what was in place: what the step itself needs, scratch of the kernels included.
                 Resident memory (Linux, VmHWM) on the CPU, torch.cuda.max_memory_allocated on a GPU.
    process      peak above the process with everything imported: parameters and gradients as well, which
                 are the same on both sides
    tensors      peak of the bytes held by tensors that operators returned, counted in a second step: torch's
                 view, deterministic, blind to scratch inside operators (of which dense ones have more)

and `ratio` to `ratio tensors`, each divided by the dense run's. The goal is judged on `ratio` (activations):
at most 15 % of dense with 5 % of the cells visible, at most 50 % with 40 %. Freed memory goes back at once
(glibc's MALLOC_MMAP_THRESHOLD_), so that the peak is of live memory.

    python benchmarks/bench_memory.py                                        everything; some 15 minutes
    python benchmarks/bench_memory.py --quick                                one network, half a minute
    python benchmarks/bench_memory.py --only ResNet-18 ConvNeXt --volume 96
    python benchmarks/bench_memory.py --device cuda --dtype bfloat16 --no-record
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from harness import chosen, parser, print_table, save
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medspark.sparse import (
    BlockMask,
    BlockSparseTensor,
    current_backend,
    launches,
    reference,
    reset_launches,
)

GOALS = {0.05: 0.15, 0.4: 0.5}  # share of visible cells: largest ratio to dense
NETWORKS_FILE = Path(__file__).parents[1] / "tests" / "sparse" / "networks.py"
MB = 2**20
# Blocks above the threshold are mapped one by one: freeing one gives it back to the system.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
LIMIT = 900  # seconds of one process


@dataclass(frozen=True)
class Case:
    """One step: a network of tests/sparse/networks.py on a cubic volume; visible 1.0 is the dense run."""

    network: str
    volume: int
    cell: int
    visible: float = 1.0
    device: str = "cpu"
    dtype: str = "float32"


CASES = [  # dense runs of 0.5 to 2 GB
    Case("ResNet-10", 192, 16),
    Case("ResNet-18", 192, 16),
    Case("ResNet-18", 192, 32),
    Case("ResNet-50", 128, 16),
    Case("ResNet-50", 160, 32),
    Case("SegResNet", 128, 16),
    Case("DenseNet-121", 128, 16),
    Case("EfficientNet-B0", 128, 16),
    Case("ResidualEncoderUNet encoder", 128, 16),
    Case("PlainConvUNet encoder", 128, 16),
    Case("ConvNeXt", 256, 16),
    Case("MedNeXt, kernel 3", 128, 16),
]


class LiveBytes(TorchDispatchMode):
    """Bytes held by the tensors that operators return, while the mode is on.

    Attributes:
        live: bytes held now.
        peak: the most that were held.
        largest: bytes of the largest of them.
    """

    def __init__(self, resident: Iterable[Tensor]) -> None:
        """Counts everything but `resident`, which must outlive the mode."""
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._known: dict[int, Any] = {t.untyped_storage()._cdata: None for t in resident}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self.live += size
        self.peak = max(self.peak, self.live)
        self.largest = max(self.largest, size)
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key, size))

    def _forget(self, key: int, size: int) -> None:
        self.live -= size
        del self._known[key]


def build(name: str) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Any]]:
    """A network by its name in tests/sparse/networks.py, and how it is called.

    "encoder NAME" is the encoder of that name in medspark.models, as it is pre-trained.
    """
    if name.startswith("encoder "):
        from medspark.models.encoders import create_encoder

        torch.manual_seed(0)
        return create_encoder(name.removeprefix("encoder ")), lambda net, x: net(x)
    spec = importlib.util.spec_from_file_location("networks", NETWORKS_FILE)
    assert spec is not None and spec.loader is not None
    module = sys.modules["networks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    network = module.NETWORKS[name]
    return network.build(), network.call


def prepare(
    net: nn.Module, call: Callable[[nn.Module, Tensor], Any], case: Case
) -> tuple[Callable[[], None], list[Tensor]]:
    """A forward and a backward pass, and the tensors that are in place before it."""
    sparse, n = case.visible < 1, case.volume // case.cell
    x = torch.randn(1, 1, *(case.volume,) * 3, device=case.device, dtype=getattr(torch, case.dtype))
    generator = torch.Generator().manual_seed(0)
    mask = BlockMask.random(1, (n, n, n), 1 - case.visible, generator, case.device)
    shown = reference.voxel_mask(mask.level(tuple(x.shape[2:])))

    def step() -> None:
        y = call(net, BlockSparseTensor.from_dense(x, mask) if sparse else x * shown)
        outputs = [t for t in tree_leaves(y) if isinstance(t, Tensor) and t.requires_grad]
        packed = [t.features if isinstance(t, BlockSparseTensor) else t for t in outputs]
        torch.autograd.backward(packed, [torch.ones_like(t) for t in packed])

    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    return step, [x, shown, *net.parameters(), *net.buffers(), *gradients]


def memory(field: str) -> int:
    """Bytes of this process: VmRSS, resident now, or VmHWM, the most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def peak_of(step: Callable[[], None], device: str) -> tuple[int, int]:
    """Bytes in use before a step, and the most during it."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return before, torch.cuda.max_memory_allocated()
    before = memory("VmRSS")
    # VmHWM becomes what is resident now; where that is forbidden, it was less before this step.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    step()
    return before, memory("VmHWM")


def measure(case: Case) -> dict[str, Any]:
    """One case in this process, which must be a fresh one."""
    net, call = build(case.network)
    parameters = sum(t.nbytes for t in net.state_dict().values())
    imported = memory("VmRSS") - parameters if case.device == "cpu" else 0
    net = net.to(case.device, getattr(torch, case.dtype))
    small = replace(case, volume=64, cell=16, visible=1.0 if case.visible == 1 else 0.5)
    prepare(net, call, small)[0]()
    step, resident = prepare(net, call, case)
    reset_launches()
    start = time.perf_counter()
    before, peak = peak_of(step, case.device)
    seconds, counts = time.perf_counter() - start, {k: v for k, v in launches().items() if v}
    with LiveBytes(resident) as tensors:
        step()
    return {
        "status": "ok", "activations_mb": (peak - before) / MB, "process_mb": (peak - imported) / MB,
        "tensors_mb": tensors.peak / MB, "parameters_mb": parameters / MB, "seconds": seconds,
        "backend": current_backend() if case.visible < 1 else "torch", "launches": counts,
    }  # fmt: skip


def in_fresh_process(case: Case) -> dict[str, Any]:
    """The row of one case; a failure is a row too."""
    env = {**os.environ, **MALLOC}
    env.setdefault("OMP_NUM_THREADS", "1")
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {**asdict(case), "status": "error", "reason": f"more than {LIMIT} s"}
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {**asdict(case), "status": "error", "reason": reason}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if case.visible < 1 and not row["launches"].get("conv3d" + "_cuda" * (case.device != "cpu")):
        row.update(status="error", reason="no native convolution was launched")
    return {**asdict(case), **row}


def compare(
    case: Case, shares: Iterable[float], goals: dict[float, float] = GOALS
) -> list[dict[str, Any]]:
    """The dense run of a case and its sparse ones, with their ratios and goals by share."""
    dense = in_fresh_process(replace(case, visible=1.0))
    rows = [dense]
    for share in shares:
        row = in_fresh_process(replace(case, visible=share))
        if dense["status"] == row["status"] == "ok":
            for kind in ("activations", "process", "tensors"):
                row[f"ratio_{kind}"] = row[f"{kind}_mb"] / dense[f"{kind}_mb"]
            if share in goals:
                row["goal"] = goals[share]
                row["met"] = row["ratio_activations"] <= goals[share]
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    names = {
        "network": "network", "volume": "volume", "cell": "cell", "visible": "visible",
        "activations_mb": "activations", "process_mb": "process", "tensors_mb": "tensors",
        "ratio_activations": "ratio", "ratio_process": "ratio process", "ratio_tensors": "ratio tensors",
        "goal": "goal", "met": "met", "seconds": "seconds", "reason": "reason",
    }  # fmt: skip
    print_table(
        [{names[k]: v for k, v in row.items() if k in names} for row in rows], list(names.values())
    )


def main() -> None:
    options = parser(__doc__)
    add = options.add_argument
    add(
        "--networks", nargs="*", help="names in tests/sparse/networks.py that are not in the choice"
    )
    add("--volume", type=int, help="voxels per axis instead of each network's own")
    add("--visible", type=float, nargs="*", default=list(GOALS), help="shares of cells")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="float32", help="of the network and the volume")
    add("--case", help=argparse.SUPPRESS)  # one case in this process
    args = options.parse_args()
    if args.case:
        print(json.dumps(measure(Case(**json.loads(args.case)))))
        return
    if args.quick and not (args.only or args.networks):
        args.only = ["ResNet-10"]
    cases = [c for c in CASES if chosen(c.network, args.only) and not args.networks]
    cases += [Case(name, args.volume or 128, 16) for name in args.networks or ()]
    rows = []
    for case in cases:
        case = replace(
            case, volume=args.volume or case.volume, device=args.device, dtype=args.dtype
        )
        rows += compare(case, args.visible)
        print(f"{case.network}: done", file=sys.stderr, flush=True)
    show(rows)
    save(args, "memory", rows, identity=("network", "volume", "cell", "visible", "device", "dtype"))


if __name__ == "__main__":
    main()
