"""Finding the compilers, and building small host programs against the core."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"


@pytest.fixture(scope="session")
def compiler() -> str:
    """The C++ compiler of this machine."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    pytest.skip("no C++ compiler found (c++, g++, clang++ or $CXX)")


@pytest.fixture(scope="session")
def nvcc() -> str:
    """The CUDA compiler; no GPU is needed."""
    found = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if not found or not shutil.which(found):
        pytest.skip("nvcc not found: the CUDA kernels are not compiled here")
    return found


@pytest.fixture
def run_program(compiler: str, tmp_path: Path) -> Callable[..., str]:
    """Compiles sources into one program, runs it, and returns what it printed."""

    def run(*sources: Path, flags: tuple[str, ...] = ()) -> str:
        program = tmp_path / "program"
        command = [
            compiler,
            "-std=c++17",
            "-O1",
            "-Wno-unknown-pragmas",
            "-ffp-contract=off",
            *flags,
        ]
        command += [f"-I{CSRC / 'include'}", *map(str, sources), "-o", str(program)]
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        ran = subprocess.run([str(program)], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    return run


@pytest.fixture(scope="session")
def sanitizer(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Flags that make an access outside its buffer fatal, where the compiler has them."""
    folder = tmp_path_factory.mktemp("sanitizer")
    (folder / "probe.cpp").write_text("int main() { return 0; }")
    command = [compiler, "-fsanitize=address", "probe.cpp", "-o", "probe"]
    built = subprocess.run(command, cwd=folder, capture_output=True).returncode == 0
    works = built and subprocess.run([str(folder / "probe")], capture_output=True).returncode == 0
    return ("-fsanitize=address",) if works else ()
