"""The work of every CUDA kernel, item by item on the host, against the CPU core.

The program runs each launch in two orders of its items (their bits must be equal), with poisoned
outputs and a workspace of exactly the promised size, over many windows, masks and element types.
On small integers every sum is exact: there, kernels and core must agree to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"

CONVOLUTIONS = {"conv3d", "conv3d_input", "conv3d_weight"}
POOLS = {"max_pool3d", "max_pool3d_input", "avg_pool3d", "avg_pool3d_input", "argmax"}
GLOBAL_POOLS = {"global_mean", "global_mean_input", "global_max", "global_max_input"}
NORMS = {"norm", "norm_statistics", "norm_input", "norm_parameters"}
DENSE = {"densify", "gather", "sum_hidden"}
LEVELS = {"transfer", "sum_untransferred", "resample3d"}
OPS = CONVOLUTIONS | POOLS | GLOBAL_POOLS | NORMS | DENSE | LEVELS
SUMS = {"conv3d_weight", "sum_hidden", "sum_untransferred"}  # in the accumulation type
ROUNDING = {"f32": 2**-23, "f64": 2**-52, "bf16": 2**-7, "f16": 2**-10}
HALVES = {"bf16", "f16"}


def measured(report: str) -> dict[tuple[str, str, str], tuple[float, int]]:
    """(op, dtype, numbers) -> worst relative difference and number of values compared."""
    lines = [line.split() for line in report.splitlines()]
    return {(op, dtype, kind): (float(worst), int(n)) for op, dtype, kind, worst, n in lines}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_generic_kernels_equal_the_cpu_core(
    run_program: Callable[..., str], sanitizer: tuple[str, ...]
) -> None:
    # The portable microkernel is the plainest statement of the CPU core, and compiles anywhere.
    core = [path for path in sorted((CSRC / "cpu").glob("*.cpp")) if "_avx" not in path.stem]
    program = Path(__file__).with_name("generic_host.cpp")
    found = measured(run_program(program, *core, flags=("-DMEDSPARK_X86=0", *sanitizer)))
    kinds = ("integers", "reals")
    assert set(found) == {(op, t, kind) for op in OPS for t in ROUNDING for kind in kinds}
    for (op, dtype, kind), (worst, n) in found.items():
        exact = kind == "integers" and not op.startswith("norm")
        # Sums of up to 5,000 rounded terms in another order, relative to a result that may be
        # smaller than its terms; 16-bit results round once more, to neighbours at worst.
        wide = "f32" if dtype in HALVES and op in SUMS else dtype
        limit = 0.0 if exact else (1 if wide in HALVES else 128) * ROUNDING[wide]
        assert worst <= limit, f"{op} {dtype} {kind}: {worst:.3g} > {limit:.3g}"
        assert n >= 200, f"{op} {dtype} {kind}: only {n} values compared"
