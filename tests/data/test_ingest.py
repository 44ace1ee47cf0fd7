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
import SimpleITK as sitk

from medspark.data import ingest
from medspark.data.ingest import prepare, resample
from medspark.data.io import Volume, read_volume
from medspark.data.store import Store, hash_text

Writer = Callable[..., Path]
SeriesWriter = Callable[..., list[Path]]


@pytest.fixture
def source(tmp_path: Path, write_image: Writer, write_series: SeriesWriter, hu: np.ndarray) -> Path:
    """Two files of one patient, a series of another, a copy, a mask, a broken and an odd file."""
    folder = tmp_path / "source"
    write_image(folder / "anna/one.nii.gz", hu)
    write_image(folder / "anna/two.nrrd", hu[:, ::-1])
    write_series(folder / "ben", hu[::-1], patient="Ben")
    write_image(folder / "copy.mha", hu)
    write_image(folder / "labels/one.mha", (hu % 7 == 0).astype(np.uint8))
    (folder / "broken.nii.gz").write_bytes(b"\x1f\x8b nonsense")
    table = "file,patient\nanna,Anna\ncopy.mha,Anna\n"
    (folder / "patients.csv").write_text(table)
    return folder


def run(source: Path, store: Path, **options: object) -> ingest.PrepareReport:
    return prepare(
        source, store, **{"patients_csv": source / "patients.csv", "progress": False} | options
    )  # type: ignore[arg-type]


def test_everything_ends_as_a_row(source: Path, tmp_path: Path, hu: np.ndarray) -> None:
    report = run(source, tmp_path / "store")
    status = {r.source: r.status for r in report.rows}
    assert status == {
        "anna/one.nii.gz": "ok",
        "anna/two.nrrd": "ok",
        "ben": "ok",
        "broken.nii.gz": "quarantined",
        "copy.mha": "duplicate",
        "labels/one.mha": "quarantined",
    }
    assert (report.ok, report.quarantined, report.skipped, report.reused) == (3, 2, 1, 0)
    store = Store(tmp_path / "store")
    assert len(store) == 3
    rows = {r.source: r for r in store.all_records}
    np.testing.assert_array_equal(store.read(rows["ben"].id), hu[::-1])
    np.testing.assert_array_equal(store.read(rows["anna/two.nrrd"].id), hu[:, ::-1])
    one = rows["anna/one.nii.gz"]
    assert (one.size, one.spacing, one.orientation) == ((12, 20, 24), (3.0, 2.0, 1.0), "LPS")
    assert (one.hu_min, one.hu_max) == (hu.min(), hu.max())
    assert rows["copy.mha"].reason == "same voxels as anna/one.nii.gz"
    assert "label map" in rows["labels/one.mha"].reason
    assert one.patient == rows["anna/two.nrrd"].patient != rows["ben"].patient
    stored = {p.stem for p in (store.path / "volumes").iterdir()}
    assert stored == {r.id for r in store.records}


def test_no_name_in_clear(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "store")
    text = (tmp_path / "store/manifest.csv").read_text()
    for secret in ("Anna", "Ben", "1.2.3.4", str(tmp_path)):
        assert secret not in text
    assert hash_text("patient:Ben", 12) in text


def test_second_run_reads_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(source, tmp_path / "store")
    manifest = (tmp_path / "store/manifest.csv").read_bytes()
    monkeypatch.setattr(ingest, "read_volume", None)
    second = run(source, tmp_path / "store")
    assert second.rows == first.rows
    assert second.reused == 6
    assert (tmp_path / "store/manifest.csv").read_bytes() == manifest


def test_changed_file_is_redone(
    source: Path, tmp_path: Path, write_image: Writer, hu: np.ndarray
) -> None:
    run(source, tmp_path / "store")
    write_image(source / "anna/one.nii.gz", hu[::-1, ::-1])
    report = run(source, tmp_path / "store")
    rows = {r.source: r for r in report.rows}
    store = Store(tmp_path / "store")
    np.testing.assert_array_equal(store.read(rows["anna/one.nii.gz"].id), hu[::-1, ::-1])
    # Its copy is no copy any more.
    np.testing.assert_array_equal(store.read(rows["copy.mha"].id), hu)
    assert report.ok == 4


def test_lost_volume_is_made_again(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "store")
    store = Store(tmp_path / "store")
    store.volume_path(store.records[0].id).unlink()
    assert run(source, tmp_path / "store").ok == 3
    store.read(store.records[0].id)


