from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from medspark.data.ingest import prepare
from medspark.data.leaks import Leak, check_leaks, find_leaks, overlap_with_store
from medspark.data.pseudonyms import Pseudonyms
from medspark.data.store import Store
from medspark.data.tasks import Task, load_task

Writer = Callable[..., Path]
INDEX = "id,volume,patient,i,j,k,patch_size_vox,label,label_name,split"
KEY = Pseudonyms(b"0123456789abcdef")


def table(root: Path, *rows: str) -> Task:
    """A labels.csv task of rows "file patient split"."""
    lines = ["file,patient,label,label_name,split"]
    lines += [f"{f},{p},0,a,{s}" for f, p, s in (row.split() for row in rows)]
    (root / "labels.csv").write_text("\n".join(lines))
    return load_task(root)


def index(root: Path, *rows: str) -> Task:
    """An index of rows "id volume patient i,j,k size split"."""
    root.mkdir(parents=True, exist_ok=True)
    parts = [row.split() for row in rows]
    lines = [f"{n},{v},{p},{ijk},{size},0,a,{split}" for n, v, p, ijk, size, split in parts]
    (root / "index.csv").write_text("\n".join([INDEX, *lines]))
    return load_task(root)


@pytest.fixture
def root(tmp_path: Path, write_image: Writer) -> Path:
    """Six patches, nothing shared."""
    rng = np.random.default_rng(0)
    for i in range(6):
        write_image(tmp_path / f"{i}.mha", rng.integers(-500, 500, (5, 6, 7)).astype(np.int16))
    return tmp_path


@pytest.fixture
def volumes(tmp_path: Path, write_image: Writer) -> Path:
    """Folder of a task that may index `ct/a.nii.gz` and `ct/b.nii.gz`."""
    rng = np.random.default_rng(0)
    for name in "ab":
        noise = rng.integers(-1000, 900, (30, 30, 30)).astype(np.int16)
        write_image(tmp_path / f"data/ct/{name}.nii.gz", noise)
    return tmp_path / "data/tasks/t"


def test_sound_task(root: Path) -> None:
    task = table(root, "0.mha p train", "1.mha p train", "2.mha q val", "3.mha r test")
    assert find_leaks(task) == []
    assert check_leaks(task) == []


def test_patient(root: Path) -> None:
    task = table(root, "0.mha p train", "1.mha p test", "2.mha q train")
    assert find_leaks(task) == [Leak("patient", ("test", "train"), ("p",))]


@pytest.mark.parametrize("axes", [(), (0,), (2,), (0, 1), (0, 1, 2)])
def test_voxels(root: Path, write_image: Writer, axes: tuple[int, ...]) -> None:
    """A copy in another format, mirrored or not."""
    voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(root / "1.mha")))
    write_image(root / "copy.nii.gz", np.flip(voxels, axes).copy())
    task = table(root, "0.mha p train", "1.mha q train", "copy.nii.gz r test")
    kind = "mirrored" if axes else "voxels"
    assert find_leaks(task) == [Leak(kind, ("train", "test"), ("1.mha", "copy.nii.gz"))]


def test_almost_identical_is_not_identical(root: Path, write_image: Writer) -> None:
    """The same values in another order: alike by their sums, not by their places."""
    voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(root / "1.mha")))
    write_image(root / "moved.mha", np.roll(voxels, 1, axis=0))
    assert find_leaks(table(root, "1.mha p train", "moved.mha q test")) == []


def test_same_split_is_no_leak(root: Path) -> None:
    shutil.copy(root / "1.mha", root / "copy.mha")
    assert find_leaks(table(root, "1.mha p train", "copy.mha q train", "2.mha r test")) == []


