from __future__ import annotations

import locale
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from medspark.data.ingest import prepare
from medspark.data.io import read_volume
from medspark.data.phantom import Phantom, make_phantom, write_phantom_task, write_phantoms
from medspark.data.store import Store
from medspark.data.tasks import load_task


@pytest.fixture(scope="module")
def phantoms() -> list[Phantom]:
    return [make_phantom(seed, (64, 64, 64), (2.0, 2.0, 2.0)) for seed in range(8)]


def eroded(mask: np.ndarray, radius: int) -> np.ndarray:
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    return sitk.GetArrayFromImage(sitk.BinaryErode(image, [radius] * 3)) > 0


def dilated(mask: np.ndarray, radius: int) -> np.ndarray:
    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    return sitk.GetArrayFromImage(sitk.BinaryDilate(image, [radius] * 3)) > 0


def centre_of(mask: np.ndarray) -> np.ndarray:
    return np.argwhere(mask).mean(axis=0)


def region(phantom: Phantom, name: str) -> np.ndarray:
    return phantom.labels == phantom.label_names.index(name)


def test_form(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        assert (phantom.hu.dtype, phantom.labels.dtype) == (np.int16, np.uint8)
        assert phantom.hu.shape == phantom.labels.shape == (64, 64, 64)
        assert phantom.spacing == (2.0, 2.0, 2.0)
        assert phantom.labels.max() < len(phantom.label_names)
        assert phantom.hu.min() >= -1024


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("air", -1010, -985), ("fat", -125, -80), ("muscle", 30, 80), ("lung", -900, -760),
     ("liver", 40, 170), ("bone", 150, 800), ("heart", 35, 300), ("spleen", 35, 200)],
)  # fmt: skip
def test_tissues_have_their_hu(phantoms: list[Phantom], name: str, low: int, high: int) -> None:
    medians = [np.median(p.hu[region(p, name)]) for p in phantoms if region(p, name).sum() > 200]
    assert len(medians) >= 4
    assert all(low <= m <= high for m in medians), medians


def test_it_looks_like_ct(phantoms: list[Phantom]) -> None:
    """Shares of air, lung, fat, soft tissue and bone in the ranges of a torso CT."""
    for phantom in phantoms:
        body = ~(region(phantom, "air") | region(phantom, "table"))
        assert 0.3 < body.mean() < 0.65
        inside = phantom.hu[body]
        assert 0.05 < (np.abs(inside + 100) < 50).mean() < 0.6  # fat
        assert 0.2 < (np.abs(inside - 60) < 80).mean() < 0.8  # soft tissue
        assert 0.01 < (inside > 200).mean() < 0.15  # bone and contrast


