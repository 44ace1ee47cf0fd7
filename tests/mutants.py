"""Does a test fail for each index expression of the C++ core that is broken?

Breaks one expression at a time in a temporary copy of csrc, medspark and tests, builds the copy for the CPU
alone, and runs the generated-case tests and those of the op until one fails. Prints a table; the exit code
is 1 if a mutant survives or no longer matches the source. Takes about half a minute per mutant.

    python tests/mutants.py                     all of them
    python tests/mutants.py --only "norm"       those whose name holds the text
    python tests/mutants.py --list              names, and nothing is built
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "csrc",
    "medspark",
    "tests",
    "configs",
    "setup.py",
    "CMakeLists.txt",
    "pyproject.toml",
    "README.md",
)
LIMIT = 600  # seconds of one build or test run; a mutant may loop for ever
# Shrinking a failing example is for readers; here its existence is all that counts.
PROFILE = """from hypothesis import Phase, settings

settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate])
settings.load_profile("mutants")
"""

# Sources of the convolution under other stems than its own.
CONV_PARTS = ("conv3d_weight", "conv_weights", "conv_depthwise", "deep_rows")


@dataclass(frozen=True)
class Mutant:
    """One broken expression: the text `old`, which `file` holds once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str

    @property
    def tests(self) -> list[str]:
        """Stems of the ops that the file takes part in."""
        shared = ["conv3d", "conv_transpose3d", "pool3d"]
        if self.file.endswith("index.h"):
            return [*shared, "transfer", "resample3d"]
        if self.file.endswith("row_map.h"):
            return shared
        stem = Path(self.file).stem
        return ["conv3d"] if stem in CONV_PARTS else [stem]


def _of(file: str, *entries: tuple[str, str, str]) -> list[Mutant]:
    stem = Path(file).stem
    return [Mutant(f"{stem}: {what}", file, old, new) for what, old, new in entries]


