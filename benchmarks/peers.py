"""Sparse convolution engines of others, on the CPU. None is required; benchmarks/README.md has recipes.

All gather rows, multiply and scatter, kernel offset by kernel offset, and compute in float32. Both gradients
come out of one call, so they have the pass "backward" instead of the two single ones. Inputs stay in the
engine's own order of voxels; its index (kernel map) is built once and not timed.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from adapters import Engine, Unsupported
from roof import three
from torch import Tensor
from workloads import Case, meet, row_count, rows_at

from medspark.sparse import Level


class RowEngine(Engine):
    """An engine on `[N, C]` features of voxels in an order of its own.

    Attributes:
        in_order: the engine's row of each of our rows of the input; `out_order` of the output.
    """

    passes = ("forward", "backward")
    dtypes = (torch.float32,)
    package: ClassVar[str]
    in_order: Tensor
    out_order: Tensor
    outputs: int

    def build(self, case: Case) -> None:
        if case.device != "cpu":
            raise Unsupported(f"{self.name}: this adapter speaks to the CPU build only")
        if case.work.groups > 1:
            raise Unsupported(f"{self.name} has no groups")
        try:
            self.about = {
                "library": self.package,
                "version": importlib.metadata.version(self.package),
                "layout": "rows of voxels",
            }
        except importlib.metadata.PackageNotFoundError:
            self.about = {"library": self.package, "version": "?", "layout": "rows of voxels"}
        self.index(case)
        self.x = torch.empty_like(case.x)
        self.x[self.in_order] = case.x
        # Outputs that our mask hides get no gradient.
        self.dy = case.dy.new_zeros(self.outputs, case.dy.shape[1])
        self.dy[self.out_order] = case.dy

    def index(self, case: Case) -> None:
        """Sets `in_order`, `out_order`, `outputs` (rows of the output), `weight`, and the kernel map."""
        raise NotImplementedError

    def rows(self, which: str, result: Tensor) -> Tensor:
        return result[self.out_order if which == "forward" else self.in_order]


def _coordinates(level: Level) -> Tensor:
    """int32 `[rows, 4]` (sample, z, y, x), in packed order."""
    from workloads import places

    return places(level, torch.arange(row_count(level))).int().contiguous()


def _find(level: Level, coordinates: Tensor) -> Tensor:
    """The engine's row of each packed row, from the coordinates of the engine's rows."""
    c = coordinates.long()
    mine, there = rows_at(level, c[:, 0], c[:, 1:], torch.ones(len(c), dtype=torch.bool))
    order = torch.full((row_count(level),), -1)
    order[mine[there]] = torch.arange(len(c))[there]
    if bool((order < 0).any()):
        raise Unsupported("its output lacks voxels that our mask shows")
    return order


def _taps_in_out(case: Case) -> Tensor:
    """The weight as `[C_in, C_out, kz, ky, kx]`."""
    return case.weight if case.work.transposed else case.weight.transpose(0, 1)


class Spconv(RowEngine):
    """spconv's functional convolution, algorithm "native" (the CPU has no other).

    Its CPU scatter shares a row pointer between threads, so that sums race: calls run on one thread.
    Strided and transposed layers cannot be limited to a mask: they also compute a rim of voxels.
    """

    name = "spconv"
    package = "spconv"

    def index(self, case: Case) -> None:
        try:
            import spconv.pytorch as spconv
            from spconv.pytorch import functional, ops
        except ImportError as error:
            raise Unsupported(f"spconv is not installed ({error})") from error
        # The backward asks for a CUDA stream even on a CPU.
        ops.get_current_stream = lambda: 0
        self.algorithm = spconv.ConvAlgo.Native
        work, coordinates = case.work, _coordinates(case.in_level)
        kernel, stride, pads = (list(n) for n in case.window)
        self.same = not work.transposed and work.stride == 1
        self.function = functional.indice_subm_conv if self.same else functional.indice_conv
        found, self.pairs, self.sizes = ops.get_indice_pairs(
            coordinates, work.batch, [work.size] * 3, self.algorithm, kernel, stride, pads,
            [1] * 3, [0] * 3, self.same, work.transposed,
        )  # fmt: skip
        self.in_order = torch.arange(len(coordinates))
        self.out_order, self.outputs = _find(case.out_level, found), len(found)
        # [C_out, kz, ky, kx, C_in]
        self.weight = _taps_in_out(case).permute(1, 2, 3, 4, 0).contiguous()
        extra = self.outputs - row_count(case.out_level)
        self.about["threads"] = 1
        remark = "calls forced to one thread: its CPU scatter races on more"
        self.about["remark"] = remark + (f"; {extra} outputs outside the mask" if extra else "")

    def call(self, x: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = self.function(
            x, weight, self.pairs, self.sizes, self.outputs, self.algorithm
        )
        return result

    def run(self, which: str) -> Callable[[], Any]:
        def alone(call: Callable[[], Any]) -> Any:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return call()
            finally:
                torch.set_num_threads(threads)

        inner = alone(lambda: super(Spconv, self).run(which))
        return lambda: alone(inner)

    def weight_of(self, gradient: Tensor) -> Tensor:
        inside = gradient.permute(4, 0, 1, 2, 3)
        return inside if self.case.work.transposed else inside.transpose(0, 1)


class Minkowski(RowEngine):
    """MinkowskiEngine's convolution function. Gather and scatter are serial, the products are not."""

    name = "minkowski"
    package = "MinkowskiEngine"

    def index(self, case: Case) -> None:
        try:
            import MinkowskiEngine as engine
        except ImportError as error:
            raise Unsupported(f"MinkowskiEngine is not installed ({error})") from error
        self.about["version"] = engine.__version__
        work, step = case.work, case.work.stride if case.work.transposed else 1
        coordinates = _coordinates(case.in_level)
        coordinates[:, 1:] *= step
        volume = engine.SparseTensor(case.x, coordinates, tensor_stride=step)
        kind = engine.MinkowskiConvolution
        if work.transposed:
            kind = engine.MinkowskiConvolutionTranspose
        layer = kind(
            work.channels_in, work.channels_out, list(three(work.kernel)), work.stride, dimension=3
        )
        out = layer(volume)
        self.whole = layer.kernel.ndim == 2  # a kernel of one voxel is a matrix product
        order = (4, 3, 2, 0, 1)  # z runs fastest over the rows of its kernel
        weight = _taps_in_out(case).permute(*order)
        self.shape = weight.shape
        self.weight = weight.reshape(layer.kernel.shape).contiguous()
        self.layer, self.volume, self.out_key = layer, volume, out.coordinate_map_key
        self.in_order = _find(case.in_level, _unstrided(volume.C, step))
        step = 1 if work.transposed else work.stride
        self.out_order, self.outputs = _find(case.out_level, _unstrided(out.C, step)), len(out.C)

    def call(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.whole:
            return x @ weight
        result: Tensor = self.layer.conv.apply(
            x, weight, self.layer.kernel_generator, self.layer.convolution_mode,
            self.volume.coordinate_map_key, self.out_key, self.volume.coordinate_manager,
        )  # fmt: skip
        return result

    def weight_of(self, gradient: Tensor) -> Tensor:
        inside = gradient.view(self.shape).permute(3, 4, 2, 1, 0)
        return inside if self.case.work.transposed else inside.transpose(0, 1)


def _unstrided(coordinates: Tensor, step: int) -> Tensor:
    return torch.cat([coordinates[:, :1], coordinates[:, 1:].div(step, rounding_mode="floor")], 1)


class TorchSparse(RowEngine):
    """torchsparse 2.1's gather-scatter function, with a kernel map made here.

    Its own maps are built by GPU functions alone, so that its modules cannot run on a CPU.
    """

    name = "torchsparse"
    package = "torchsparse"

    def index(self, case: Case) -> None:
        try:
            from torchsparse.nn.functional.conv.func import gather_scatter
        except ImportError as error:
            raise Unsupported(f"torchsparse is not installed ({error})") from error
        self.function = gather_scatter.GatherScatterConvolutionFuntion
        rows = torch.arange(row_count(case.coarse))
        pairs = []
        for tap in range(case.taps):
            other, there = meet(case, rows, tap, forward=True)
            pairs.append(torch.stack([other[there], rows[there]], 1))
        fine, coarse = row_count(case.fine), row_count(case.coarse)
        self.map = {
            "nbmaps": torch.cat(pairs).int(),
            "nbsizes": torch.tensor([len(p) for p in pairs], dtype=torch.int32),
            "sizes": (fine, coarse),
            "input_mask": None,
            "output_mask": None,
        }
        self.config = {"epsilon": 0.0, "mm_thresh": 0}
        self.weight = _taps_in_out(case).flatten(2).permute(2, 0, 1).contiguous()
        self.in_order = torch.arange(row_count(case.in_level))
        self.out_order = torch.arange(row_count(case.out_level))
        self.outputs = len(self.out_order)
        self.about["remark"] = "kernel map built by the benchmark"

    def call(self, x: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = self.function.apply(
            x, weight, self.map, self.config, self.case.work.transposed
        )
        return result

    def weight_of(self, gradient: Tensor) -> Tensor:
        inside = gradient.permute(1, 2, 0).unflatten(2, three(self.case.work.kernel))
        return inside if self.case.work.transposed else inside.transpose(0, 1)


PEERS = (Spconv, Minkowski, TorchSparse)