def test_empty_patches_are_alike_for_no_reason(root: Path, write_image: Writer) -> None:
    for name in ("x", "y"):
        write_image(root / f"{name}.mha", np.full((5, 6, 7), -1000, np.int16))
    assert find_leaks(table(root, "x.mha p train", "y.mha q test")) == []


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_one_file_under_two_names(root: Path, link: Callable[[Path, Path], None]) -> None:
    link(root / "1.mha", root / "again.mha")
    task = table(root, "1.mha p train", "again.mha q test")
    assert [str(leak) for leak in find_leaks(task)] == ["1.mha and again.mha (train, test)"] * 2
    assert [leak.kind for leak in find_leaks(task)] == ["file", "voxels"]


@pytest.mark.parametrize(
    ("place", "leaks"),
    [
        ("14,10,10", True),  # faces touch: 8..11 and 12..15 along x
        ("14,14,14", True),  # corners touch
        ("15,10,10", False),  # one voxel between
        ("11,11,11", True),
        ("10,10,3", False),
    ],
)
def test_cubes_of_one_volume(volumes: Path, place: str, leaks: bool) -> None:
    task = index(volumes, "s ct/a.nii.gz p 10,10,10 4 train", f"t ct/a.nii.gz p {place} 4 test",
                 "u ct/b.nii.gz q 10,10,10 4 test")  # fmt: skip
    found = [leak for leak in find_leaks(task) if leak.kind != "patient"]
    assert found == ([Leak("overlap", ("train", "test"), ("s", "t"))] if leaks else [])


def test_cubes_of_other_sizes(volumes: Path) -> None:
    """A large cube and a small one: each by its own size."""
    task = index(volumes, "s ct/a.nii.gz p 10,10,10 12 train", "t ct/a.nii.gz p 18,10,10 4 test")
    assert [leak.kind for leak in find_leaks(task)] == ["patient", "overlap"]
    task = index(volumes, "s ct/a.nii.gz p 10,10,10 12 train", "t ct/a.nii.gz p 19,10,10 4 test")
    assert [leak.kind for leak in find_leaks(task)] == ["patient"]


def test_one_volume_under_two_names(volumes: Path, write_image: Writer, tmp_path: Path) -> None:
    """In another format and turned; the patients' names hide it, the cubes are far apart."""
    image = sitk.ReadImage(str(tmp_path / "data/ct/a.nii.gz"))
    sitk.WriteImage(sitk.DICOMOrient(image, "RAS"), str(tmp_path / "data/ct/other.nrrd"))
    task = index(volumes, "s ct/a.nii.gz p 5,5,5 4 train", "t ct/other.nrrd q 5,5,5 4 test",
                 "u ct/b.nii.gz r 5,5,5 4 test")  # fmt: skip
    assert find_leaks(task) == [Leak("volume", ("train", "test"), ("a.nii.gz", "other.nrrd"))]


def test_refusal_says_what_and_what_to_do(root: Path) -> None:
    """Counts, the first three, and the way out; or the lines where it is allowed."""
    rows = [f"{i}.mha p{i} train" for i in range(5)]
    for i in range(5):
        shutil.copy(root / f"{i}.mha", root / f"c{i}.mha")
    task = table(root, *rows, *(f"c{i}.mha p{i} val" for i in range(4)), "c4.mha z test")
    with pytest.raises(ValueError, match="are not independent") as error:
        check_leaks(task)
    text = str(error.value)
    assert "4 patient(s) in more than one split: p0 (train, val), p1 (train, val), p2" in text
    assert "5 pair(s) of samples with identical voxels in two splits: 0.mha and c0.mha" in text
    assert "p3" not in text
    assert "allow_leak=true" in text
    lines = check_leaks(task, allow=True)
    assert [line.split()[0] for line in lines] == ["4", "5"]


