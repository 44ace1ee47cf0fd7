"""Feature pyramid of an untouched encoder, found by tracing strides."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medspark.models.axes import AXES, axes_of

Stride = tuple[int, ...]

# Trace inputs: shapes only where every op knows the meta device, else one small input.
_TRACE_INPUTS = (("meta", 512), ("cpu", 64))


@dataclass(frozen=True)
class Level:
    """One map of a pyramid: output of the ``call``-th call of ``module`` in a forward pass."""

    module: str
    call: int
    stride: Stride
    channels: int


@dataclass
class _Call:
    module: str
    call: int
    start: int
    end: int
    stride_in: Stride | None
    stride_out: Stride | None
    channels: int


def as_stride(value: int | Sequence[int], dims: int) -> Stride:
    """``4`` or ``[1, 4, 4]`` as a tuple with an entry for each of 2 (y, x) or 3 (z, y, x) axes.

    Raises:
        ValueError: another number of axes or of entries, or an entry below 1.
    """
    names = axes_of(dims).names
    stride = (value,) * dims if isinstance(value, int) else tuple(int(v) for v in value)
    if len(stride) != dims or min(stride) < 1:
        number = "two" if dims == 2 else "three"
        raise ValueError(f"a stride is one or {number} positive integers {names}, not {value!r}")
    return stride


def spatial_dims(encoder: nn.Module) -> int:
    """Axes of what ``encoder`` works on: 2, images [B, C, H, W], or 3, volumes [B, C, D, H, W].

    Told from the class of its convolutions; 1D ones (channel attention) say nothing.

    Raises:
        ValueError: no 2D or 3D convolution, or both kinds.
    """
    first: dict[int, str] = {}
    for name, module in encoder.named_modules():
        for dims, axes in AXES.items():
            if isinstance(module, (axes.conv, axes.conv_transpose)):
                first.setdefault(dims, name or "the network itself")
    if len(first) == 1:
        return next(iter(first))
    found = (
        f"mixes 2D convolutions ({first[2]}) and 3D ones ({first[3]})"
        if first
        else "has no 2D or 3D convolution"
    )
    raise ValueError(
        f"{type(encoder).__name__} {found}, so it is unclear whether it takes images [B, C, H, W] "
        "or volumes [B, C, D, H, W]; an encoder has nn.Conv2d or nn.Conv3d modules, of one kind"
    )


def find_levels(encoder: nn.Module, in_channels: int = 1) -> list[Level]:
    """The last output of a 2D or 3D ``encoder`` at each total stride, fine to coarse.

    One forward pass of a copy is traced, on the meta device where the encoder allows it. The map of
    a stride is the last one finished before the outermost module starts that leads to the next
    coarser stride. So a ResNet gives its stage outputs, not the narrow 1x1x1 maps with which a
    bottleneck of the next stage begins at the old resolution.

    Raises:
        ValueError: the encoder runs on neither trace input, has no strided output, or neither 2 nor
            3 axes.
    """
    dims = spatial_dims(encoder)
    calls = _trace(encoder, in_channels, dims)
    strides = sorted({c.stride_out for c in calls if c.stride_out is not None}, key=math.prod)
    levels = []
    for i, stride in enumerate(strides):
        coarser = strides[i + 1 :]
        end = _level_end(calls, stride, coarser)
        found = [c for c in calls if c.stride_out == stride and c.end < end]
        if found:
            last = max(found, key=lambda c: c.end)
            levels.append(Level(last.module, last.call, stride, last.channels))
    if not levels:
        raise ValueError(
            f"{type(encoder).__name__} has no output {AXES[dims].layout} with a whole stride"
        )
    return levels


def _level_end(calls: list[_Call], stride: Stride, coarser: list[Stride]) -> float:
    if not coarser:
        return math.inf
    steps = [c.start for c in calls if c.stride_in == stride and c.stride_out == coarser[0]]
    # A step made by a function, not a module, shows only in the first output behind it.
    return min(steps) if steps else min(c.end for c in calls if c.stride_out in coarser)


def _trace(encoder: nn.Module, in_channels: int, dims: int) -> list[_Call]:
    problems = []
    for device, size in _TRACE_INPUTS:
        try:
            network = copy.deepcopy(encoder).to(device).eval()
            x = torch.zeros(1, in_channels, *[size] * dims, device=device)
            with torch.no_grad():
                return _record(network, x)
        except Exception as error:  # whatever an arbitrary network raises is reported below
            problems.append(f"{size}^{dims} on {device}: {type(error).__name__}: {error}")
    kind, axes = ("an image", "H, W") if dims == 2 else ("a volume", "D, H, W")
    raise ValueError(
        f"{type(encoder).__name__} does not run on {kind} [1, {in_channels}, {axes}]; "
        + "; ".join(problems)
    )


def _record(network: nn.Module, x: Tensor) -> list[_Call]:
    calls: list[_Call] = []
    open_calls: list[_Call] = []
    counts: Counter[str] = Counter()
    clock = iter(range(1 << 60))

    def before(name: str, args: tuple[Any, ...]) -> None:
        first = args[0] if args else None
        call = _Call(name, counts[name], next(clock), -1, _stride_of(first, x), None, 0)
        counts[name] += 1
        open_calls.append(call)

    def after(output: Any) -> None:
        call = open_calls.pop()
        call.end = next(clock)
        call.stride_out = _stride_of(output, x)
        call.channels = int(output.shape[1]) if call.stride_out is not None else 0
        calls.append(call)

    for name, module in network.named_modules():
        if name:
            module.register_forward_pre_hook(lambda m, args, name=name: before(name, args))
            module.register_forward_hook(lambda m, args, output: after(output))
    network(x)
    return calls


def _stride_of(value: Any, x: Tensor) -> Stride | None:
    """Stride at which ``value`` lies, if it is a map of the network's input ``x``."""
    if not isinstance(value, Tensor) or value.ndim != x.ndim:
        return None
    sizes = list(zip(x.shape[2:], value.shape[2:], strict=True))
    # One voxel left means a global pool, which has no stride.
    if any(out <= 1 or full % out for full, out in sizes):
        return None
    return tuple(full // out for full, out in sizes)


class Pyramid(nn.Module):
    """Runs an encoder once, unmodified, and returns its maps at chosen total strides.

    The encoder keeps its class and ``state_dict`` keys (below ``encoder.``); hooks live only during
    a forward pass, so copies and pickles carry none. Works on plain tensors and on
    ``BlockSparseTensor``.

    Args:
        encoder: any module that maps [B, in_channels, D, H, W], or an image [B, in_channels, H, W],
            through strided stages.
        in_channels: channels of the input.
        strides: total strides wanted, fine to coarse, an int or one per axis ((z, y, x) or (y, x))
            each; ``None`` takes all found.

    Attributes:
        dims: spatial axes of the encoder, 2 or 3.
        levels: module, stride and channels of each map, fine to coarse.

    Raises:
        ValueError: a stride does not exist in the encoder (the message lists those that do), or it
            is unclear how many axes the encoder has.
    """

    def __init__(
        self,
        encoder: nn.Module,
        in_channels: int = 1,
        strides: Sequence[int | Sequence[int]] | None = (4, 8, 16, 32),
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.dims = spatial_dims(encoder)
        found = {level.stride: level for level in find_levels(encoder, in_channels)}
        wanted = list(found) if strides is None else [as_stride(s, self.dims) for s in strides]
        missing = [s for s in wanted if s not in found]
        if missing or not wanted:
            raise ValueError(
                f"{type(encoder).__name__} has no map of stride {missing}; found are "
                + ", ".join(f"{s} ({found[s].channels} channels)" for s in found)
            )
        self.levels = sorted((found[s] for s in wanted), key=lambda level: math.prod(level.stride))

    @property
    def strides(self) -> list[Stride]:
        """Total strides per axis, (z, y, x) or (y, x), fine to coarse."""
        return [level.stride for level in self.levels]

    @property
    def channels(self) -> list[int]:
        """Channels of the maps, fine to coarse."""
        return [level.channels for level in self.levels]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps [B, C_i, (D/s_i,) H/s_i, W/s_i], fine to coarse, of the same kind as ``x``."""
        maps: dict[tuple[str, int], Tensor] = {}
        counts: Counter[str] = Counter()

        def keep(name: str, output: Tensor) -> None:
            maps[name, counts[name]] = output
            counts[name] += 1

        with ExitStack() as hooks:
            for name in {level.module for level in self.levels}:
                module = self.encoder.get_submodule(name)
                handle = module.register_forward_hook(
                    lambda m, args, out, name=name: keep(name, out)
                )
                hooks.callback(handle.remove)
            self.encoder(x)
        return [maps[level.module, level.call] for level in self.levels]