def test_exclusions_are_counted(source: Path, tmp_path: Path, hu: np.ndarray) -> None:
    run(source, tmp_path / "store")
    options = {"exclude_patients": ["Ben"], "exclude_files": ["labels/*", "anna/o*"]}
    report = run(source, tmp_path / "store", **options)
    rows = {r.source: r for r in report.rows}
    assert rows["ben"].reason == "patient excluded"
    assert rows["labels/one.mha"].reason == "file excluded by 'labels/*'"
    # Its twin is out now, so the copy comes in; what was stored of excluded ones is gone.
    assert rows["copy.mha"].status == "ok"
    assert (report.ok, report.quarantined, report.skipped) == (2, 1, 3)
    stored = {p.stem for p in (tmp_path / "store/volumes").iterdir()}
    assert stored == {rows["copy.mha"].id, rows["anna/two.nrrd"].id}
    assert run(source, tmp_path / "store").ok == 3


def test_patients_without_table(source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "store", patients_csv=None)
    rows = {r.source: r for r in report.rows}
    assert rows["ben"].patient == hash_text("patient:Ben", 12)
    assert rows["anna/one.nii.gz"].patient != rows["anna/two.nrrd"].patient
    assert "no patient id" in rows["anna/one.nii.gz"].warnings[-1]


def test_workers_give_the_same(source: Path, tmp_path: Path) -> None:
    one, two = run(source, tmp_path / "a"), run(source, tmp_path / "b", workers=2)
    assert one == two
    for record in Store(tmp_path / "a").records:
        np.testing.assert_array_equal(
            Store(tmp_path / "a").read(record.id), Store(tmp_path / "b").read(record.id)
        )


def test_killed_and_resumed(tmp_path: Path, write_image: Writer) -> None:
    """SIGKILL in the middle: what is in the store is whole, and a second run completes it."""
    rng = np.random.default_rng(0)
    source = tmp_path / "source"
    for i in range(12):
        noise = rng.integers(-1000, 1000, (48, 96, 96)).astype(np.int16)
        write_image(source / f"{i:02d}.nrrd", noise, compress=False)
    folders = f"{str(source)!r}, {str(tmp_path / 'store')!r}"
    code = f"from medspark.data.ingest import prepare; prepare({folders}, progress=False)"
    root = Path(__file__).resolve().parents[2]
    process = subprocess.Popen([sys.executable, "-c", code], cwd=root)
    volumes = tmp_path / "store/volumes"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list(volumes.glob("[0-9a-f]*.b2nd"))) < 3:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = sorted(volumes.glob("[0-9a-f]*.b2nd"))
    assert 3 <= len(done) < 12
    (volumes / ".writing-0123.b2nd").write_bytes(b"half")
    known = Store(tmp_path / "store")
    for record in known.records:
        assert known.read(record.id).shape == record.size
    assert run_plain(source, tmp_path / "store").ok == 12
    store = Store(tmp_path / "store")
    for record in store.records:
        np.testing.assert_array_equal(store.read(record.id), read_volume(source / record.source).hu)
    assert not list((tmp_path / "store").rglob(".writing*"))


def run_plain(source: Path, store: Path) -> ingest.PrepareReport:
    return prepare(source, store, progress=False)


def volume(hu: np.ndarray, spacing: tuple[float, float, float]) -> Volume:
    return Volume(hu, spacing, (0.0, 0.0, 0.0), np.eye(3), "CT", None, None, "LPS", "int16", [])


def test_resample_ramp() -> None:
    """Linear interpolation of a linear ramp is exact; outside the centres the edge holds."""
    ramp = np.broadcast_to(np.arange(0, 1000, 100, dtype=np.int16)[:, None, None], (10, 4, 4))
    out = resample(volume(np.ascontiguousarray(ramp), (2.0, 1.0, 1.0)), (1.0, 1.0, 1.0))
    assert out.hu.shape == (20, 4, 4)
    assert out.spacing == (1.0, 1.0, 1.0)
    expected = np.clip((np.arange(20) * 0.5 - 0.25) * 100, 0, 900)
    np.testing.assert_allclose(out.hu[:, 1, 2], expected, atol=0.51)
    assert out.origin == (0.0, 0.0, -0.5)


def test_resample_to_the_same_is_the_same(hu: np.ndarray) -> None:
    out = resample(volume(hu, (3.0, 2.0, 1.0)), (3.0, 2.0, 1.0))
    np.testing.assert_array_equal(out.hu, hu)


