"""One interface to every engine that can convolve a masked volume; each is optional and found at run time.

An engine takes a `Case` into its own layout once and offers three closures: `forward`, `grad_input` and
`grad_weight`. Building indices and layouts is not timed (what it took is in `about`), everything that a
network would repeat at each call is. `rows` and `weight_of` bring results back for the check against
float64. What an engine cannot do, it says by raising `Unsupported`; the reason becomes the row.

    native               our kernels on packed blocks
    reference            the oracle of medspark.sparse: dense torch on where(mask, x, 0)
    dense                torch's conv3d on the whole volume, NCDHW, then the mask
    dense channels_last  the same in channels_last_3d, the layout that oneDNN prefers
    halo                 visible blocks with their halo as a batch, one conv3d without padding (oneDNN)
    numba                the loops of tests/sparse/numba_oracle.py, float64, one thread
    spconv, minkowski, torchsparse    see peers.py
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from harness import counted, reason
from roof import three
from torch import Tensor
from workloads import PASSES, Case, rows_at

from medspark.sparse import BlockSparseTensor, reference, use_backend

ORACLE = Path(__file__).parents[1] / "tests" / "sparse" / "numba_oracle.py"


class Unsupported(Exception):
    """The engine is not installed, or cannot do what was asked."""


class Engine:
    """A differentiable `call(x, weight)` in the engine's own layout; passes follow from it.

    Attributes:
        x, weight, dy: inputs in the engine's layout.
        about: what ran: library, version, layout, remarks, ms to build its index.
    """

    name: ClassVar[str]
    dtypes: ClassVar[tuple[torch.dtype, ...]] = ()  # all, if empty
    passes: ClassVar[tuple[str, ...]] = PASSES
    x: Tensor
    weight: Tensor
    dy: Tensor

    def __init__(self, case: Case) -> None:
        self.case = case
        self.about: dict[str, Any] = {"library": "torch", "version": torch.__version__}
        if self.dtypes and case.dtype not in self.dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes)
            raise Unsupported(f"{self.name} computes in {names} only")
        start = time.perf_counter()
        self.build(case)
        self.about["build_ms"] = (time.perf_counter() - start) * 1e3

    def build(self, case: Case) -> None:
        """Sets `x`, `weight` and `dy`, and whatever the engine keeps between calls."""
        raise NotImplementedError

    def call(self, x: Tensor, weight: Tensor) -> Tensor:
        """The convolution, hidden voxels of the output left out or 0."""
        raise NotImplementedError

    def rows(self, which: str, result: Tensor) -> Tensor:
        """`[rows, C]` of a result ("forward") or of an input's gradient ("grad_input")."""
        raise NotImplementedError

    def weight_of(self, gradient: Tensor) -> Tensor:
        """The weight's gradient as torch keeps it."""
        return gradient

    def run(self, which: str) -> Callable[[], Any]:
        """What is timed: one pass, of `workloads.PASSES`."""
        if which not in self.passes:
            raise Unsupported(f"{self.name} has no pass {which}, only {', '.join(self.passes)}")
        if which == "forward":

            def forward() -> Tensor:
                with torch.no_grad():
                    return self.call(self.x, self.weight)

            return forward
        x = self.x.detach().requires_grad_(which != "grad_weight")
        weight = self.weight.detach().requires_grad_(which != "grad_input")
        leaves = [leaf for leaf in (x, weight) if leaf.requires_grad]
        y = self.call(x, weight)
        return lambda: torch.autograd.grad(y, leaves, self.dy, retain_graph=True)

    def check(self, which: str, run: Callable[[], Any]) -> dict[str, Any]:
        """One call: its largest error against float64, and the native kernels that it launched."""
        result, launched = counted(run)
        results = [result] if isinstance(result, Tensor) else list(result)
        names = ["grad_input", "grad_weight"] if which == "backward" else [which]
        errors = []
        for name, found in zip(names, results, strict=True):
            plain = self.weight_of(found) if name == "grad_weight" else self.rows(name, found)
            errors.append(self.case.error(name, plain.detach()))
        return {"error": max(errors), "launches": launched}


class Native(Engine):
    """Ours, entered as a network enters it: `F.conv3d` on a BlockSparseTensor."""

    name = "native"
    backend: ClassVar[Any] = "native"

    def build(self, case: Case) -> None:
        from medspark import __version__

        self.about = {"library": "medspark", "version": __version__, "layout": "packed blocks"}
        inside, outside = case.in_level, case.out_level
        self.x = case.x.view(inside.n_blocks, *inside.block, -1)
        self.dy = case.dy.view(outside.n_blocks, *outside.block, -1)
        self.weight = case.weight
        self.volume = BlockSparseTensor(self.x, case.mask, (case.work.size,) * 3)

    def call(self, x: Tensor, weight: Tensor) -> Tensor:
        work, volume = self.case.work, self.volume.with_features(x)
        with use_backend(self.backend):
            if work.transposed:
                y = F.conv_transpose3d(
                    volume, weight, None, work.stride, work.padding, groups=work.groups
                )
            else:
                y = F.conv3d(volume, weight, None, work.stride, work.padding, groups=work.groups)
        return y.features

    def rows(self, which: str, result: Tensor) -> Tensor:
        return result.reshape(-1, result.shape[-1])

    def check(self, which: str, run: Callable[[], Any]) -> dict[str, Any]:
        found = super().check(which, run)
        ran = any(name.startswith("conv") for name in found["launches"])
        if ran != (self.backend == "native"):
            raise RuntimeError(f"{self.name} ran other kernels than it should: {found['launches']}")
        return found


