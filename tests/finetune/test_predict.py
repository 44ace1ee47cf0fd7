"""Inference on folders: the numbers of fine-tuning, the right places, and no file that stops it."""

import csv
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from medspark.data.ingest import prepare
from medspark.data.phantom import write_phantom_task, write_phantoms
from medspark.data.pseudonyms import Pseudonyms
from medspark.data.store import Store
from medspark.data.tasks import load_task
from medspark.data.windows import Intensity
from medspark.finetune.classifier import load_classifier, make_plan, save_classifier
from medspark.finetune.module import ClassifierModule
from medspark.finetune.predict import predict
from medspark.finetune.run import finetune
from medspark.finetune.scans import Reading, list_scans, read_scans, window_starts
from medspark.models.encoders import encoder_from_spec

SPEC = {"name": "resnet10", "kwargs": {"block_inplanes": [4, 4, 8, 8], "conv1_t_size": 3}}
INTENSITY = Intensity.named("wide")
READING = Reading(patch_mm=(48.0, 48.0, 48.0), size=(16, 16, 16))
QUIET = {"workers": 0, "progress": False, "accelerator": "cpu"}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def classifier_file(folder: Path, **options) -> Path:
    torch.manual_seed(5)
    module = ClassifierModule(encoder_from_spec(SPEC), 2)
    with torch.no_grad():
        module.head.weight *= 4  # so that windows differ
    edges = [48.0, 48.0, 48.0]
    measures = {"patch_mm": edges, "patch_mm_low": edges, "patch_mm_high": edges}
    defaults = {
        "encoder": SPEC,
        "mode": "full",
        "class_names": ["no", "yes"],
        "intensity": INTENSITY.as_dict(),
        "grey": False,
        "dims": 3,
        "geometry": {"size": [16, 16, 16], "spacing": [3.0, 3.0, 3.0], **measures},
    }
    return save_classifier(folder / "best.ckpt", module, make_plan(**(defaults | options)))