MUTANTS = [
    *_of(
        "csrc/include/medspark/index.h",
        ("input_of without dilation", "- padding + k * dilation;", "- padding + k;"),
        ("input_of one past the end", "i >= 0 && i < size", "i >= 0 && i <= size"),
        ("output_of padding's sign", "i + padding - k * dilation", "i - padding - k * dilation"),
        ("output_of between strides", "scaled < 0 || scaled % stride != 0", "scaled < 0"),
        ("output_of one past the end", "return o < size ? o", "return o <= size ? o"),
        ("row_of place in the block", "block * n[0] + z % n[0]", "block * n[0] + z % n[1]"),
        ("row_of stride of cells", "* level.grid[2] + x / n[2]", "* level.grid[1] + x / n[2]"),
        ("voxel_of z", "% level.grid[0] * n[0]", "% level.grid[1] * n[0]"),
        ("voxel_of y", "v.y = local % n[1]", "v.y = local % n[2]"),
        ("voxel_of sample", "v.b = cell / level.grid[1] / level.grid[0]", "v.b = cell / level.grid[1]"),
    ),
    *_of(
        "csrc/cpu/row_map.h",
        ("stride of cells", "{grid[1] * grid[2]", "{grid[0] * grid[2]"),
        ("stride of voxels", "{block[1] * block[2]", "{block[0] * block[2]"),
        ("order of rows", "* voxels + order_[i % voxels]", "* voxels + i % voxels"),
        ("line in y", "y = py; y < n[1]; y += p[1]", "y = py; y < n[1]; y += p[2]"),
        ("outside in y", "if ((z.cell | y.cell) >= 0)", "if (z.cell >= 0)"),
        ("sample", "cells + origin.b * source_.sample_cells()", "cells + origin.b * target_.sample_cells()"),
        ("block size of a run", "block * voxels + z.local", "block * target_.block_voxels() + z.local"),
        ("cell of a coordinate", "s / block[a]", "s / target_.block[a]"),
        ("cell of a run", "source / source_.block[2]", "source / target_.block[2]"),
        ("window of another axis", "window_.dilation[a]", "window_.dilation[2]"),
        ("runs of a phase", "runs_at + line->phase * k[2]", "runs_at + line->phase"),
        ("run cut at its front", "(from - run->begin) * step_", "from * step_"),
        ("run of another cell", "runs_.back().cell == cell;", "runs_.back().cell <= cell;"),
        ("place of a listed row", "static_cast<int32_t>(i));", "static_cast<int32_t>(i + 1));"),
        ("first tap", "first / k[2] % k[1], first / k[2] / k[1]}", "0, first / k[2] / k[1]}"),
        ("single row's phase", "(local - line.first) * phases_[2]", "(local - line.first)"),
    ),
    *_of(
        "csrc/cpu/conv3d.cpp",
        ("channels of a group", "source_ + g * way_.depth;", "source_;"),
        ("bias of a group", "bias_[g * way_.columns + first + j]", "bias_[first + j]"),
        ("target row", "(map_.target_row(start + i) *", "((start + i) *"),
        ("share of slabs", "gemm.slabs() * (part + 1) / parts", "gemm.slabs() * part / parts + 1"),
        ("deep rows of taps", "s.offset[i] = i * depth_", "s.offset[i] = i * way_.depth"),
        ("list of a tap", "(listed_ ? t * n : 0)", "0"),
        ("weight of a tap", "weight + t * tap_size", "weight + t * depth_"),
    ),
    *_of(
        "csrc/cpu/conv_weights.cpp",
        ("weight of a group", "(g * out_group + first) * in_group + d0", "first * in_group + d0"),
        ("backward weight", "(g * out_group + d) * in_group + first", "(g * out_group + d) * in_group"),
        ("padding of a slab", "i < rows && n < kernel_.nr", "i < 0 && n < kernel_.nr"),
        ("end of a transposition", "for (; j < n; ++j)", "for (; j + 1 < n; ++j)"),
        ("sum of segments", "s < segments; ++s", "s + 1 < segments; ++s"),
        ("gradient of a group", "((g * out + first) * in + c0)", "(first * in + c0)"),
    ),
    *_of(
        "csrc/cpu/conv3d_weight.cpp",
        ("span of channels", "x_ + item.g * in_ + item.c0;", "x_ + item.g * in_;"),
        ("share of taps", "taps_ * (part + 1) / parts, c,", "taps_ * part / parts + 1, c,"),
        ("end of a segment", "chunks * (item.segment + 1)", "chunks * item.segment"),
        ("rows of dy", "(start + i) * op_.groups + g)", "(start + i) * op_.groups)"),
        ("panel of a slab", "s.panel.data() + slab * chunk_rows * kernel_.nr", "s.panel.data()"),
    ),
    *_of(
        "csrc/cpu/conv_depthwise.cpp",
        ("last slab", "std::min(s * nr, op.in_channels - nr)", "s * nr"),
        ("bias of a channel", "bias[first + i % nr]", "bias[i % nr]"),
        ("gradient's channel", "dw[(first_of(op, s, nr) + j) * taps + t]", "dw[(s * nr + j) * taps + t]"),
        ("sums of a segment", "sums.data() + i * size);", "sums.data());"),
    ),
    *_of(
        "csrc/cpu/deep_rows.h",
        ("first column", "at = to + i * columns + from_c - c0", "at = to + i * columns"),
        ("step of the sources", "map.step() * row_size", "row_size"),
    ),
    *_of(
        "csrc/cpu/pool3d.cpp",
        ("tap in y", "t / w.kernel[2] % w.kernel[1]", "t / w.kernel[2] % w.kernel[2]"),
        ("padding above", "op.in.size(a) + w.padding[a]", "op.in.size(a)"),
        ("padding below", "std::max<int64_t>(low, 0)", "low"),
        ("which tap won", "if (arg[c] == t)", "if (arg[c] >= t)"),
        ("divisor's row", "op, voxel_of(op.out, row));", "op, voxel_of(op.out, 0));"),
    ),
    *_of(
        "csrc/cpu/norm.cpp",
        ("end of a segment", "first + chunk_rows, op.starts[s + 1])", "first + chunk_rows, op.rows)"),
        ("moments of a chunk", "moments[(next * 2 + 1) * C + c]", "moments[next * 2 * C + c]"),
        ("statistics of a segment", "var[chunks[i].segment * C + c]", "var[c]"),
        ("sums of a segment", "sums[chunks[i].segment * 2 * C + c]", "sums[c]"),
        ("rows of a segment", "<double>(op.starts[s + 1] - op.starts[s])", "<double>(op.rows)"),
    ),
    *_of(
        "csrc/cpu/global_pool.cpp",
        ("span of channels", "i % spans * span;", "i % spans;"),
        ("result of a sample", "y[b * op.channels + c] = Element", "y[c] = Element"),
        ("which row won", "argmax[i] == r ?", "argmax[i] == r - op.starts[b] ?"),
    ),
    *_of(
        "csrc/cpu/densify.cpp",
        ("cell in y", "cell / l.grid[2] % l.grid[1]", "cell / l.grid[2] % l.grid[2]"),
        ("origin of a cell", "gz * n[0] * op.strides[2]", "gz * n[1] * op.strides[2]"),
        ("block of a feature", "to = features + (i * voxels + local)", "to = features + (i + local)"),
        ("channel stride", "dense[at + c * op.strides[1]]", "dense[at + c]"),
    ),
    *_of(
        "csrc/cpu/transfer.cpp",
        ("level of the rows", "voxel_of(op.out, row)", "voxel_of(op.in, row)"),
        ("source row", "x + source * C, C, y", "x + row * C, C, y"),
        ("first row of a chunk", "row = chunk * chunk_rows;", "row = chunk;"),
    ),
    *_of(
        "csrc/cpu/resample3d.cpp",
        ("weight in y", "wz[z] * wy[y] * wx[x]", "wz[z] * wz[y] * wx[x]"),
        ("sources in x", "x < ax.start[v.x + 1]", "x < ax.start[v.x] + 1"),
        ("source in z", "az.index[z], ay.index[y]", "ay.index[z], ay.index[y]"),
    ),
]  # fmt: skip


