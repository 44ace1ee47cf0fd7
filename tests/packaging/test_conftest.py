"""The rules of `tests/conftest.py`: what is promised must run, and real-data tests are counted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import pytest

def test_reads(real_data):
    assert real_data.is_dir()

@pytest.mark.skip(reason="by hand")
def test_skipped(real_data):
    pass

@pytest.mark.gpu
def test_gpu():
    pass
"""


def _pytest(folder: Path, **environment: str) -> str:
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "test_it.py").write_text(TESTS)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: GPU\n")
    names = ("MEDSPARK_DATA", "MEDSPARK_REQUIRE_DATA", "MEDSPARK_REQUIRE_GPU")
    kept = {key: value for key, value in os.environ.items() if key not in names}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    variables = {**kept, "PYTHONPATH": str(ROOT), **environment}
    run = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    return run.stdout


def test_real_data_present(tmp_path: Path) -> None:
    assert "real-data tests: 1 ran, 1 skipped" in _pytest(tmp_path, MEDSPARK_DATA=str(tmp_path))


def test_real_data_absent(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    output = _pytest(tmp_path, MEDSPARK_DATA=missing)
    assert "real-data tests: 0 ran, 2 skipped" in output
    assert "error" not in output
    output = _pytest(tmp_path, MEDSPARK_DATA=missing, MEDSPARK_REQUIRE_DATA="1")
    assert "real-data tests: 0 ran, 1 skipped" in output
    assert "1 error" in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, so nothing is missing")
def test_gpu_required(tmp_path: Path) -> None:
    data = str(tmp_path)
    assert "error" not in _pytest(tmp_path, MEDSPARK_DATA=data)
    assert "1 error" in _pytest(tmp_path, MEDSPARK_DATA=data, MEDSPARK_REQUIRE_GPU="1")
