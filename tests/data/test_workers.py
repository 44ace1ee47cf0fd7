from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medspark.data.workers import Failure, run_isolated

ROOT = Path(__file__).resolve().parents[2]


def script(tmp_path: Path, body: str) -> subprocess.CompletedProcess[str]:
    """Run `run_isolated` in a process of its own: the work must be in an importable module."""
    (tmp_path / "job.py").write_text(
        "import os, sys, time\n"
        "def work(job):\n"
        "    if job == 'die': os.kill(os.getpid(), 9)\n"
        "    if job == 'quit': os._exit(3)\n"
        "    if job == 'hang': time.sleep(1000)\n"
        "    if job == 'greedy': return len(bytearray(3 << 30))\n"
        "    if job == 'raise': raise ValueError('no')\n"
        "    if job == 'pid': print(os.getpid(), flush=True); time.sleep(1000)\n"
        "    time.sleep(0.02 * (job % 3))\n"
        "    return job * job\n"
    )
    (tmp_path / "main.py").write_text(
        "import sys\nfrom medspark.data.workers import run_isolated\nimport job\n"
        f"if __name__ == '__main__':\n    {body}\n"
    )
    return subprocess.run(
        [sys.executable, "main.py"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


def test_order_and_failures(tmp_path: Path) -> None:
    jobs = [0, 1, "die", 2, "hang", 3, "quit", "greedy", 4, "raise", 5]
    options = "workers=2, timeout=4, memory=2 << 30"
    done = script(tmp_path, f"print(*run_isolated(job.work, {jobs}, {options}), sep='\\n')")
    assert done.stdout.splitlines() == [
        "0",
        "1",
        str(Failure("the reader crashed or was killed (signal 9)")),
        "4",
        str(Failure("gave up after 4 s")),
        "9",
        str(Failure("the reader crashed or was killed (exit status 3)")),
        str(Failure("out of memory")),
        "16",
        str(Failure("ValueError: no")),
        "25",
    ]


def test_no_jobs() -> None:
    assert list(run_isolated(len, [], workers=3)) == []


def test_stops_where_the_caller_stops() -> None:
    results = run_isolated(abs, list(range(-50, 0)), workers=2)
    assert next(results) == 50
    results.close()  # type: ignore[attr-defined]


@pytest.mark.skipif(not hasattr(os, "kill"), reason="needs signals")
def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    """Also in the middle of a job: no worker writes on after a run was killed."""
    script(tmp_path, "pass")
    code = "import job; from medspark.data.workers import run_isolated as r; list(r(job.work, ['pid']))"
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
    )  # fmt: skip
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    os.kill(worker, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":
                return
            os.kill(worker, 0)
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.05)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker outlived its parent")