class Reference(Native):
    """The oracle, in the tensor's own type."""

    name = "reference"
    backend = "reference"

    def build(self, case: Case) -> None:
        super().build(case)
        self.about["layout"] = "packed blocks, unpacked to NCDHW and back in each call"


class Dense(Engine):
    """The whole volume, as without sparsity: hidden voxels are 0, the output is masked."""

    name = "dense"
    layout: ClassVar[torch.memory_format] = torch.contiguous_format

    def build(self, case: Case) -> None:
        self.about["layout"] = str(self.layout).removeprefix("torch.")
        self.shown = reference.voxel_mask(case.out_level)
        self.x = self._volume(case.x, case.in_level)
        self.dy = self._volume(case.dy, case.out_level)
        self.weight = case.weight.contiguous(memory_format=self.layout)

    def _volume(self, rows: Tensor, level: Any) -> Tensor:
        packed = rows.view(level.n_blocks, *level.block, -1)
        return reference.unpack(packed, level).contiguous(memory_format=self.layout)

    def call(self, x: Tensor, weight: Tensor) -> Tensor:
        work = self.case.work
        if work.transposed:
            y = F.conv_transpose3d(x, weight, None, work.stride, work.padding, groups=work.groups)
        else:
            y = F.conv3d(x, weight, None, work.stride, work.padding, groups=work.groups)
        return y * self.shown

    def rows(self, which: str, result: Tensor) -> Tensor:
        level = self.case.out_level if which == "forward" else self.case.in_level
        return reference.pack(result, level).flatten(0, 3)


class DenseLast(Dense):
    name = "dense channels_last"
    layout = torch.channels_last_3d


class Halo(Engine):
    """Visible blocks with the halo that the kernel reads, as one batch: conv3d without padding.

    The strongest way to use a dense library on a masked volume: no index but the neighbours of blocks.
    The input's gradient of stride 1 is the same with dy and the mirrored, transposed weight; that of
    a larger stride is scattered back from the patches.
    """

    name = "halo"

    def build(self, case: Case) -> None:
        work = case.work
        if work.transposed:
            raise Unsupported("halo: blocks of a transposed convolution overlap when written")
        self.about["layout"] = "channels_last_3d batch of blocks with halo"
        self.blocks_in, self.blocks_out = case.in_level, case.out_level
        kernel, stride, pads = case.window
        if any(b % s or b // s < 1 for b, s in zip(case.in_level.block, stride, strict=True)):
            raise Unsupported("halo: the stride does not divide the block")
        self.index = _halo_index(case, case.in_level, case.out_level, kernel, stride, pads)
        self.mirror = three(work.stride) == (1, 1, 1) and all(k % 2 for k in kernel)
        if self.mirror:
            self.back = _halo_index(case, case.out_level, case.in_level, kernel, stride, pads)
        self.x, self.dy = case.x, case.dy
        self.weight = case.weight.contiguous(memory_format=torch.channels_last_3d)
        # The row behind the last one is 0: what hidden and outside voxels read.
        self.padded = {key: _with_zero(rows) for key, rows in (("x", self.x), ("dy", self.dy))}

    def _patches(self, key: str, index: Tensor) -> Tensor:
        rows = self.padded[key]
        taken = rows.index_select(0, index.flatten()).view(*index.shape, rows.shape[1])
        return taken.permute(0, 4, 1, 2, 3)  # channels_last_3d in memory

    def _batch(self, rows: Tensor, level: Any) -> Tensor:
        return rows.view(level.n_blocks, *level.block, -1).permute(0, 4, 1, 2, 3)

    def _conv(self, x: Tensor, weight: Tensor, stride: Any) -> Tensor:
        return F.conv3d(x, weight, None, stride, 0, groups=self.case.work.groups)

    def run(self, which: str) -> Callable[[], Any]:
        stride = self.case.window[1]
        grad_input = self._grad_mirrored if self.mirror else self._grad_scattered
        run: Callable[[], Any] = {
            "forward": lambda: self._conv(self._patches("x", self.index), self.weight, stride),
            "grad_input": grad_input,
            "grad_weight": self._grad_weight,
            "backward": lambda: (grad_input(), self._grad_weight()),
        }[which]

        def without_graph() -> Any:
            with torch.no_grad():
                return run()

        return without_graph

    def _grad_weight(self) -> Tensor:
        return self._backward(self._patches("x", self.index), 1)

    def _grad_mirrored(self) -> Tensor:
        groups = self.case.work.groups
        weight = self.weight.flip(2, 3, 4).unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        weight = weight.contiguous(memory_format=torch.channels_last_3d)
        return self._conv(self._patches("dy", self.back), weight, 1)

    def _grad_scattered(self) -> Tensor:
        shape = (self.index.shape[0], self.case.work.channels_in, *self.index.shape[1:])
        empty = self.x.new_empty(()).expand(shape)  # only its shape is asked
        patches = self._backward(empty, 0).permute(0, 2, 3, 4, 1).flatten(0, 3)
        rows = self.x.new_zeros(self.x.shape[0] + 1, self.x.shape[1])
        return rows.index_add_(0, self.index.flatten(), patches)[:-1]

    def _backward(self, patches: Tensor, which: int) -> Tensor:
        wanted = [which == 0, which == 1, False]
        dy = self._batch(self.dy, self.blocks_out)
        result: Tensor = torch.ops.aten.convolution_backward(
            dy, patches, self.weight, None, self.case.window[1], (0, 0, 0), (1, 1, 1),
            False, (0, 0, 0), self.case.work.groups, wanted,
        )[which]  # fmt: skip
        return result

    def rows(self, which: str, result: Tensor) -> Tensor:
        return result if result.ndim == 2 else result.permute(0, 2, 3, 4, 1).flatten(0, 3)


def _with_zero(rows: Tensor) -> Tensor:
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])


