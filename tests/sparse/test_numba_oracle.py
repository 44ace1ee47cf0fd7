"""The plain-torch oracle against loops in numba, and both against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medspark.sparse import reference

from . import numba_oracle as numba

Three = tuple[int, int, int]
ONE, NONE = (1, 1, 1), (0, 0, 0)


@dataclass(frozen=True)
class Window:
    """A sliding window over a volume; `upper` padding is `lower` unless given."""

    size: Three
    kernel: Three
    stride: Three = ONE
    lower: Three = NONE
    dilation: Three = ONE
    upper: Three | None = None
    groups: int = 1
    channels: tuple[int, int] = (4, 6)
    ceil: bool = False
    bias: bool = True

    @property
    def both(self) -> tuple[Three, Three]:
        return self.lower, self.lower if self.upper is None else self.upper

    @property
    def output(self) -> tuple[int, ...]:
        axes = zip(self.size, self.kernel, self.stride, *self.both, self.dilation, strict=True)
        return tuple(numba.window_size(*axis, self.ceil) for axis in axes)


WINDOWS = {
    "3x3x3": Window((4, 5, 6), (3, 3, 3), lower=ONE),
    "no padding": Window((4, 5, 6), (2, 3, 4), bias=False),
    "stride 2": Window((8, 6, 4), (3, 3, 3), (2, 2, 2), ONE),
    "anisotropic": Window((3, 8, 6), (1, 3, 5), (1, 2, 3), (0, 1, 2)),
    "dilation": Window((6, 7, 8), (3, 2, 3), (1, 1, 2), (2, 1, 3), (2, 3, 2)),
    "groups": Window((4, 4, 4), (3, 3, 1), lower=(1, 1, 0), groups=2),
    "depthwise": Window((4, 4, 4), (3, 3, 3), lower=ONE, groups=4, channels=(4, 4)),
    "depthwise, two outputs each": Window((3, 4, 3), (3, 1, 3), groups=3, channels=(3, 6)),
    "uneven padding": Window((5, 4, 4), (4, 2, 3), (2, 1, 1), (1, 0, 2), upper=(2, 1, 0)),
    "stem": Window((8, 8, 8), (7, 7, 7), (2, 2, 2), (3, 3, 3), channels=(1, 3), bias=False),
}
POOLS = {
    "k3 s2 p1": Window((4, 6, 8), (3, 3, 3), (2, 2, 2), ONE),
    "k2 s2": Window((4, 4, 6), (2, 2, 2), (2, 2, 2)),
    "anisotropic": Window((3, 6, 7), (1, 2, 4), (1, 2, 3), (0, 1, 2)),
    "ceil": Window((5, 6, 7), (2, 3, 2), (2, 2, 2), (0, 1, 1), ceil=True),
    "ceil, stride 3": Window((5, 7, 8), (3, 3, 2), (3, 2, 3), (1, 1, 0), ceil=True),
    "longer than the axis": Window((2, 4, 1), (3, 5, 2), (1, 2, 2), (1, 2, 1), ceil=True),
}


def masks(size: tuple[int, ...], seed: int) -> Tensor:
    """Voxel masks `[3, 1, D, H, W]`: random, empty, full. The ops promise nothing about blocks here."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, 1, *size, generator=generator) < 0.4
    mask[1], mask[2] = False, True
    return mask


def volume(mask: Tensor, channels: int, shift: float = 0.0) -> Tensor:
    """Random numbers, NaN at hidden voxels."""
    x = torch.randn(mask.shape[0], channels, *mask.shape[2:], dtype=torch.float64) + shift
    return torch.where(mask, x, torch.nan)


def flat(mask: Tensor) -> np.ndarray[Any, Any]:
    return mask[:, 0].numpy()


def agree(torchs: Tensor, numbas: np.ndarray[Any, Any]) -> None:
    assert torchs.shape == numbas.shape
    assert np.isfinite(numbas).all()
    assert np.abs(numbas).max() > 0
    np.testing.assert_allclose(
        torchs.numpy(), numbas, rtol=1e-12, atol=1e-12 * np.abs(numbas).max()
    )


