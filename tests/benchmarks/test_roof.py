"""Useful work is counted voxel by voxel, and the roof is what the processor can do."""

from __future__ import annotations

import itertools

import pytest
import roof
import torch

from medspark.sparse import BlockMask, reference
from medspark.sparse._ext import load_extension, native

needs_kernels = pytest.mark.skipif(load_extension() is None, reason="the kernels are not built")
# FLOPs that a core can retire in a cycle at most: two units, a multiply-add counting twice.
PER_CYCLE = {
    "avx512 fma": 2 * 16 * 2, "avx512 vdpbf16ps": 2 * 32 * 2, "avx2 fma": 2 * 8 * 2,
    "multiply and add, 128 bit": 4 * 4, "neon fma": 4 * 4 * 2,
}  # fmt: skip
HERTZ = 6.5e9  # more than any


def brute_force(mask: BlockMask, size: tuple[int, ...], kernel, stride, padding=None) -> int:
    """Looks at every output voxel and every tap."""
    kernel, stride = roof.three(kernel), roof.three(stride)
    padding = padding or [(k - 1) // 2 for k in kernel]
    out = tuple(n // s for n, s in zip(size, stride, strict=True))
    fine = reference.voxel_mask(mask.level(size))[:, 0]
    coarse = reference.voxel_mask(mask.level(out))[:, 0]
    pairs = 0
    for sample, *voxel in coarse.nonzero().tolist():
        for tap in itertools.product(*(range(k) for k in kernel)):
            place = [o * s - p + t for o, s, p, t in zip(voxel, stride, padding, tap, strict=True)]
            if all(0 <= i < n for i, n in zip(place, size, strict=True)):
                pairs += bool(fine[(sample, *place)])
    return pairs


@pytest.mark.parametrize("hidden", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    ("grid", "size", "kernel", "stride"),
    [
        ((2, 2, 2), (8, 8, 8), 3, 1),
        ((2, 1, 3), (4, 4, 6), (1, 3, 5), 1),
        ((2, 2, 2), (4, 4, 4), 7, 1),  # reaches over whole blocks
        ((2, 2, 2), (8, 8, 8), 3, 2),
        ((2, 2, 2), (8, 8, 8), 2, 2),
        ((4, 4, 4), (4, 4, 4), 3, 2),  # the output is coarser than the cells
        ((2, 2, 2), (8, 8, 8), 1, 2),
    ],
)
def test_pairs_are_those_of_a_count(grid, size, kernel, stride, hidden) -> None:
    mask = BlockMask.random(2, grid, hidden, torch.Generator().manual_seed(1))
    assert roof.present_pairs(mask, size, kernel, stride) == brute_force(mask, size, kernel, stride)


def test_pairs_with_padding_of_its_own() -> None:
    mask = BlockMask.random(1, (2, 2, 2), 0.5, torch.Generator().manual_seed(0))
    fine, coarse = mask.level((8, 8, 8)), mask.level((4, 4, 4))
    found = roof.count_pairs(fine, coarse, 4, 2, padding=(1, 0, 2))
    assert found == brute_force(mask, (8, 8, 8), 4, 2, padding=(1, 0, 2))
    assert found != roof.count_pairs(fine, coarse, 4, 2, padding=1)


def test_all_visible_leaves_out_the_border_only() -> None:
    mask = BlockMask(torch.ones(1, 2, 2, 2, dtype=torch.bool))
    assert roof.present_pairs(mask, (8, 8, 8), 3) == (3 * 8 - 2) ** 3


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_is_possible(dtype) -> None:
    rates = [native().peak_flops(dtype, 1, 0.02) for _ in range(3)]
    limit = PER_CYCLE[native().peak_instruction(dtype)] * HERTZ
    assert 1e8 < max(rates) < limit, "a loop that the compiler shortened would be faster"


@needs_kernels
def test_peak_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="float16"):
        native().peak_flops("float16", 1, 0.01)
    with pytest.raises(ValueError, match="threads"):
        native().peak_flops("float32", 0, 0.01)


@needs_kernels
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(("size", "offset", "threads"), [(100_003, 5, 3), (64, 0, 4), (1, 1, 1)])
def test_copy_copies_and_nothing_else(streaming, size, offset, threads) -> None:
    source = torch.randint(1, 255, (size + 16,), dtype=torch.uint8)
    target = torch.zeros(size + 16, dtype=torch.uint8)
    addresses = source.data_ptr() + 3, target.data_ptr() + offset
    native().stream_copy(*addresses, size, streaming, threads)
    assert torch.equal(target[offset : offset + size], source[3 : 3 + size])
    assert not target[:offset].any()
    assert not target[offset + size :].any()


def test_bound_is_the_lower_roof() -> None:
    made = roof.Roof(flops={"float32": [1e9, 4e9, 2e9]}, bandwidth=[1e9])
    assert made.peak("float32") == made.peak("float16") == 2e9
    assert made.bound_ms("float32", flops=4e9, bytes_moved=1e9) == 2000
    assert made.bound_by("float32", flops=4e9, bytes_moved=1e9) == "compute"
    assert made.bound_ms("float32", flops=1e9, bytes_moved=3e9) == 3000
    assert made.bound_by("float32", flops=1e9, bytes_moved=3e9) == "memory"
    assert made.since(1).peak("float32") == 3e9