def copy_to(folder: Path) -> None:
    """The parts of the project that a build and its tests need."""
    junk = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", ".hypothesis")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=junk)
        else:
            shutil.copy2(source, folder / name)
    (folder / "conftest.py").write_text(PROFILE)


def call(folder: Path, *command: str) -> tuple[int, str]:
    """Exit code (124: too long) and output of a Python command in the copy."""
    env = {**os.environ, "MEDSPARK_NATIVE": "ON", "MEDSPARK_CUDA": "OFF", "PYTHONPATH": str(folder)}
    env.setdefault("OMP_NUM_THREADS", "1")
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=folder, env=env, text=True, timeout=LIMIT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 124, ""
    return done.returncode, done.stdout


def build(folder: Path) -> str | None:
    """Builds the extension in the copy; the compiler's words if it fails."""
    status, output = call(folder, "setup.py", "-q", "build_ext", "--inplace")
    return output[-3000:] if status else None


def first_failure(folder: Path, ops: list[str]) -> str | None:
    """The first test that fails, or how the run ended; None if all pass.

    Raises:
        RuntimeError: the tests did not run on the copy's own extension.
    """
    files = [f"tests/sparse/test_{stem}.py" for stem in ("properties", *ops)]
    status, output = call(folder, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files)
    if status == 0:
        used = call(folder, "-c", "import medspark._C as c; print(c.__file__)")[1].strip()
        if folder.resolve() not in Path(used).resolve().parents:
            raise RuntimeError(f"the tests ran on {used}, not on the copy's extension")
        return None
    if status == 124:
        return "(endless)"
    found = re.search(r"^(?:FAILED|ERROR) tests/sparse/(.+?)(?: - |$)", output, re.MULTILINE)
    if found:
        return found.group(1)
    # A fatal signal: faulthandler prints where Python was.
    place = re.search(r'tests/sparse/(test_\w+\.py)", line \d+ in (test_\w+)', output)
    if place:
        return f"{place.group(1)}::{place.group(2)} (crash)"
    return f"(exit code {status}: {' '.join(output.split())[-200:]})"


def judge(folder: Path, mutant: Mutant) -> tuple[bool, str]:
    """Whether a mutant dies, and of what."""
    path = folder / mutant.file
    source = path.read_text() if path.exists() else ""
    if source.count(mutant.old) != 1:
        return False, f"NO MATCH: the source holds the text {source.count(mutant.old)} times"
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        problem = build(folder)
        if problem:
            return False, f"DOES NOT COMPILE: {problem.splitlines()[-1]}"
        failure = first_failure(folder, mutant.tests)
    finally:
        path.write_text(source)
    return failure is not None, failure or "SURVIVED"


def check_unbroken(folder: Path, chosen: list[Mutant]) -> None:
    """Ends the program where the tests fail without any mutant."""
    problem = build(folder) or first_failure(folder, sorted({t for m in chosen for t in m.tests}))
    if problem:
        sys.exit(f"the unbroken copy fails, which says nothing of mutants: {problem}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="part of the names of the mutants to try")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if args.only in m.name]
    if args.list or not chosen:
        print("\n".join(m.name for m in (chosen or MUTANTS)))
        return 0 if chosen else 2
    survivors = 0
    width = max(len(m.name) for m in chosen)
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        folder = Path(name)
        copy_to(folder)
        check_unbroken(folder, chosen)
        print(f"{'mutant':<{width}}  seconds  first test that failed", flush=True)
        for mutant in chosen:
            start = time.perf_counter()
            dead, why = judge(folder, mutant)
            survivors += not dead
            print(f"{mutant.name:<{width}}  {time.perf_counter() - start:7.0f}  {why}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants die")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
