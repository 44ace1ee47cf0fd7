"""A small share of the fuzz test; at length: `python tests/data/fuzz_headers.py --cases 100000`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_mutated_headers() -> None:
    """Volume or clear refusal; no crash, hang or allocation beyond 2 GiB of address space."""
    script = Path(__file__).with_name("fuzz_headers.py")
    command = [sys.executable, str(script), "--cases", "3000", "--workers", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, cwd=script.parents[2]
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "3000 cases, 0 wrong" in done.stdout
    read = dict(re.findall(r"(\.\w+): read: (\d+)", done.stdout))
    # The mutations are not so wild that nothing comes through to the readers.
    assert set(read) == {".nii", ".gz", ".nrrd", ".mha", ".mhd", ".dcm"}
    assert all(int(count) >= 20 for count in read.values()), read