def test_resample_keeps_the_middle() -> None:
    """A symmetric volume stays symmetric at any spacing, but for the rounding to whole HU."""
    half = np.random.default_rng(0).integers(-900, 900, (6, 5, 4))
    whole = np.concatenate([half, half[::-1]]).astype(np.int16)
    out = resample(volume(whole, (1.7, 1.0, 1.0)), (1.1, 0.9, 1.3)).hu
    np.testing.assert_allclose(out, out[::-1], atol=1)


@pytest.mark.parametrize("new", [0.3, 0.7, 1.0, 1.9, 2.6, 5.0, 40.0])
def test_resampling_invents_no_values(new: float) -> None:
    """Whatever way the size is rounded, no sample falls outside and takes a filling value."""
    solid = np.full((3, 5, 7), 500, np.int16)
    out = resample(volume(solid, (2.5, 1.0, 1.3)), (new, new, new))
    assert (out.hu == 500).all()


def test_prepare_resamples(source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "store", spacing=(1.5, 1.0, 2.0))
    assert report.ok == 3
    store = Store(tmp_path / "store")
    assert store.spacing == (1.5, 1.0, 2.0)
    assert {r.size for r in store.records} == {(24, 40, 12)}
    again = run(source, tmp_path / "store")
    assert {r.size for r in again.rows if r.status == "ok"} == {(12, 20, 24)}


def test_progress_bar(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(source, tmp_path / "store", progress=True)
    captured = capsys.readouterr()
    assert "prepare" in captured.out
    assert captured.err == ""


def test_errors(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="spacing"):
        run(source, tmp_path / "s", spacing=(1.0, 0.0, 1.0))
    with pytest.raises(FileNotFoundError, match="no table of patients"):
        run(source, tmp_path / "s", patients_csv=source / "nobody.csv")
    with pytest.raises(FileNotFoundError, match="no folder"):
        run_plain(tmp_path / "nothing", tmp_path / "s")
    (source / "patients.csv").write_text("name,who\n")
    with pytest.raises(ValueError, match="columns file and patient"):
        run(source, tmp_path / "s")


def test_awkward_folder(real_data: Path, tmp_path: Path) -> None:
    """Nothing crashes, every bad series has a reason, and what is stored can be read."""
    report = prepare(real_data / "awkward", tmp_path / "store", progress=False)
    rows = {r.source: r for r in report.rows}
    assert all(r.reason for r in report.rows if r.status != "ok")
    assert rows["head_gantry_tilt_irregular"].status == "quarantined"
    assert rows["ct_folder_with_rtstruct/RS.dcm"].status == "ignored"
    mixed = [r for r in report.rows if r.source.startswith("phantom_mixed_series")]
    assert sorted(r.size[0] for r in mixed if r.status == "ok") == [4, 6]
    assert all("gantry tilt" in r.warnings[0] for r in mixed if r.status == "ok")
    reasons = " ".join(r.reason for r in mixed)
    assert "RGB" in reasons
    assert "localizer" in reasons
    times = [r for r in report.rows if r.source.startswith("dicom_4d_tiny")]
    assert {r.status for r in times} == {"quarantined"}
    tiny = [r for r in report.rows if r.source.startswith("dicomdir_mixed_modalities")]
    assert [(r.source[26:], r.size) for r in tiny if r.status == "ok"] == [
        ("98892001/CT5N", (5, 16, 16))
    ]
    store = Store(tmp_path / "store")
    assert report.ok == len(store) == 15
    for record in store.records:
        assert store.read(record.id, (0, 0, 0), (2, 4, 4)).shape == (2, 4, 4)


def test_corpus_copies_are_found(real_data: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("chest_cip_ct64.nrrd", "dicom/chest_cip_ct64", "manifest.csv"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (real_data / "ct" / name).is_dir() else shutil.copyfile
        copy(real_data / "ct" / name, source / name)
    report = prepare(source, tmp_path / "store", spacing=(6.0, 6.0, 6.0), progress=False,
                     patients_csv=source / "manifest.csv")  # fmt: skip
    assert [r.status for r in report.rows] == ["ok", "duplicate"]
    assert report.rows[0].patient == report.rows[1].patient == hash_text("patient:cip-1", 12)
    (record,) = Store(tmp_path / "store").records
    image = sitk.ReadImage(str(source / "chest_cip_ct64.nrrd"))
    truth = sitk.GetArrayFromImage(image).mean()
    assert Store(tmp_path / "store").read(record.id).mean() == pytest.approx(truth, abs=10)
    assert os.listdir(tmp_path / "store/volumes") == [f"{record.id}.b2nd"]