def test_arrays(tmp_path: Path) -> None:
    """An image of train in test, mirrored top to bottom."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 4, 6, 6, 6)).astype(np.uint8)
    images[2, 3] = images[0, 1, ::-1]
    splits = ("train", "val", "test")
    given = {f"{s}_images": images[i] for i, s in enumerate(splits)}
    np.savez(tmp_path / "a.npz", **given, **{f"{s}_labels": np.zeros(4, int) for s in splits})
    assert find_leaks(load_task(tmp_path / "a.npz")) == [
        Leak("mirrored", ("train", "test"), ("train/00001", "test/00003"))
    ]


@pytest.fixture
def store(volumes: Path, tmp_path: Path) -> Store:
    """`ct/a.nii.gz` and a patient "P-7", resampled, with a key."""
    (tmp_path / "archive").mkdir()
    shutil.copy(tmp_path / "data/ct/a.nii.gz", tmp_path / "archive/scan.nii.gz")
    (tmp_path / "patients.csv").write_text("file,patient\nscan.nii.gz,P-7\n")
    (tmp_path / "key").write_bytes(KEY.key)
    prepare(
        tmp_path / "archive",
        tmp_path / "store",
        spacing=(3.0, 3.0, 3.0),
        patients_csv=tmp_path / "patients.csv",
        salt_file=tmp_path / "key",
        progress=False,
    )
    made = Store(tmp_path / "store")
    assert len(made) == 1
    return made


def test_store_holds_the_volume_and_the_patient(volumes: Path, store: Store) -> None:
    task = index(volumes, "s ct/a.nii.gz x 5,5,5 4 test", "t ct/b.nii.gz P-7 5,5,5 4 val",
                 "u ct/b.nii.gz P-8 20,20,20 4 val", "v ct/a.nii.gz x 20,5,5 4 train")  # fmt: skip
    found = overlap_with_store(task, store, names=KEY)
    assert (found.patients, found.samples) == (["P-7"], ["s"])
    assert bool(found)
    assert found.notes == ["patients match only under the names that the archive had"]


def test_without_the_key_patients_cannot_match(volumes: Path, store: Store) -> None:
    task = index(volumes, "t ct/b.nii.gz P-7 5,5,5 4 val")
    found = overlap_with_store(task, store)
    assert not found
    assert "no key" in found.notes[0]


def test_training_samples_may_be_in_the_store(volumes: Path, store: Store) -> None:
    task = index(volumes, "s ct/a.nii.gz P-7 5,5,5 4 train", "t ct/b.nii.gz q 5,5,5 4 test")
    assert not overlap_with_store(task, store, names=KEY)


def test_what_cannot_be_seen_is_said(root: Path, store: Store, tmp_path: Path) -> None:
    patches = overlap_with_store(table(root, "0.mha p test"), store, names=KEY)
    assert not patches
    assert any("not recognised by their voxels" in note for note in patches.notes)
    bare = tmp_path / "data/tasks/bare"
    bare.mkdir(parents=True)
    (bare / "index.csv").write_text(f"{INDEX}\nt,ct/b.nii.gz,,5,5,5,4,0,a,test\n")
    notes = overlap_with_store(load_task(bare), store, names=KEY).notes
    assert any("no patient in the index" in note for note in notes)


def test_ingested_patch_is_recognised(root: Path, tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    noise = np.random.default_rng(5).integers(-1000, 900, (16, 16, 16)).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(noise), str(root / "n.mha"))
    shutil.copy(root / "n.mha", tmp_path / "archive/other.mha")
    prepare(tmp_path / "archive", tmp_path / "store", spacing=None, progress=False)
    task = table(root, "n.mha p test", "0.mha q test")
    assert overlap_with_store(task, Store(tmp_path / "store")).samples == ["n.mha"]


def test_real_tasks(real_data: Path) -> None:
    """The tumour task is sound; the organs of one person are refused, and why."""
    assert check_leaks(load_task(real_data / "tasks/sts_tumour_patches")) == []
    organs = load_task(real_data / "tasks/organ_patches_one_patient")
    with pytest.raises(ValueError, match=r"1 patient\(s\) in more than one split") as error:
        check_leaks(organs)
    assert "touch or overlap across splits: liver_0000 and liver_0024" in str(error.value)
