"""The installed console script: help of every command, and the report of `medspark info`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import medspark
from medspark.cli.main import COMMANDS

SCRIPT = Path(sys.executable).parent / "medspark"


def _run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    assert SCRIPT.exists(), "the console script is not installed; run: pip install -e . --no-deps"
    command = [str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def test_help_names_every_command(tmp_path: Path) -> None:
    result = _run("--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert not [name for name in COMMANDS if name not in result.stdout]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_of_command(command: str, tmp_path: Path) -> None:
    result = _run(command, "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert command in result.stdout
    assert not list(tmp_path.iterdir()), "asking for help must leave no files"


def test_unknown_command(tmp_path: Path) -> None:
    result = _run("pretrian", cwd=tmp_path)
    assert result.returncode == 2
    assert "pretrain" in result.stderr


def test_info_json(tmp_path: Path) -> None:
    result = _run("info", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["versions"]["medspark"] == medspark.__version__
    assert report["versions"]["torch"].startswith("2.")
    assert report["cpu"]["threads"] >= 1
    native = report["native"]
    if native["available"]:
        assert native["build"]["version"] == medspark.__version__
        assert Path(native["file"]).exists()
        assert set(native["build"]) >= {"commit", "compiler", "openmp", "with_cuda", "cuda_archs"}
    ops = {op["op"]: op["cpu"] for op in report["sparse_ops"]}
    assert ops["medspark::conv3d"] == ("native" if native["available"] else "reference")


def test_info_for_people(tmp_path: Path) -> None:
    result = _run("info", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for word in ("medspark", "torch", "native extension", "commit", "CPU features"):
        assert word in result.stdout
