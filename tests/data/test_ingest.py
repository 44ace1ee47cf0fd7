from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from medspark.data import ingest
from medspark.data.body import BODY
from medspark.data.ingest import find_sources, prepare, resample
from medspark.data.io import Volume
from medspark.data.reader import VolumeReader
from medspark.data.store import Store, hash_text

Writer = Callable[..., Path]
SeriesWriter = Callable[..., list[Path]]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def source(tmp_path: Path, write_image: Writer, write_series: SeriesWriter, hu: np.ndarray) -> Path:
    """Two files of one patient, a series of another, a copy, a mask, a broken and an odd file."""
    folder = tmp_path / "source"
    write_image(folder / "anna/one.nii.gz", hu)
    write_image(folder / "anna/two.nrrd", hu[:, ::-1])
    write_series(folder / "ben", hu[::-1], patient="Q-23")
    write_image(folder / "copy.mha", hu)
    write_image(folder / "labels/one.mha", (hu % 7 == 0).astype(np.uint8))
    (folder / "broken.nii.gz").write_bytes(b"\x1f\x8b nonsense")
    table = "file,patient\nanna,P-17\ncopy.mha,P-17\n"
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
    for secret in ("P-17", "Q-23", "1.2.3.4", str(tmp_path)):
        assert secret not in text
    assert hash_text("patient:Q-23", 12) in text


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


def test_a_flipped_bit_is_found(source: Path, tmp_path: Path) -> None:
    """The decompressor takes what it finds; only the checksum tells."""
    run(source, tmp_path / "store")
    store = Store(tmp_path / "store")
    victim = store.records[1]
    path, good = store.volume_path(victim.id), store.read(victim.id)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    assert [store.intact(r) for r in store.records] == [True, False, True]
    assert run(source, tmp_path / "store").reused == 6
    assert not store.intact(victim)
    report = run(source, tmp_path / "store", verify=True)
    # The duplicate of the damaged volume is settled again as well.
    assert report.reused in (4, 5)
    assert all(map(store.intact, store.records))
    np.testing.assert_array_equal(store.read(victim.id), good)


def test_body_tables_come_with_the_arrays(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "store")
    store = Store(tmp_path / "store")
    files = sorted((store.path / "body").iterdir())
    assert [
        f.name[: len(r.id)]
        for f, r in zip(files, sorted(store.records, key=lambda r: r.id), strict=True)
    ] == sorted(r.id for r in store.records)
    for record in store.records:
        hu = store.read(record.id)
        assert VolumeReader(store).table(record).total == int((hu > BODY).sum())
    assert sorted((store.path / "body").iterdir()) == files
    gone = store.records[0]
    (store.path / "body" / f"{'0' * 16}-00000000.npy").touch()
    store.put([], without={gone.id})
    store.sweep()
    assert not any(gone.id in f.name or "0" * 16 in f.name for f in (store.path / "body").iterdir())


def test_exclusions_are_counted(source: Path, tmp_path: Path, hu: np.ndarray) -> None:
    run(source, tmp_path / "store")
    options = {"exclude_patients": ["Q-23"], "exclude_files": ["labels/*", "anna/o*"]}
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
    assert rows["ben"].patient == hash_text("patient:Q-23", 12)
    assert rows["anna/one.nii.gz"].patient != rows["anna/two.nrrd"].patient
    assert "no patient id" in rows["anna/one.nii.gz"].warnings[-1]


def test_workers_give_the_same(source: Path, tmp_path: Path) -> None:
    one, two = run(source, tmp_path / "a"), run(source, tmp_path / "b", workers=2)
    assert one == two
    for record in Store(tmp_path / "a").records:
        np.testing.assert_array_equal(
            Store(tmp_path / "a").read(record.id), Store(tmp_path / "b").read(record.id)
        )


def test_odd_looks_are_quarantined(
    source: Path, tmp_path: Path, write_image: Writer, hu: np.ndarray
) -> None:
    """A row with all numbers, no array; a person may accept it by name."""
    write_image(source / "mr.nii.gz", (hu + 1000).astype(np.int16))
    rows = {r.source: r for r in run(source, tmp_path / "store").rows}
    row = rows["mr.nii.gz"]
    assert row.status == "quarantined"
    assert row.reason.startswith("does not look like HU: no value below 0 (0 to 2000)")
    assert (row.size, row.hu_max, row.spacing) == ((12, 20, 24), 2000, (3.0, 2.0, 1.0))
    assert not Store(tmp_path / "store").volume_path(row.id).exists()
    accepted = run(source, tmp_path / "store", accept_files=["mr.*"])
    (row,) = [r for r in accepted.rows if r.source == "mr.nii.gz"]
    assert (row.status, accepted.reused) == ("ok", 6)
    assert any("does not look like HU" in w for w in row.warnings)


def test_crop_to_body(source: Path, tmp_path: Path, write_image: Writer) -> None:
    body = np.full((30, 40, 50), -1000, np.int16)
    body[5:25, 12:28, 20:30] = np.random.default_rng(0).integers(0, 80, (20, 16, 10))
    shutil.rmtree(source)
    write_image(source / "a.mha", body, spacing=(4.0, 4.0, 4.0))
    report = prepare(source, tmp_path / "store", body_margin=8, progress=False)
    (record,) = report.rows
    assert record.size == (24, 20, 14)
    np.testing.assert_array_equal(
        Store(tmp_path / "store").read(record.id), body[3:27, 10:30, 18:32]
    )


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


def test_corpus_is_sound(real_data: Path, tmp_path: Path) -> None:
    """All real CT is taken but the brain atlas, which has no air; its masks are not."""
    report = prepare(real_data / "ct", tmp_path / "store", spacing=(8.0, 8.0, 8.0), workers=2,
                     exclude_files=["sts/STS_01*", "sts/STS_02*", "sts/STS_03*"], progress=False,
                     patients_csv=real_data / "ct/manifest.csv")  # fmt: skip
    names = {hash_text(s.name): s.name for s in find_sources(real_data / "ct")}
    odd = {names[r.id]: r.reason for r in report.rows if r.status == "quarantined"}
    masks = {name for name in odd if name.startswith("labels/")}
    assert set(odd) - masks == {"head_totalseg_brain_atlas_1mm.nii.gz"}
    assert all("label map" in odd[name] or "constant" in odd[name] for name in masks)
    copies = {r.source: r.reason for r in report.rows if r.status == "duplicate"}
    assert copies == {
        "dicom/chest_cip_ct64": "same voxels as chest_cip_ct64.nrrd",
        "mhd/chest_elastix_lung_small.mhd": "same voxels as chest_elastix_lung_small.mha",
    }
    assert not any("montage" in w or "stitched" in w for r in report.rows for w in r.warnings)
