"""`medspark prepare` as it is typed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medspark.cli.main import main
from medspark.data.store import Store

from .dicom_files import enhanced


@pytest.fixture
def scans(tmp_path: Path, hu: np.ndarray) -> Path:
    places = [(0.0, 0.0, 3.0 * z) for z in range(len(hu))]
    stored = (hu + 1024).astype(np.uint16)
    folder = tmp_path / "scans"
    for name, patient in (("a", "MRN4711"), ("b", "MRN4712")):
        enhanced(folder / f"DOE_JANE/{name}.dcm", np.roll(stored, ord(name), 2), places,
                 [(1, -1024)] * len(hu), tags={(0x0010, 0x0020): patient})  # fmt: skip
    (folder / "MRN4711.nii").write_text("x")
    return folder


def prepared(scans: Path, run: Path, *settings: str) -> int:
    store = scans.parent / "store"
    fixed = [f"source={scans}", f"store={store}", f"hydra.run.dir={run}", "progress=false"]
    return main(["prepare", *fixed, *settings])


def test_no_person_is_written_down(
    scans: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither the run's folder nor the store nor the terminal holds an id or a name."""
    run = tmp_path / "run"
    assert prepared(scans, run, "exclude_patients=[MRN4712]", "exclude_files=[*.nii]") == 0
    said = "".join(capfd.readouterr())
    assert "1 volumes of 1 patients, 0 refused, 2 left out (1 patients by name)" in said
    files = [p for folder in (run, tmp_path / "store") for p in folder.rglob("*") if p.is_file()]
    assert {"config.yaml", "manifest.csv"} <= {p.name for p in files}
    for path in files:
        text = path.read_bytes()
        assert not [w for w in (b"MRN471", b"DOE", b"JANE") if w in text], path.name
    assert "DOE" not in said and "MRN" not in said
    assert "1 patients, not written down" in (run / "config.yaml").read_text()


def test_settings_reach_the_reader(scans: Path, tmp_path: Path) -> None:
    settings = ["spacing=null", "body_margin=5", "max_gib=1e-6", "workers=2", "timeout=100"]
    assert prepared(scans, tmp_path / "run", *settings) == 0
    rows = Store(tmp_path / "store").all_records
    assert [r.status for r in rows] == ["quarantined"] * 3
    assert sum("max_gib" in r.reason for r in rows) == 2
    assert prepared(scans, tmp_path / "run", "spacing=null", "max_gib=0") == 1
