"""Generated shapes, masks, windows and semantics: kernels against the reference, and what never changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from torch import Tensor, nn

from medspark.sparse import BlockMask, BlockSparseTensor, Semantics, use_backend

many = settings(
    derandomize=True,
    deadline=None,
    max_examples=100,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
Op = Callable[..., Tensor]
WIDTHS = st.sampled_from([1, 2, 3, 5, 17])  # channels of a group; kernels treat 16 and more apart
TIGHT = 1e-11  # of the largest value; another order of summation is all that may differ


@dataclass(frozen=True)
class Volume:
    """A masked volume: cells, voxels per axis, which voxels are active, and the choices it carries."""

    mask: BlockMask
    size: tuple[int, ...]
    semantics: Semantics
    channels: int
    seed: int

    @property
    def axes(self) -> int:
        return len(self.size)

    def dense(self) -> Tensor:
        """Random numbers, no two alike."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.mask.batch_size, self.channels, *self.size)
        return torch.randn(shape, generator=generator, dtype=torch.float64)


def active(visible: Tensor, size: Sequence[int], rule: str) -> Tensor:
    """Voxels [B, *size] that are active, one by one from the cells that each of them covers."""
    found = torch.zeros(visible.shape[0], *size, dtype=torch.bool)
    spans = [
        [(i * g // n, max((i + 1) * g // n, i * g // n + 1)) for i in range(n)]
        for n, g in zip(size, visible.shape[1:], strict=True)
    ]
    coarser = any(n < g for n, g in zip(size, visible.shape[1:], strict=True))
    for at in itertools.product(*map(range, size)):
        box = [slice(*span[i]) for span, i in zip(spans, at, strict=True)]
        cells = visible[(slice(None), *box)].flatten(1)
        shown = {
            "any": cells.any(1),
            "all": cells.all(1),
            "majority": 2 * cells.sum(1) > cells.shape[1],
            "every": torch.ones(len(cells), dtype=torch.bool),
        }
        found[(slice(None), *at)] = shown[rule if coarser else "any"]
    return found


def maps(size: int, cells: int) -> bool:
    """Whether an axis of a level consists of whole cells, or its voxels do."""
    return size >= 1 and (size % cells == 0 or cells % size == 0)


@st.composite
def volumes(draw: Any, groups: int = 1) -> Volume:
    """Cells and voxels on 2 or 3 axes; samples with some, no or all cells; levels coarser than the cell."""
    n = draw(st.sampled_from([2, 3]))
    grid = tuple(draw(st.integers(1, 4)) for _ in range(n))
    size = tuple(
        draw(st.sampled_from([s for s in range(1, 13) if maps(s, cells)])) for cells in grid
    )
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    shares = draw(st.lists(st.sampled_from([0.5, 0.3, 0.8, 1.0, 0.0]), min_size=1, max_size=3))
    visible = torch.stack([torch.rand(grid, generator=generator) < share for share in shares])
    semantics = Semantics(
        draw(st.sampled_from(["any", "all", "majority", "every"])),
        draw(st.sampled_from(["zero", "ignore"])),
        draw(st.sampled_from(["kernel", "active"])),
    )
    channels = groups * draw(WIDTHS)
    return Volume(BlockMask(visible), size, semantics, channels, seed)


def same(a: Sequence[Tensor | None], b: Sequence[Tensor | None], bound: float) -> None:
    for i, (own, other) in enumerate(zip(a, b, strict=True)):
        assert (own is None) == (other is None), i
        if own is None or other is None:
            continue
        assert own.shape == other.shape, i
        if own.numel() and bound == 0:
            assert torch.equal(own, other), i
        elif own.numel():
            assert (own - other).abs().max() <= bound * max(1.0, other.abs().max().item()), i


def run(op: Op, v: Volume, x: Tensor, parameters: Sequence[Tensor], backend: Any) -> list[Any]:
    """Result (dense), gradient of the volume and of the parameters."""
    leaf = x.clone().requires_grad_()
    leaves = [p.clone().requires_grad_() for p in parameters]
    with use_backend(backend):
        y = op(BlockSparseTensor.from_dense(leaf, v.mask, v.semantics), *leaves)
        dense = y.to_dense() if isinstance(y, BlockSparseTensor) else y
        generator = torch.Generator().manual_seed(v.seed + 1)
        dense.backward(torch.randn(dense.shape, generator=generator, dtype=torch.float64))
    return [dense.detach(), leaf.grad, *(p.grad for p in leaves)]


def check(op: Op, v: Volume, *parameters: Tensor) -> None:
    """Native equals reference; hidden voxels neither act nor are acted upon."""
    x = v.dense()
    own, oracle = (run(op, v, x, parameters, backend) for backend in ("native", "reference"))
    same(own, oracle, TIGHT)
    shown = active(v.mask.visible, v.size, v.semantics.coarse)[:, None]
    for fill in (torch.nan, -torch.inf):
        poisoned = torch.where(shown, x, fill)
        same(run(op, v, poisoned, parameters, "native"), own, 0)
    assert own[1].masked_select(~shown).abs().sum() == 0
    if own[0].shape[2:] != (1,) * v.axes:
        out = active(v.mask.visible, own[0].shape[2:], v.semantics.coarse)[:, None]
        assert own[0].masked_select(~out).abs().sum() == 0


@lru_cache
def windows(n: int, cells: int, ceil: bool, most_pad: int) -> list[tuple[int, int, int, int]]:
    """Kernel, stride, padding, dilation on an axis of n voxels whose output maps onto the cells."""
    found = []
    for k, s, d in itertools.product(range(1, 6), range(1, 4), range(1, 4)):
        for p in range(min(most_pad, d * (k - 1)) + 1):
            span = n + 2 * p - d * (k - 1) - 1
            out = (-(-span // s) if ceil else span // s) + 1
            out -= ceil and (out - 1) * s >= n + p
            whole = out * s == n or (out, n) == (1, 1)
            if span >= 0 and whole and maps(out, cells) and (d == 1 or k > 1):
                found.append((k, s, p, d))
    return found


def draw_window(draw: Any, v: Volume, ceil: bool, kind: str) -> list[tuple[int, ...]]:
    """Kernel, stride, padding and dilation, per axis, of a "conv", "max" or "avg".

    Pools are those that torch's own take, with a padding of half a kernel at most, and two more: dilated
    maxima with nothing but padding in a window, averages over more voxels than the axis has.
    """
    chosen = []
    for n, cells in zip(v.size, v.mask.grid, strict=True):
        options = windows(n, cells, ceil, 6)
        if kind != "conv":
            options = [w for w in options if w[2] <= w[0] // 2]
        if kind == "avg":
            options = [w for w in options if w[3] == 1]
        if ceil:  # where possible a last window that sticks out
            options = [w for w in options if w not in windows(n, cells, False, 6)] or options
        chosen.append(draw(st.sampled_from(options)))
    return list(zip(*chosen, strict=True))


def weights(v: Volume, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(v.seed + 2)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@many
@given(st.data())
def test_conv(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 3))
    v = data.draw(volumes(groups=groups))
    kernel, stride, padding, dilation = draw_window(data.draw, v, False, "conv")
    c_out = groups * data.draw(WIDTHS)
    parameters = [weights(v, c_out, v.channels // groups, *kernel)]
    if data.draw(st.booleans()):
        parameters.append(weights(v, c_out))
    conv = F.conv2d if v.axes == 2 else F.conv3d

    def op(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return conv(x, weight, bias, stride, padding, dilation, groups)

    check(op, v, *parameters)


@lru_cache
def transposed(n: int, cells: int) -> list[tuple[int, int, int, int, int]]:
    """Kernel, stride, padding, dilation, output padding that turn n voxels into stride * n."""
    found = []
    axes = (range(1, 6), range(1, 4), range(6), range(1, 3), range(3))
    for k, s, p, d, extra in itertools.product(*axes):
        whole = d * (k - 1) + 1 + extra == s + 2 * p
        if whole and extra < max(s, d) and maps(n * s, cells) and (d == 1 or k > 1) and n * s <= 12:
            found.append((k, s, p, d, extra))
    return found


@many
@given(st.data())
def test_conv_transpose(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 3))
    v = data.draw(volumes(groups=groups))
    sizes = zip(v.size, v.mask.grid, strict=True)
    chosen = [data.draw(st.sampled_from(transposed(n, cells))) for n, cells in sizes]
    kernel, stride, padding, dilation, extra = zip(*chosen, strict=True)
    c_out = data.draw(WIDTHS)
    parameters = [weights(v, v.channels, c_out, *kernel)]
    if data.draw(st.booleans()):
        parameters.append(weights(v, c_out * groups))
    conv = F.conv_transpose2d if v.axes == 2 else F.conv_transpose3d

    def op(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return conv(x, weight, bias, stride, padding, extra, groups, dilation)

    check(op, v, *parameters)


@many
@given(st.data())
def test_max_pool(data: st.DataObject) -> None:
    v, ceil = data.draw(volumes()), data.draw(st.booleans())
    kernel, stride, padding, dilation = draw_window(data.draw, v, ceil, "max")
    pool = F.max_pool2d if v.axes == 2 else F.max_pool3d
    check(lambda x: pool(x, kernel, stride, padding, dilation, ceil), v)


@many
@given(st.data())
def test_avg_pool(data: st.DataObject) -> None:
    v, ceil = data.draw(volumes()), data.draw(st.booleans())
    kernel, stride, padding, _ = draw_window(data.draw, v, ceil, "avg")
    count_padding = data.draw(st.booleans())
    divisor = data.draw(st.sampled_from([None, None, 5]))
    pool = F.avg_pool2d if v.axes == 2 else F.avg_pool3d
    check(lambda x: pool(x, kernel, stride, padding, ceil, count_padding, divisor), v)


NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "batch": lambda axes, c: (nn.BatchNorm2d if axes == 2 else nn.BatchNorm3d)(c, momentum=0.3),
    "instance": lambda axes, c: (nn.InstanceNorm2d if axes == 2 else nn.InstanceNorm3d)(
        c, affine=True, track_running_stats=True
    ),
    "group": lambda axes, c: nn.GroupNorm(2, c),
    "one group": lambda axes, c: nn.GroupNorm(1, c),
}


@many
@given(volumes(groups=2), st.sampled_from(sorted(NORMS)), st.booleans())
def test_norms(v: Volume, kind: str, training: bool) -> None:
    shown = active(v.mask.visible, v.size, v.semantics.coarse)
    assume(
        not (kind == "batch" and training and shown.sum() == 1)
    )  # torch's error, tested elsewhere
    statistics: list[list[Tensor]] = []

    def op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        norm = NORMS[kind](v.axes, v.channels).double().train(training)
        buffers = dict(norm.named_buffers())
        y: Tensor = torch.func.functional_call(norm, {"weight": weight, "bias": bias, **buffers}, x)
        statistics.append([b for b in buffers.values() if b.is_floating_point()])
        return y

    weight = weights(v, 2, v.channels)
    check(op, v, weight[0], weight[1])
    native, reference, *poisoned = statistics
    same(native, reference, TIGHT)
    for other in poisoned:
        same(other, native, 0)


@many
@given(volumes(), st.booleans())
def test_global_pool(v: Volume, maximum: bool) -> None:
    pools = (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)
    if v.axes == 3:
        pools = (F.adaptive_avg_pool3d, F.adaptive_max_pool3d)
    check(lambda x: pools[maximum](x, 1), v)


@many
@given(volumes())
def test_active_voxels_are_those_of_the_rule(v: Volume) -> None:
    """A round trip of ones shows every active voxel and no other."""
    x = torch.ones(v.mask.batch_size, 1, *v.size)
    shown = active(v.mask.visible, v.size, v.semantics.coarse)[:, None]
    for backend in ("native", "reference"):
        with use_backend(backend):  # type: ignore[arg-type]
            back = BlockSparseTensor.from_dense(x, v.mask, v.semantics).to_dense()
        assert torch.equal(back > 0, shown)
