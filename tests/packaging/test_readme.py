"""README says nothing that does not run: blocks, commands, make targets, variables, links."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(kind.strip(), text) for kind, text in BLOCK.findall(README)]
SHELL_LINES = [
    line.partition(" #")[0].strip()
    for kind, text in BLOCKS
    if kind.startswith("bash")
    for line in text.splitlines()
]
COMMANDS = [line for line in SHELL_LINES if line.startswith("medspark ")]
RUNNABLE = [text for kind, text in BLOCKS if kind == "bash runnable"]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path}


def _run(command: list[str], folder: Path) -> str:
    result = subprocess.run(
        command, cwd=folder, env=_environment(), capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def _make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_first_steps_come_first() -> None:
    lines = README.splitlines()
    assert len(lines) <= 120
    for command in ("make demo", "make test"):
        assert any(line.startswith(command) for line in lines[:25])


def test_blocks_were_found() -> None:
    assert RUNNABLE
    assert PYTHON
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("text", RUNNABLE)
def test_runnable_block(text: str, tmp_path: Path) -> None:
    _run(["bash", "-euo", "pipefail", "-c", text], tmp_path)


@pytest.mark.parametrize("text", PYTHON)
def test_python_block(text: str, tmp_path: Path) -> None:
    _run([sys.executable, "-c", text], tmp_path)


@pytest.mark.parametrize("line", COMMANDS)
def test_overrides_compose(line: str, tmp_path: Path) -> None:
    """A command that needs scans is composed instead of run: every name in it must exist."""
    words = shlex.split(line)
    if words[1] != "info" and "--help" not in words:
        words += ["--cfg", "job"]
    _run(words, tmp_path)


def test_make_targets_exist() -> None:
    named = set(re.findall(r"\bmake ([a-z]+)", README)) - {"adds", "lists"}
    assert named <= _make_targets()
    assert {
        "help",
        "demo",
        "test",
        "dev",
        "lint",
        "format",
        "types",
        "bench",
        "clean",
    } <= _make_targets()


def test_other_shell_lines_are_known() -> None:
    known = ("medspark ", "make ", "git clone ", "pip install .")
    assert not [line for line in SHELL_LINES if line and not line.startswith(known)]


def test_every_variable_is_in_the_table() -> None:
    """Those that the code reads and those that README lists are the same."""
    sources = [
        ROOT / "setup.py",
        *(ROOT / "tests").rglob("*.py"),
        *(ROOT / "medspark").rglob("*.py"),
        *(ROOT / "csrc" / "cpu").glob("*.cpp"),
    ]
    read = {
        name for path in sources for name in re.findall(r"\"(MEDSPARK_[A-Z_]+)\"", path.read_text())
    }
    read -= {"MEDSPARK_VERSION"}  # handed to CMake, not read from the environment
    assert read == set(re.findall(r"^\| `(MEDSPARK_[A-Z_]+)`", README, re.MULTILINE))


def test_named_files_exist() -> None:
    files = re.findall(r"`([\w./-]+\.(?:md|txt|py)|LICENSE)`", README)
    assert files
    assert not [name for name in files if not (ROOT / name).exists()]