def _halo_index(
    case: Case, source: Any, target: Any, kernel: Any, stride: Any, pads: Any
) -> Tensor:
    """int64 `[blocks, z, y, x]`: the row of `source` under each voxel of a target block's patch."""
    size = [(b - 1) * s + k for b, s, k in zip(target.block, stride, kernel, strict=True)]
    cells = torch.stack(torch.unravel_index(target.blocks.long(), target.cells.shape), 1)
    axes = [torch.arange(n, device=case.device) for n in size]
    offset = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
    step = cells.new_tensor([b * s for b, s in zip(target.block, stride, strict=True)])
    corner = cells[:, 1:] * step - cells.new_tensor(pads)
    places = (corner[:, None] + offset).flatten(0, 1)
    sample = cells[:, :1].expand(-1, offset.shape[0]).flatten()
    rows, there = rows_at(source, sample, places, torch.ones_like(sample, dtype=torch.bool))
    absent = source.n_blocks * source.block_voxels
    return torch.where(there, rows, absent).view(-1, *size)


class Numba(Engine):
    """The readable oracle, compiled by numba: what plain loops cost."""

    name = "numba"
    passes = ("forward",)

    def build(self, case: Case) -> None:
        if case.device != "cpu":
            raise Unsupported("numba: the oracle runs on the CPU")
        if case.flops > 1e9:
            raise Unsupported("numba: more than 1 GFLOP would take minutes")
        self.oracle = load_oracle()
        import numba

        self.about = {"library": "numba", "version": numba.__version__, "layout": "NCDHW, float64"}
        self.about["threads"] = 1
        self.masks = [
            reference.voxel_mask(level)[:, 0].cpu().numpy()
            for level in (case.in_level, case.out_level)
        ]
        packed = case.x.double().view(case.in_level.n_blocks, *case.in_level.block, -1)
        self.x, self.weight = reference.unpack(packed, case.in_level), case.weight.double()

    def run(self, which: str) -> Callable[[], Any]:
        if which not in self.passes:
            raise Unsupported("numba: the oracle has no backward")
        _, stride, pads = self.case.window
        groups, one = self.case.work.groups, (1, 1, 1)
        x, weight = self.x.numpy(), self.weight.numpy()
        if self.case.work.transposed:
            call, last = self.oracle.conv_transpose3d, (stride, pads, (0, 0, 0), one, groups)
        else:
            call, last = self.oracle.conv3d, (stride, pads, pads, one, groups)
        return lambda: torch.from_numpy(call(x, *self.masks, weight, None, *last))

    def rows(self, which: str, result: Tensor) -> Tensor:
        return reference.pack(result, self.case.out_level).flatten(0, 3)


def load_oracle() -> ModuleType:
    """tests/sparse/numba_oracle.py, which is no part of a package."""
    if importlib.util.find_spec("numba") is None:
        raise Unsupported("numba is not installed")
    spec = importlib.util.spec_from_file_location("numba_oracle", ORACLE)
    if spec is None or spec.loader is None or not ORACLE.is_file():
        raise Unsupported("numba: tests/sparse/numba_oracle.py is not there")
    if "numba_oracle" not in sys.modules:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["numba_oracle"] = module
    return sys.modules["numba_oracle"]


def engines() -> dict[str, type[Engine]]:
    """All engines by name, whether installed or not."""
    from peers import PEERS

    return {e.name: e for e in (Native, Reference, Dense, DenseLast, Halo, Numba, *PEERS)}


def build(names: list[str], case: Case) -> tuple[dict[str, Engine], dict[str, str]]:
    """The engines that take the case, and for the others the reason why not."""
    ready, refused = {}, {}
    for name in names:
        try:
            ready[name] = engines()[name](case)
        except Exception as error:  # a row with status "error" says what happened
            refused[name] = str(error) if isinstance(error, Unsupported) else reason(error)
    return ready, refused
