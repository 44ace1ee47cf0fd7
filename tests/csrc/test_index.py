"""Index logic of the sliding-window ops: exhaustive on small sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def test_rows_invert_and_windows_are_adjoint(run_program: Callable[..., str]) -> None:
    counts = run_program(Path(__file__).with_name("index_host.cpp")).split()
    assert counts[::2] == ["rows", "pairs"]
    assert int(counts[1]) > 100_000, "hardly any row was checked"
    assert int(counts[3]) > 50_000, "hardly any pair of voxels was checked"