def write(path: Path, hu: np.ndarray, spacing=(3.0, 3.0, 3.0), origin=(0.0, 0.0, 0.0), axes=None):
    """A file of `hu` [z, y, x]; spacing (z, y, x), origin and axes as SimpleITK has them."""
    image = sitk.GetImageFromArray(hu.astype(np.int16))
    image.SetSpacing(spacing[::-1])
    image.SetOrigin(origin)
    image.SetDirection(axes or (1, 0, 0, 0, 1, 0, 0, 0, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return image


def scan_like(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Air around a body with some structure."""
    rng = np.random.default_rng(seed)
    hu = np.full(shape, -1000)
    inner = tuple(slice(2, n - 2) for n in shape)
    hu[inner] = rng.integers(-100, 300, hu[inner].shape)
    return hu


def test_patches_get_the_predictions_of_finetuning(tmp_path):
    folder = write_phantom_task(
        tmp_path / "task", n_patients=4, patches_per_patient=4, size=20, seed=7, spacing=(2.0,) * 3
    )
    found = finetune(
        load_task(folder),
        None,
        out_dir=tmp_path / "run",
        intensity=INTENSITY,
        scratch=SPEC,
        mode="linear",
        size=(16, 16, 16),
        epochs=2,
        draws=10,
        pictures=False,
        progress=False,
        accelerator="cpu",
    )
    plan = load_classifier(found.checkpoint).plan
    assert (plan["patch_mm"], plan["spacing"]) == ([40.0] * 3, [2.5] * 3)
    report = predict(
        found.checkpoint, folder / "patches", tmp_path / "p.csv", patches=True, **QUIET
    )
    rows = {f"patches/{r['source']}": r for r in rows_of(report.table)}
    expected = {r["id"]: float(r["prob_lesion"]) for r in rows_of(found.predictions)}
    assert rows.keys() == expected.keys()
    for name, row in rows.items():
        assert (row["status"], row["method"], row["windows"]) == ("ok", "whole", "1")
        assert float(row["mean_lesion"]) == pytest.approx(expected[name], abs=2e-5)
        assert row["mean_lesion"] == row["max_lesion"]


def test_large_scan_is_cut_into_windows_with_their_places(tmp_path):
    checkpoint = classifier_file(tmp_path)
    hu = scan_like((24, 40, 16))
    image = write(tmp_path / "in" / "a.mha", hu, origin=(-11.0, 7.0, 100.0))
    report = predict(checkpoint, tmp_path / "in", tmp_path / "p.csv", **QUIET)
    rows = rows_of(report.windows)
    assert report.windows.name == "p_windows.csv"
    starts = [(z, y, 0) for z in (0, 8) for y in (0, 8, 16, 24)]
    assert len(rows) == len(starts)
    classifier = load_classifier(checkpoint)
    for (z, y, x), row in zip(starts, rows, strict=True):
        crop = torch.from_numpy(hu[z : z + 16, y : y + 16, x : x + 16].astype(np.int16))
        p = classifier.probabilities(INTENSITY.normalise(crop)[None, None])[0]
        assert float(row["prob_yes"]) == pytest.approx(p[1].item(), abs=2e-5)
        centre = (z + 7.5, y + 7.5, x + 7.5)
        assert [float(row[f"voxel_{a}"]) for a in "zyx"] == pytest.approx(centre)
        place = image.TransformContinuousIndexToPhysicalPoint(centre[::-1])
        assert [float(row[f"mm_{a}"]) for a in "xyz"] == pytest.approx(place, abs=0.06)
    scores = [float(row["prob_yes"]) for row in rows]
    assert max(scores) - min(scores) > 0.01
    scan = rows_of(report.table)[0]
    assert (scan["method"], scan["windows"]) == ("windows", "8")
    assert float(scan["mean_yes"]) == pytest.approx(np.mean(scores), abs=1e-4)
    assert float(scan["max_yes"]) == pytest.approx(max(scores), abs=1e-4)
    assert scan["predicted"] == ("no", "yes")[int(np.mean(scores) > 0.5)]


def test_places_hold_for_turned_axes_and_other_voxels(tmp_path):
    hu = scan_like((30, 64, 80))
    hu[20:24, 10:20, 60:72] = 3000
    axes = (-1, 0, 0, 0, -1, 0, 0, 0, 1)
    image = write(tmp_path / "a.mha", hu, (5.0, 1.5, 2.0), (50.0, -30.0, 10.0), axes)
    mark = image.TransformContinuousIndexToPhysicalPoint((65.5, 14.5, 21.5))
    listed = list_scans(tmp_path, Pseudonyms())
    for scan in read_scans(listed, READING, workers=0):
        assert scan.status == "ok" and not scan.whole
        windows = [
            scan.voxels()[tuple(slice(a, a + 16) for a in start)].astype(float).mean()
            for start in scan.starts
        ]
        point = scan.points[int(np.argmax(windows))]
        assert np.abs(point - mark).max() <= 24.0
        # The brightest voxel of the scan at 3 mm lies where the mark is.
        spots = np.argwhere(scan.voxels() > 2000).mean(axis=0)
        middle = np.array(scan.starts[0]) + 7.5
        at = scan.points[0] + (spots - middle)[::-1] * 3.0
        assert at == pytest.approx(mark, abs=1.0)
        step = np.array(scan.starts) - scan.starts[0]
        moved = scan.points - scan.points[0]
        assert moved == pytest.approx(3.0 * step[:, ::-1])
        # In voxels of the scan turned to LPS: 80 - 1 - 65.5 and 64 - 1 - 14.5.
        turned = scan.centres[0] + (spots - middle) * 3.0 / np.array([5.0, 1.5, 2.0])
        assert turned == pytest.approx([21.5, 48.5, 13.5], abs=0.7)


def test_windows_cover_the_body_only():
    hu = np.full((32, 32, 64), -1000, np.int16)
    hu[:, :, :16] = 0
    size = (16, 16, 16)
    every = {(z, y, x) for z in (0, 8, 16) for y in (0, 8, 16) for x in (0, 8)}
    assert set(window_starts(hu, size, 0.5, 0.1)) == every
    assert {x for _, _, x in window_starts(hu, size, 0.5, 0.6)} == {0}
    assert {x for _, _, x in window_starts(hu, size, 0.5, 0.0)} == {0, 8, 16, 24, 32, 40, 48}
    assert window_starts(hu[:, :, 20:], size, 0.5, 0.1) == []


def test_last_window_ends_with_the_scan():
    starts = window_starts(np.zeros((21, 16, 16), np.int16), (16, 16, 16), 0.5, 0.1)
    assert starts == [(0, 0, 0), (5, 0, 0)]
    starts = window_starts(np.zeros((48, 16, 16), np.int16), (16, 16, 16), 0.0, 0.1)
    assert [z for z, _, _ in starts] == [0, 16, 32]


def test_thin_scan_is_filled_up_with_air(tmp_path):
    hu = scan_like((6, 40, 40))
    write(tmp_path / "in" / "a.nii.gz", hu)
    listed = list_scans(tmp_path / "in", Pseudonyms())
    for scan in read_scans(listed, READING, workers=0):
        assert "filled up with air" in scan.warnings[-1]
        voxels = scan.voxels()
        assert voxels.shape == (16, 40, 40)
        assert (voxels[:5] == -1024).all() and (voxels[11:] == -1024).all()
        assert scan.centres[0][0] == pytest.approx(2.5)


def test_bad_files_become_rows(tmp_path):
    folder = tmp_path / "in"
    write(folder / "good.nrrd", scan_like((24, 24, 24)))
    text = (folder / "good.nrrd").read_bytes()
    (folder / "cut.nrrd").write_bytes(text[: len(text) // 2])
    (folder / "empty.nii").touch()
    (folder / "wrong.nii.gz").write_bytes(b"not a volume at all")
    write(folder / "air.mha", np.full((24, 24, 24), -1000))
    write(folder / "mask.mha", scan_like((24, 24, 24)) > 0)
    (folder / "notes.txt").write_text("nothing to read")
    # One process apart that reads, as by default.
    report = predict(
        classifier_file(tmp_path), folder, tmp_path / "p.csv", **(QUIET | {"workers": 1})
    )
    rows = {r["source"]: r for r in rows_of(report.table)}
    assert {n: r["status"] for n, r in rows.items()} == {
        "good.nrrd": "ok",
        "cut.nrrd": "refused",
        "empty.nii": "refused",
        "wrong.nii.gz": "refused",
        "air.mha": "refused",
        "mask.mha": "refused",
    }
    assert all(r["reason"] for r in rows.values() if r["status"] == "refused")
    assert "constant" in rows["air.mha"]["reason"]
    assert rows["cut.nrrd"]["mean_yes"] == ""
    assert 0 < float(rows["good.nrrd"]["mean_yes"]) < 1
    assert {r["source"] for r in rows_of(report.windows)} == {"good.nrrd"}
    assert not list(tmp_path.glob(".*"))


def test_names_are_those_of_the_store(tmp_path):
    write_phantoms(tmp_path / "in", 4, seed=0, size=(48, 48, 48), spacing=(3.0, 3.0, 3.0))
    salt = tmp_path / "salt"
    salt.write_text("0123456789abcdef")
    prepare(tmp_path / "in", tmp_path / "store", salt_file=salt, progress=False)
    report = predict(
        classifier_file(tmp_path), tmp_path / "in", tmp_path / "p.csv", salt_file=salt, **QUIET
    )
    stored = {(r.id, r.source, r.patient) for r in Store(tmp_path / "store").records}
    rows = rows_of(report.table)
    assert {(r["id"], r["source"], r["patient"]) for r in rows} == stored
    assert len(stored) == 4
    series = [s for _, s in list_scans(tmp_path / "in", Pseudonyms()) if s.patient]
    assert series
    text = report.table.read_text() + report.windows.read_text()
    assert not [s.patient for s in series if s.patient in text]


def test_pieces_without_air_need_to_be_called_patches(tmp_path):
    write(tmp_path / "in" / "a.mha", np.random.default_rng(0).integers(-60, 200, (16, 16, 16)))
    checkpoint = classifier_file(tmp_path)
    strict = predict(checkpoint, tmp_path / "in", tmp_path / "p.csv", **QUIET)
    assert "patches=true" in rows_of(strict.table)[0]["reason"]
    taken = predict(checkpoint, tmp_path / "in", tmp_path / "p.csv", patches=True, **QUIET)
    assert rows_of(taken.table)[0]["status"] == "ok"


def test_training_patches_of_many_sizes_are_told(tmp_path):
    geometry = {
        "size": [16, 16, 16],
        "spacing": [3.0] * 3,
        "patch_mm": [48.0] * 3,
        "patch_mm_low": [30.0] * 3,
        "patch_mm_high": [60.0] * 3,
    }
    write(tmp_path / "in" / "a.mha", scan_like((16, 16, 16)))
    checkpoint = classifier_file(tmp_path, geometry=geometry)
    report = predict(checkpoint, tmp_path / "in", tmp_path / "p.csv", **QUIET)
    assert "30 x 30 x 30 to 60 x 60 x 60 mm" in report.warnings[0]


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        ({"grey": True}, {}, "grey values"),
        ({"dims": 2}, {}, "2D images"),
        ({}, {"overlap": 1.0}, "overlap 1.0"),
        ({}, {"min_body": -0.1}, "min_body -0.1"),
        ({}, {"batch_size": 0}, "batch_size"),
        ({}, {"accelerator": "tpu"}, "auto, cpu or gpu"),
        ({}, {}, "no CT found"),
    ],
)
def test_impossible_requests_are_named(tmp_path, plan, options, message):
    (tmp_path / "in").mkdir()
    if message != "no CT found":
        write(tmp_path / "in" / "a.mha", scan_like((16, 16, 16)))
    with pytest.raises(ValueError, match=message):
        predict(
            classifier_file(tmp_path, **plan), tmp_path / "in", tmp_path / "p", **(QUIET | options)
        )


def test_people_are_those_of_prepare_by_the_same_table(tmp_path):
    """Two files of one person by a table, whose folder a row may name; the id is not told."""
    for name in ("one/a.mha", "one/b.mha", "two.mha"):
        write(tmp_path / "in" / name, scan_like((20, 20, 20), seed=len(name) + ord(name[-5])))
    table = tmp_path / "people.csv"
    table.write_text("file,patient\none,Anna Q.\ntwo.mha,Ben\n")
    out = tmp_path / "out.csv"
    predict(
        classifier_file(tmp_path), tmp_path / "in", out, patients_csv=table, min_body=0, **QUIET
    )
    rows = {row["source"]: row["patient"] for row in rows_of(out)}
    assert rows["one/a.mha"] == rows["one/b.mha"] != rows["two.mha"]
    assert "Anna" not in out.read_text()
    prepare(tmp_path / "in", tmp_path / "store", patients_csv=table, progress=False)
    assert rows == {r.source: r.patient for r in Store(tmp_path / "store").all_records}
    table.write_text("name,patient\n")
    with pytest.raises(ValueError, match="needs the columns file and patient"):
        predict(classifier_file(tmp_path), tmp_path / "in", out, patients_csv=table, **QUIET)