@pytest.mark.parametrize("name", WINDOWS)
def test_conv3d(name) -> None:
    w = WINDOWS[name]
    lower, upper = w.both
    c_in, c_out = w.channels
    mask, out_mask = masks(w.size, 1), masks(w.output, 2)
    x = volume(mask, c_in)
    weight = torch.randn(c_out, c_in // w.groups, *w.kernel, dtype=torch.float64)
    bias = torch.randn(c_out, dtype=torch.float64) if w.bias else None
    # The reference is told the lower padding and finds the upper one from the output's size.
    args = (weight, bias, w.stride, lower, w.dilation, w.groups)
    got = reference.conv3d(x, mask, out_mask, *args)
    expected = numba.conv3d(
        x.numpy(), flat(mask), flat(out_mask), weight.numpy(), None if bias is None else bias.numpy(),
        w.stride, lower, upper, w.dilation, w.groups,
    )  # fmt: skip
    agree(got, expected)


TRANSPOSED = {  # window whose input the transposed convolution gives, output padding
    "k4 s2 p1": (Window((4, 6, 4), (4, 4, 4), (2, 2, 2), ONE), NONE),
    "k2 s2": (Window((4, 4, 6), (2, 2, 2), (2, 2, 2), bias=False), NONE),
    "k3 s2, output padding": (Window((4, 4, 4), (3, 3, 3), (2, 2, 2), ONE), ONE),
    "anisotropic": (Window((3, 4, 6), (1, 2, 5), (1, 2, 3), (0, 0, 1)), NONE),
    "dilation": (Window((6, 6, 6), (2, 3, 2), (1, 2, 1), (1, 2, 0), (2, 2, 3)), (0, 1, 0)),
    "groups": (Window((4, 4, 4), (2, 2, 3), (2, 2, 1), (0, 0, 1), groups=2), NONE),
    "depthwise": (Window((4, 4, 4), (3, 3, 3), lower=ONE, groups=4, channels=(4, 4)), NONE),
}


@pytest.mark.parametrize("name", TRANSPOSED)
def test_conv_transpose3d(name) -> None:
    w, extra = TRANSPOSED[name]
    c_in, c_out = w.channels
    mask = masks(w.output, 1)
    axes = zip(w.output, w.stride, w.lower, w.dilation, w.kernel, extra, strict=True)
    fine = tuple((n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, s, p, d, k, e in axes)
    out_mask = masks(fine, 2)
    x = volume(mask, c_in)
    weight = torch.randn(c_in, c_out // w.groups, *w.kernel, dtype=torch.float64)
    bias = torch.randn(c_out, dtype=torch.float64) if w.bias else None
    got = reference.conv_transpose3d(
        x, mask, out_mask, weight, bias, w.stride, w.lower, extra, w.groups, w.dilation
    )
    expected = numba.conv_transpose3d(
        x.numpy(), flat(mask), flat(out_mask), weight.numpy(), None if bias is None else bias.numpy(),
        w.stride, w.lower, extra, w.dilation, w.groups,
    )  # fmt: skip
    agree(got, expected)


@pytest.mark.parametrize("hidden", ["zero", "ignore"])
@pytest.mark.parametrize("name", [*POOLS, "dilation"])
def test_max_pool3d(name, hidden) -> None:
    w = POOLS.get(name) or Window((6, 5, 7), (3, 2, 3), (1, 1, 2), (1, 1, 1), (2, 2, 1))
    mask, out_mask = masks(w.size, 1), masks(w.output, 2)
    x = volume(mask, 4, shift=-1.0)
    window = (w.kernel, w.stride, w.lower, w.dilation)
    got = reference.max_pool3d(x, mask, out_mask, window, hidden)
    arrays = (x.numpy(), flat(mask), flat(out_mask))
    geometry = (w.kernel, w.stride, *w.both, w.dilation, w.ceil)
    agree(got, numba.max_pool3d(*arrays, *geometry, hidden == "zero"))


@pytest.mark.parametrize("hidden", ["zero", "ignore"])
def test_maximum_of_padding_alone(hidden) -> None:
    # Taps -1 and 1 of an axis of one voxel.
    w = Window((3, 1, 4), (1, 2, 1), lower=(0, 1, 0), dilation=(1, 2, 1))
    mask, out_mask = masks(w.size, 1), masks(w.output, 2)
    x = volume(mask, 2).requires_grad_()
    window = (w.kernel, w.stride, w.lower, w.dilation)
    got = reference.max_pool3d(x, mask, out_mask, window, hidden)
    got.backward(torch.ones_like(got))
    arrays = (x.detach().numpy(), flat(mask), flat(out_mask))
    geometry = (w.kernel, w.stride, *w.both, w.dilation, False)
    for zero in (got, x.grad, numba.max_pool3d(*arrays, *geometry, hidden == "zero")):
        assert zero is not None and zero.shape == x.shape and (zero == 0).all()


@pytest.mark.parametrize("divisor", ["kernel", "active"])
@pytest.mark.parametrize(("count_padding", "override"), [(True, None), (False, None), (True, 5)])
@pytest.mark.parametrize("name", POOLS)
def test_avg_pool3d(name, count_padding, override, divisor) -> None:
    w = POOLS[name]
    mask, out_mask = masks(w.size, 1), masks(w.output, 2)
    x = volume(mask, 4)
    window = (w.kernel, w.stride, w.lower)
    got = reference.avg_pool3d(x, mask, out_mask, window, count_padding, override, divisor)
    arrays = (x.numpy(), flat(mask), flat(out_mask))
    options = (w.ceil, count_padding, override or 0, divisor == "active")
    agree(got, numba.avg_pool3d(*arrays, *window, *options))


@pytest.mark.parametrize("kind", ["batch", "instance", "one group", "groups", "layer"])
def test_norms(kind) -> None:
    mask = masks((4, 3, 5), 1)
    x = volume(mask, 6, shift=3.0)
    weight, bias = torch.randn(2, 6, dtype=torch.float64)
    affine = (weight, bias, 1e-3)
    arrays = (x.numpy(), flat(mask))
    numbers = (weight.numpy(), bias.numpy(), 1e-3)
    if kind in ("batch", "instance"):
        got = reference.norm(x, mask, *affine, per_sample=kind == "instance")
        expected = (numba.batch_norm if kind == "batch" else numba.instance_norm)(*arrays, *numbers)
        for a, b in zip(got, expected, strict=True):
            agree(a, b)
        return
    groups = {"one group": 1, "groups": 3, "layer": 6}[kind]
    got_y = reference.group_norm(x, mask, groups, *affine)
    agree(got_y, numba.group_norm(*arrays, groups, *numbers))


@pytest.mark.parametrize("maximum", [False, True])
def test_global_pool(maximum) -> None:
    mask = masks((4, 3, 5), 1)
    x = volume(mask, 6, shift=-5.0)
    agree(
        reference.global_pool(x, mask, maximum), numba.global_pool(x.numpy(), flat(mask), maximum)
    )


SIZES: dict[str, tuple[Three, Three, tuple[float, float, float] | None]] = {
    "twice": ((3, 4, 2), (6, 8, 4), None),
    "by factors of 2": ((3, 4, 2), (6, 8, 4), (2.0, 2.0, 2.0)),
    "anisotropic": ((3, 4, 2), (3, 8, 6), (1.0, 2.0, 3.0)),
    "ratios": ((3, 4, 5), (5, 7, 3), None),
    "factors that miss the ratio": ((3, 4, 5), (5, 7, 3), (1.7, 1.9, 0.7)),
    "to and from one voxel": ((1, 4, 3), (3, 1, 1), None),
}


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "linear", "linear, aligned"])
@pytest.mark.parametrize("name", SIZES)
def test_interpolate(name, mode) -> None:
    size, fine, scales = SIZES[name]
    mask, out_mask = masks(size, 1), masks(fine, 2)
    x = volume(mask, 4)
    kind, _, aligned = mode.partition(", ")
    got = reference.interpolate(x, mask, out_mask, fine, kind, bool(aligned), scales)
    options = (kind == "linear", bool(aligned), kind == "nearest-exact", scales or (0.0,) * 3)
    agree(got, numba.interpolate(x.numpy(), flat(mask), flat(out_mask), *options))


# Volumes of one row, small enough to work out on paper. HID marks hidden voxels.
HID = float("nan")


def row(*values: float) -> tuple[Tensor, Tensor, Any, Any]:
    """A row as tensor and mask [1, 1, 1, 1, W], and both as arrays."""
    x = torch.tensor(values, dtype=torch.float64).view(1, 1, 1, 1, -1)
    mask = ~x.isnan()
    return x, mask, x.numpy(), flat(mask)


def both_are(torchs: Tensor, numbas: Any, *values: float) -> None:
    expected = np.array(values)
    np.testing.assert_allclose(torchs.numpy().ravel(), expected, rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(np.asarray(numbas).ravel(), expected, rtol=1e-14, atol=1e-14)


def along(n: int, other: int) -> Three:
    """A per-axis argument of a row."""
    return other, other, n


def both_conv(values, out, taps, bias, stride, padding, dilation) -> tuple[Tensor, Any]:
    x, mask, x_, mask_ = row(*values)
    out_mask = torch.tensor(out).bool().view(1, 1, 1, 1, -1)
    weight = torch.tensor(taps, dtype=torch.float64).view(1, 1, 1, 1, -1)
    b = torch.tensor([bias], dtype=torch.float64)
    s, p, d = along(stride, 1), along(padding, 0), along(dilation, 1)
    ours = reference.conv3d(x, mask, out_mask, weight, b, s, p, d, 1)
    return ours, numba.conv3d(x_, mask_, flat(out_mask), weight.numpy(), b.numpy(), s, p, p, d, 1)


def test_conv_by_hand() -> None:
    taps, four = (1.0, 10.0, 100.0), (1.0, 2.0, HID, 4.0)
    both_are(*both_conv(four, (1, 1, 0, 1), taps, 0.0, 1, 1, 1), 210, 21, 0, 40)
    both_are(*both_conv(four, (1, 1, 1, 1), taps, 0.5, 1, 1, 1), 210.5, 21.5, 402.5, 40.5)
    both_are(*both_conv(four, (1, 1), taps, 0.0, 2, 1, 1), 210, 402)
    both_are(*both_conv(four, (1, 1, 1, 1), taps, 0.0, 1, 2, 2), 10, 420, 1, 42)
    both_are(*both_conv((HID, HID), (1, 0), taps, 7.0, 1, 1, 1), 7, 0)


def test_conv_transpose_by_hand() -> None:
    x, mask, x_, mask_ = row(3, HID, 5)
    # Taps 1, 10, 100, 1000 of voxel i land on 2 i - 1 .. 2 i + 2.
    weight = torch.tensor([1.0, 10, 100, 1000], dtype=torch.float64).view(1, 1, 1, 1, 4)
    out_mask = torch.tensor([1, 1, 1, 1, 0, 1]).bool().view(1, 1, 1, 1, 6)
    s, p = along(2, 1), along(1, 0)
    ours = reference.conv_transpose3d(x, mask, out_mask, weight, None, s, p, NONE, 1, ONE)
    second = numba.conv_transpose3d(
        x_, mask_, flat(out_mask), weight.numpy(), None, s, p, NONE, ONE, 1
    )
    both_are(ours, second, 30, 300, 3000, 5, 0, 500)


def test_pools_by_hand() -> None:
    x, mask, x_, mask_ = row(-1, -2, HID, -4, HID, HID)
    out_mask = torch.ones(1, 1, 1, 1, 3, dtype=torch.bool)
    k, s, p = along(3, 1), along(2, 1), along(1, 0)
    arrays = (x_, mask_, flat(out_mask))
    # Windows: (padding, -1, -2), (-2, hidden, -4), (-4, hidden, hidden).
    expected_max = {"zero": (-1, 0, 0), "ignore": (-1, -2, -4)}
    for hidden, expected in expected_max.items():
        ours = reference.max_pool3d(x, mask, out_mask, (k, s, p, ONE), hidden)  # type: ignore[arg-type]
        second = numba.max_pool3d(*arrays, k, s, p, p, ONE, False, hidden == "zero")
        both_are(ours, second, *expected)
    averages: list[tuple[Any, tuple[float, ...]]] = [
        (("kernel", True, None), (-1, -2, -4 / 3)),
        (("kernel", False, None), (-1.5, -2, -4 / 3)),
        (("kernel", True, 4), (-0.75, -1.5, -1)),
        (("active", True, None), (-1.5, -3, -4)),
    ]
    for (divisor, padded, override), expected in averages:
        ours = reference.avg_pool3d(x, mask, out_mask, (k, s, p), padded, override, divisor)
        second = numba.avg_pool3d(
            *arrays, k, s, p, False, padded, override or 0, divisor == "active"
        )
        both_are(ours, second, *expected)


def test_ceil_mode_by_hand() -> None:
    x, mask, x_, mask_ = row(2, 4, 6, 8, 10)
    out_mask = torch.ones(1, 1, 1, 1, 3, dtype=torch.bool)
    k, s = along(2, 1), along(2, 1)
    ours = reference.avg_pool3d(x, mask, out_mask, (k, s, NONE), True, None, "kernel")
    # The last window holds one voxel, and what lies behind the volume does not count.
    both_are(ours, numba.avg_pool3d(x_, mask_, flat(out_mask), k, s, NONE, True, True, 0, False),
             3, 7, 10)  # fmt: skip


def test_norms_by_hand() -> None:
    one, two = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64) + 2
    x, mask, x_, mask_ = row(1, HID, 3)  # mean 2, variance 1
    y, mean, var = reference.norm(x, mask, two, one, 3.0, per_sample=False)
    second = numba.batch_norm(x_, mask_, two.numpy(), one.numpy(), 3.0)
    both_are(y, second[0], 0, 0, 2)
    both_are(mean, second[1], 2)
    both_are(var, second[2], 1)
    # Two samples, the second without a voxel; then one group of two channels, 1, 3, 5, 7.
    x, mask = torch.cat([x, x * torch.nan]), torch.cat([mask, mask & False])
    y, mean, var = reference.norm(x, mask, one, one, 3.0, per_sample=True)
    second = numba.instance_norm(x.numpy(), flat(mask), one.numpy(), one.numpy(), 3.0)
    both_are(y, second[0], 0.5, 0, 1.5, 0, 0, 0)
    both_are(mean, second[1], 2, 0)
    both_are(var, second[2], 1, 0)
    x, mask, x_, mask_ = row(1, HID, 3)
    x = torch.cat([x, x + 4], 1)
    weight, bias = torch.tensor([3.0, 6.0]).double(), torch.tensor([0.0, 1.0]).double()
    ours = reference.group_norm(x, mask, 1, weight, bias, 4.0)  # mean 4, variance 5
    second_y = numba.group_norm(x.numpy(), mask_, 1, weight.numpy(), bias.numpy(), 4.0)
    both_are(ours, second_y, -3, 0, -1, 3, 0, 7)


def test_global_pool_by_hand() -> None:
    x, mask, x_, mask_ = row(-1, HID, -5)
    both_are(reference.global_pool(x, mask, False), numba.global_pool(x_, mask_, False), -3)
    both_are(reference.global_pool(x, mask, True), numba.global_pool(x_, mask_, True), -1)
    x, mask, x_, mask_ = row(HID, HID)
    for maximum in (False, True):
        both_are(reference.global_pool(x, mask, maximum), numba.global_pool(x_, mask_, maximum), 0)


@pytest.mark.parametrize(
    ("mode", "align", "values"),
    [
        ("nearest", False, (0, 0, 0, 4)),
        ("nearest-exact", False, (0, 0, 0, 4)),
        ("linear", False, (0, 1, 0, 4)),
        ("linear", True, (0, 4 / 3, 0, 4)),
    ],
)
def test_interpolate_by_hand(mode, align, values) -> None:
    x, mask, x_, mask_ = row(HID, 4)
    out_mask = torch.tensor([1, 1, 0, 1]).bool().view(1, 1, 1, 1, 4)
    ours = reference.interpolate(x, mask, out_mask, (1, 1, 4), mode, align, None)
    options = (mode == "linear", align, mode == "nearest-exact", (0.0, 0.0, 0.0))
    both_are(ours, numba.interpolate(x_, mask_, flat(out_mask), *options), *values)


def test_nearest_and_nearest_exact_differ_by_hand() -> None:
    x, mask, x_, mask_ = row(1, 2, 3, 4, 5)
    out_mask = torch.ones(1, 1, 1, 1, 3, dtype=torch.bool)
    # Output voxel o reads at 5/3 o, or at 5/3 (o + 1/2), rounded down.
    for mode, values in (("nearest", (1, 2, 4)), ("nearest-exact", (1, 3, 5))):
        ours = reference.interpolate(x, mask, out_mask, (1, 1, 3), mode, False, None)  # type: ignore[arg-type]
        options = (False, False, mode == "nearest-exact", (0.0, 0.0, 0.0))
        both_are(ours, numba.interpolate(x_, mask_, flat(out_mask), *options), *values)