def test_noise_and_partial_volume(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        liver = eroded(region(phantom, "liver"), 2)
        if liver.sum() > 300:
            assert 7 < phantom.hu[liver].std() < 45
        air = eroded(region(phantom, "air"), 2)
        assert 5 < phantom.hu[air].std() < 30
        body = region(phantom, "air") | region(phantom, "table")
        edge = dilated(body, 1) & ~body
        assert ((phantom.hu[edge] > -900) & (phantom.hu[edge] < -150)).mean() > 0.1


def test_places_depend_on_each_other(phantoms: list[Phantom]) -> None:
    """Supine, LPS: liver to the right of the spleen, spine behind, lungs above the liver."""
    for phantom in phantoms:
        centre = {
            name: centre_of(region(phantom, name))
            for name in ("liver", "spleen", "heart", "lung", "bone", "kidney")
            if region(phantom, name).sum() > 300
        }
        if {"liver", "spleen"} <= set(centre):
            assert centre["liver"][2] < centre["spleen"][2] - 5
        if {"liver", "lung"} <= set(centre):
            assert centre["lung"][0] > centre["liver"][0] + 5
        if {"heart", "bone"} <= set(centre):
            assert centre["heart"][1] < centre["bone"][1]
        table = np.argwhere(region(phantom, "table"))
        assert table[:, 1].min() > centre_of(region(phantom, "muscle"))[1]


def test_seeds(phantoms: list[Phantom]) -> None:
    again = make_phantom(3, (64, 64, 64), (2.0, 2.0, 2.0))
    np.testing.assert_array_equal(again.hu, phantoms[3].hu)
    np.testing.assert_array_equal(again.labels, phantoms[3].labels)
    same = np.mean(phantoms[3].labels == phantoms[4].labels)
    assert 0.5 < same < 0.95  # the same kind of body, another body


def test_lesions() -> None:
    plain = make_phantom(1, (64, 64, 64), (2.0, 2.0, 2.0), n_lesions=0)
    sick = make_phantom(1, (64, 64, 64), (2.0, 2.0, 2.0), n_lesions=6)
    assert not region(plain, "lesion").any()
    mask = sitk.GetImageFromArray(region(sick, "lesion").astype(np.uint8))
    parts = sitk.GetArrayFromImage(sitk.ConnectedComponent(mask))
    assert 3 <= parts.max() <= 8
    sizes = np.bincount(parts.ravel())[1:]
    assert max(sizes) <= 4 / 3 * np.pi * 12**3
    outside = ~dilated(region(sick, "lesion"), 3)
    assert (plain.labels[outside] == sick.labels[outside]).all()
    inside = region(sick, "lesion")
    assert np.abs(plain.hu[inside].astype(int) - sick.hu[inside]).mean() > 25


def test_sizes_and_spacings() -> None:
    thin = make_phantom(0, (20, 80, 100), (5.0, 1.5, 1.2))
    assert thin.hu.shape == (20, 80, 100)
    assert region(thin, "muscle").mean() > 0.05
    with pytest.raises(ValueError, match="size"):
        make_phantom(0, (8, 64, 64))
    with pytest.raises(ValueError, match="n_lesions"):
        make_phantom(0, n_lesions=-1)


def test_written_formats(tmp_path: Path) -> None:
    """Five phantoms in four formats, read back to the voxel and taken in by prepare."""
    size, spacing = (32, 40, 48), (3.0, 2.0, 2.0)
    paths = write_phantoms(tmp_path / "in", 5, seed=10, size=size, spacing=spacing)
    assert [p.name for p in paths] == [
        "phantom_0000.nii.gz", "phantom_0001.nrrd", "phantom_0002.mha", "phantom_0003_dicom",
        "phantom_0004.nrrd",
    ]  # fmt: skip
    for seed, path in enumerate(paths, start=10):
        volume = read_volume(path)
        np.testing.assert_array_equal(volume.hu, make_phantom(seed, size, spacing).hu)
        assert volume.spacing == spacing
        assert volume.orientation == "LPS"
        assert volume.warnings == []
    assert len(list(paths[3].iterdir())) == 32
    report = prepare(tmp_path / "in", tmp_path / "store", progress=False,
                     patients_csv=tmp_path / "in/patients.csv")  # fmt: skip
    assert (report.ok, report.quarantined, report.skipped) == (5, 0, 0)
    assert len({r.patient for r in Store(tmp_path / "store").records}) == 5


def test_writing_is_deterministic(tmp_path: Path) -> None:
    for name in "ab":
        write_phantoms(tmp_path / name, 4, seed=1, size=(16, 24, 24))
    for path in sorted(p for p in (tmp_path / "a").rglob("*") if p.is_file()):
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.read_bytes() == other.read_bytes(), path.name


def test_task(tmp_path: Path) -> None:
    task = load_task(
        write_phantom_task(tmp_path / "t", n_patients=5, patches_per_patient=4, size=24, seed=2)
    )
    assert task.class_names == ["normal", "lesion"]
    assert len(task.samples) == 20
    assert Counter(s.split for s in task.samples) == {"train": 12, "val": 4, "test": 4}
    for split in ("train", "val", "test"):
        labels = Counter(s.label for s in task.split(split))
        assert labels[0] == labels[1]
    phantom = make_phantom(2, n_lesions=12)
    for sample in task.samples[:4]:
        hu, spacing = task.read(sample)
        assert (hu.shape, spacing) == ((24, 24, 24), (1.5, 1.5, 1.5))
        assert (hu > -500).mean() >= 0.5
        lesion = region(phantom, "lesion")[find(hu, phantom.hu)]
        assert (lesion.sum() >= 0.005 * 24**3) if sample.label else not lesion.any()


def find(patch: np.ndarray, volume: np.ndarray) -> tuple[slice, ...]:
    """Where in a volume a patch was cut."""
    d, h, w = patch.shape
    for z, y, x in np.argwhere(volume == patch[0, 0, 0]):
        box = (slice(z, z + d), slice(y, y + h), slice(x, x + w))
        if np.array_equal(volume[box], patch):
            return box
    raise AssertionError("the patch is not part of the volume")


def test_task_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="even number"):
        write_phantom_task(tmp_path, patches_per_patient=3)
    with pytest.raises(ValueError, match="3 patients"):
        write_phantom_task(tmp_path, n_patients=2)


def test_writing_leaves_the_locale_alone(tmp_path) -> None:
    before = locale.setlocale(locale.LC_ALL)
    write_phantoms(tmp_path, 4, 0, size=(24, 24, 24))
    assert locale.setlocale(locale.LC_ALL) == before
