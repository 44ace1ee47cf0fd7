"""Seeds, devices, real data and what the run says about itself."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
REAL_DATA = ("real_data", True)


def _flag(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (the libraries under test still draw from it)
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU always, and the GPU where there is one: one test body for both."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real CT data ($MEDSPARK_DATA, or shared/data beside the repository)."""
    path = Path(os.environ.get("MEDSPARK_DATA") or ROOT.parent / "shared" / "data")
    if path.is_dir():
        return path
    message = f"no real CT data in {path}; point MEDSPARK_DATA at it"
    if _flag("MEDSPARK_REQUIRE_DATA"):
        pytest.fail(f"{message} (MEDSPARK_REQUIRE_DATA is set)")
    pytest.skip(message)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests where there is no GPU, or fail them where one was promised."""
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if _flag("MEDSPARK_REQUIRE_GPU"):
        pytest.fail("MEDSPARK_REQUIRE_GPU is set, but torch sees no CUDA device")
    pytest.skip("torch sees no CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the reports of tests on real data, so that the summary can count them."""
    for item in items:
        if "real_data" in getattr(item, "fixturenames", ()):
            item.user_properties.append(REAL_DATA)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests saw real data: a run must not look complete without them."""
    reports = [
        report
        for listed in terminalreporter.stats.values()
        for report in listed
        # Deselected items are listed as well. xdist hands the properties over as lists.
        if isinstance(report, pytest.TestReport)
        and REAL_DATA in map(tuple, getattr(report, "user_properties", ()))
    ]
    skipped = {report.nodeid for report in reports if report.outcome == "skipped"}
    ran = {report.nodeid for report in reports if report.when == "call"} - skipped
    terminalreporter.write_line(f"real-data tests: {len(ran)} ran, {len(skipped)} skipped")


def pytest_report_header() -> str:
    """Which extension is tested: a stale build shows itself here."""
    from medspark.sparse._ext import extension_status, load_extension

    try:
        module = load_extension()
    except ImportError as error:
        return f"medspark._C: cannot be loaded: {error}"
    if module is None:
        return f"medspark._C: {extension_status()}"
    return f"medspark._C: {module.__file__}, commit {module.build_info()['commit']}"
