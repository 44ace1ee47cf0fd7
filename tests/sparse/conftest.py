"""Oracle of the sparse ops: torch's dense op in float64, and accuracy relative to a low-precision run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from medspark.sparse import BlockMask


@pytest.fixture
def assert_as_accurate() -> Callable[..., None]:
    """Asserts that a result is at most twice as far from float64 as torch's own run in its precision."""

    def check(got: Tensor, torch_run: Tensor, exact: Tensor, what: str = "result") -> None:
        assert got.shape == exact.shape, f"{what}: {got.shape} instead of {exact.shape}"
        if exact.numel() == 0:
            return
        own = (got.double() - exact).abs().max().item()
        # torch's own 16-bit conv3d backward leaves NaN in some runs; those entries give no measure.
        torchs = (torch_run.double() - exact).abs().nan_to_num(0.0).max().item()
        # float64 has no better run to compare with: two orders of summation differ by some roundings.
        roundings = 64 if got.dtype == torch.float64 else 1
        rounding = roundings * torch.finfo(got.dtype).eps * exact.abs().max().item()
        assert own <= 2 * torchs + rounding, f"{what}: error {own:.3g}, torch has {torchs:.3g}"

    return check


@pytest.fixture
def ragged_mask() -> Callable[..., BlockMask]:
    """Masks whose samples show some, no and all cells."""

    def make(grid: tuple[int, ...], batch: int = 3, seed: int = 0) -> BlockMask:
        generator = torch.Generator().manual_seed(seed)
        visible = torch.rand(batch, *grid, generator=generator) < 0.5
        visible[0].view(-1)[0] = True
        if batch > 1:
            visible[1] = False
        if batch > 2:
            visible[2] = True
        return BlockMask(visible)

    return make
