"""The CUDA kernels compile for every architecture, without spilling registers and without atomics."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FILES = sorted((CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
MOST_REGISTERS = 96  # of 65,536: two blocks of 256 threads on any device
PTX_ATOMIC = re.compile(r"^\s*(?:@\S+\s+)?(?:atom|red)\.", re.MULTILINE)
SASS_ATOMIC = re.compile(r"\b(?:RED|REDG|ATOM|ATOMG|ATOMS)\b")

pytestmark = pytest.mark.slow


def compile_file(nvcc: str, source: Path, *options: str) -> str:
    command = [nvcc, "-std=c++17", "-O3", f"-I{CSRC / 'include'}", *options, str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return built.stdout + built.stderr


@pytest.mark.timeout(600)
@pytest.mark.parametrize("source", FILES, ids=lambda path: path.stem)
def test_compiles_for_every_architecture_without_spills(
    nvcc: str, source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "kernels.o"
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    said = compile_file(nvcc, source, "-Xptxas=-v", *targets, "-c", "-o", str(target))
    kernels = re.findall(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", said)
    assert {arch for _, arch in kernels} == set(ARCHITECTURES)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    assert len(spills) == len(registers) == len(kernels) > 0
    assert set(spills) == {("0", "0")}, [
        k for k, s in zip(kernels, spills, strict=True) if s != ("0", "0")
    ]
    assert max(registers) <= MOST_REGISTERS
    disassembler = shutil.which("cuobjdump")
    if disassembler:
        sass = subprocess.check_output([disassembler, "-sass", str(target)], text=True)
        assert "EXIT" in sass and not SASS_ATOMIC.search(sass)


@pytest.mark.parametrize("source", FILES, ids=lambda path: path.stem)
def test_uses_no_atomics(nvcc: str, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "kernels.ptx"
    compile_file(nvcc, source, "-arch=compute_80", "-ptx", "-o", str(target))
    ptx = target.read_text()
    assert ".entry" in ptx and "st.global" in ptx
    assert not PTX_ATOMIC.search(ptx), "an atomic makes results depend on the order of threads"


def test_patterns_find_atomics() -> None:
    assert PTX_ATOMIC.search("\t@%p1 red.global.add.f32 [%rd1], %f1;")
    assert PTX_ATOMIC.search("\tatom.global.add.u32 %r1, [%rd1], 1;")
    assert SASS_ATOMIC.search("RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R5")


def test_every_header_with_cuda_declarations_has_its_kernels() -> None:
    declared = {
        p.stem for p in (CSRC / "include/medspark").glob("*.h") if "namespace cuda" in p.read_text()
    }
    assert declared == {path.stem for path in FILES} != set()
