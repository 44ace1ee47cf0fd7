"""The decisions of setup.py, and that a wheel carries every config."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def build_script() -> ModuleType:
    """setup.py as a module: importing it starts no build."""
    spec = importlib.util.spec_from_file_location("medspark_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _program(folder: Path, name: str, body: str = "exit 0") -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def empty_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH with nothing on it, for this Python as well."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    for name in ("CXX", "CUDACXX", "MEDSPARK_NATIVE", "MEDSPARK_CUDA"):
        monkeypatch.delenv(name, raising=False)
    return folder


def test_without_compiler_auto_skips_and_says_so(
    build_script: ModuleType, empty_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build_script.native_wanted() is False
    assert "no C++ compiler found" in capsys.readouterr().err


def test_without_compiler_on_is_an_error(
    build_script: ModuleType, empty_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDSPARK_NATIVE", "on")
    with pytest.raises(SystemExit, match="no C\\+\\+ compiler found"):
        build_script.native_wanted()


def test_with_compiler_auto_builds_and_off_does_not(
    build_script: ModuleType, empty_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _program(empty_path, "g++")
    assert build_script.native_wanted() is True
    monkeypatch.setenv("MEDSPARK_NATIVE", "OFF")
    assert build_script.native_wanted() is False


def test_cxx_decides_which_compiler(
    build_script: ModuleType, empty_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _program(empty_path, "g++")
    monkeypatch.setenv("CXX", "missing-g++ -m64")
    assert build_script.native_wanted() is False
    own = _program(empty_path, "own-g++")
    monkeypatch.setenv("CXX", "own-g++ -m64")
    assert build_script.find_compiler() == str(own)


@pytest.mark.parametrize("name", ["MEDSPARK_NATIVE", "MEDSPARK_CUDA"])
def test_unknown_switch_value_is_named(
    build_script: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "maybe")
    with pytest.raises(SystemExit, match=f"{name}='maybe'"):
        build_script.switch(name)


def test_nvcc_is_looked_for_in_cuda_home(
    build_script: ModuleType, empty_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    nvcc = _program(tmp_path / "cuda" / "bin", "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert build_script.find_nvcc() == str(nvcc)
    monkeypatch.setenv("CUDACXX", "chosen-nvcc")
    assert build_script.find_nvcc() == "chosen-nvcc"


def test_changed_configuration_starts_afresh(build_script: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    cmake = str(_program(tmp_path, "cmake", f'echo "$@" >> {log}\ntest ! -e {tmp_path}/broken'))

    def configure(pybind11: str, **env: str) -> bool:
        command = [cmake, f"-Dpybind11_DIR={pybind11}"]
        build_script.configure(command, {**os.environ, **env}, tmp_path)
        return "--fresh" in log.read_text().splitlines()[-1]

    assert configure("old")
    assert not configure("old"), "an unchanged configuration must keep its object files"
    assert configure("new"), "the cache names a pybind11 that may be gone"
    assert configure("new", CXX="clang++")
    (tmp_path / "broken").touch()
    with pytest.raises(SystemExit, match="cmake failed"):
        configure("new", CXX="clang++")
    (tmp_path / "broken").unlink()
    assert configure("new", CXX="clang++"), "a failed configure leaves nothing to build on"


def test_wheel_contents(tmp_path: Path) -> None:
    """Every config at any depth is installed; tests and benchmarks are not; stale files leave."""
    stale = tmp_path / "lib" / "medspark" / "configs" / "gone.yaml"
    native = tmp_path / "lib" / "medspark" / "_C.so"
    stale.parent.mkdir(parents=True)
    for path in (stale, native):
        path.touch()
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")]
    environment = {**os.environ, "MEDSPARK_NATIVE": "OFF"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    installed = {str(p.relative_to(tmp_path / "lib")) for p in (tmp_path / "lib").rglob("*.*")}
    configs = (ROOT / "configs").rglob("*.yaml")
    expected = {f"medspark/configs/{path.relative_to(ROOT / 'configs')}" for path in configs}
    assert {name for name in installed if name.endswith(".yaml")} == expected
    assert "medspark/cli/main.py" in installed
    assert "medspark/_C.so" in installed, "a compiled extension must survive build_py"
    assert {Path(name).parts[0] for name in installed} == {"medspark"}


def test_build_requires_no_torch(build_script: ModuleType) -> None:
    import tomllib

    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert not [name for name in requires if name.startswith("torch")]
    run = f"runpy.run_path({str(ROOT / 'setup.py')!r})"
    probe = f"import runpy, sys; {run}; print('torch' in sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", probe], check=True, capture_output=True, text=True
    )
    assert json.loads(output.stdout.strip().lower()) is False
