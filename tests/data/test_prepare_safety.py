"""`prepare` when it is killed, when a reader crashes, and what it gives away about people."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medspark.data import ingest
from medspark.data.ingest import prepare
from medspark.data.store import Store, hash_text

from .dicom_files import enhanced
from .test_ingest import ROOT, run
from .test_ingest import source as source

Writer = Callable[..., Path]
SeriesWriter = Callable[..., list[Path]]


@pytest.fixture
def many(tmp_path: Path, write_image: Writer, write_series: SeriesWriter) -> Path:
    """20 sources: volumes of noise, a copy, two series, a broken file, a mask."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "many"
    for i in range(14):
        noise = rng.integers(-1000, 1000, (40, 80, 80)).astype(np.int16)
        write_image(folder / f"{i:02d}.nrrd", noise, compress=False)
    shutil.copy(folder / "03.nrrd", folder / "09-copy.nrrd")
    for uid in ("1.5", "1.6"):
        hu = rng.integers(-1000, 1000, (6, 20, 24)).astype(np.int16)
        write_series(folder / f"series{uid}", hu, uid=uid)
    write_image(folder / "mask.mha", (noise > 0).astype(np.uint8))
    (folder / "05-broken.nii.gz").write_bytes(b"\x1f\x8b nonsense")
    return folder


def contents(store: Path) -> dict[str, bytes]:
    """Every file of a store; arrays by their voxels."""
    found = {}
    for path in sorted(p for p in store.rglob("*") if p.is_file() and p.name != ".lock"):
        name = path.relative_to(store).as_posix()
        whole = path.suffix == ".b2nd"
        found[name] = Store(store).read(path.stem).tobytes() if whole else path.read_bytes()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_again_and_again(many: Path, tmp_path: Path, workers: int) -> None:
    """SIGKILL at random moments: every row has its array, and the end is as if nothing had been."""
    prepare(many, tmp_path / "calm", spacing=(2.0, 2.0, 2.0), progress=False)
    calm = contents(tmp_path / "calm")
    store = tmp_path / "store"
    arguments = f"{str(many)!r}, {str(store)!r}, spacing=(2.0, 2.0, 2.0), workers={workers}"
    code = f"from medspark.data.ingest import prepare; prepare({arguments}, progress=False)"
    rng = np.random.default_rng(workers)
    seen = set()
    for attempt in range(8):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
        # Killed at the start, and while arrays are written, which workers begin later.
        sign = "volumes/.writing-*.b2nd" if attempt % 2 else ".lock"
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if any(store.glob(sign)):
                break
            time.sleep(0.001)
        time.sleep(float(rng.uniform(0, 0.4 if attempt % 2 else 1.0)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        known = Store.create(store)
        for record in known.records:
            expected = calm[f"volumes/{record.id}.b2nd"]
            assert known.read(record.id).tobytes() == expected
        seen.add(len(known.all_records))
    assert len(seen) > 1  # some kills came in the middle
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert contents(store) == calm
    assert prepare(many, store, spacing=(2.0, 2.0, 2.0), progress=False).reused == len(
        Store(store).all_records
    )


def test_rows_go_before_arrays(
    source: Path,
    tmp_path: Path,
    write_image: Writer,
    hu: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed right after the array of a changed file was replaced: no row speaks of the old one."""
    run(source, tmp_path / "store")
    write_image(source / "anna/one.nii.gz", hu[::-1, ::-1])

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ingest, "_run", killed)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "store")
    store = Store(tmp_path / "store")
    assert "anna/one.nii.gz" not in {r.source for r in store.all_records}
    stored = {p.stem for p in (store.path / "volumes").iterdir()}
    assert stored == {r.id for r in store.records}


def test_one_run_at_a_time(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "store")
    with (
        Store(tmp_path / "store").lock(),
        pytest.raises(BlockingIOError, match="another run is writing"),
    ):
        run(source, tmp_path / "store")
    assert run(source, tmp_path / "store").reused == 6


PHI = ("MRN4711", "DOE", "JANE", "doe", "jane")


def test_no_person_in_paths_manifest_or_terminal(
    tmp_path: Path, hu: np.ndarray, capfd: pytest.CaptureFixture[str]
) -> None:
    """Folder names of an archive are often the patient's: they are hidden by what the tags say."""
    source = tmp_path / "source"
    stored = (hu[:3] + 1024).astype(np.uint16)
    places = [(0.0, 0.0, 3.0 * z) for z in range(3)]
    for name in ("Doe_Jane_19610203/ct.dcm", "MRN4711/again.dcm", "x/broken.dcm"):
        enhanced(source / name, stored, places, [(1, -1024)] * 3)
    path = source / "x/broken.dcm"
    path.write_bytes(path.read_bytes()[:-2000])
    table = tmp_path / "private/key.csv"
    table.parent.mkdir()
    report = prepare(source, tmp_path / "store", key_table=table, progress=True)
    said = capfd.readouterr()
    everything = (tmp_path / "store/manifest.csv").read_text() + said.out + said.err + repr(report)
    assert not [word for word in (*PHI, "19610203") if word in everything]
    assert sorted(r.status for r in report.rows) == ["duplicate", "ok", "quarantined"]
    clear = table.read_text()
    assert "Doe_Jane_19610203/ct.dcm" in clear and "MRN4711" in clear
    assert all(row.id in clear for row in report.rows)
    assert table.stat().st_mode & 0o077 == 0
    with pytest.raises(ValueError, match="must not travel"):
        prepare(source, tmp_path / "store", key_table=tmp_path / "store/key.csv", progress=False)


def test_salt(source: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("0123456789abcdef\n")
    rows = {r.source: r for r in run(source, tmp_path / "a", salt_file=key).rows}
    plain = {r.source: r for r in run(source, tmp_path / "b").rows}
    assert rows["ben"].patient != plain["ben"].patient
    assert rows["anna/one.nii.gz"].patient == rows["anna/two.nrrd"].patient
    text = (tmp_path / "a/manifest.csv").read_text()
    for word in ("patient:P-17", "patient:Q-23"):
        assert hash_text(word, 12) not in text
    assert "0123456789abcdef" not in text
    hidden = run(source, tmp_path / "c", salt_file=key, hide_paths=True).rows
    assert not any("anna" in r.source or "ben" in r.source for r in hidden)
    assert len({r.source for r in hidden}) == len(hidden)
    assert any(r.source.endswith(".nii.gz") for r in hidden)


def test_reader_that_crashes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With workers, a file on which the process dies is quarantined and the rest goes on."""
    (source / "anna/two.nrrd").rename(source / "anna/kill-me.nrrd")
    crash = tmp_path / "sitecustomize.py"
    crash.write_text(
        "import os\n"
        "from medspark.data import io\n"
        "real = io.check_file\n"
        "def check_file(path, *rest):\n"
        "    if path.name == 'kill-me.nrrd': os.kill(os.getpid(), 11)\n"
        "    return real(path, *rest)\n"
        "io.check_file = check_file\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    rows = {r.source: r for r in run(source, tmp_path / "store", workers=2).rows}
    assert rows["anna/kill-me.nrrd"].status == "quarantined"
    assert rows["anna/kill-me.nrrd"].reason == "the reader crashed or was killed (signal 11)"
    assert [r.source for r in rows.values() if r.status == "ok"] == ["anna/one.nii.gz", "ben"]
