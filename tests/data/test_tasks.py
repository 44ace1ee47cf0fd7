from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from torch.utils.data import DataLoader

from medspark.data.io import UnreadableVolume
from medspark.data.tasks import Task, TaskDataset, load_task
from medspark.data.windows import Intensity

Writer = Callable[..., Path]
WIDE = Intensity.named("wide")
LABELS = "file,patient,label,label_name,split"
INDEX = "id,volume,i,j,k,patch_size_vox,label,label_name,split"
RAS = (-1, 0, 0, 0, -1, 0, 0, 0, 1)


def table(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def patches(tmp_path: Path, write_image: Writer, hu: np.ndarray) -> Path:
    root = tmp_path / "data/tasks/patches"
    for i in range(4):
        write_image(root / f"{i}.mha", np.roll(hu, i, axis=2))
    lines = [f"{i}.mha,p{i // 2},{i % 2},{'ab'[i % 2]},{('train', 'test')[i // 2]}"
             for i in range(4)]  # fmt: skip
    table(root / "labels.csv", LABELS, *lines)
    return root


@pytest.fixture
def indexed(tmp_path: Path, write_image: Writer, hu: np.ndarray) -> Path:
    write_image(tmp_path / "data/ct/lps.nii.gz", hu)
    write_image(tmp_path / "data/ct/ras.nii.gz", hu, direction=RAS)
    root = tmp_path / "data/tasks/organs"
    table(root / "index.csv", INDEX, "a,ct/lps.nii.gz,10,6,5,4,0,x,train",
          "b,ct/ras.nii.gz,10,6,5,4,1,y,train", "c,ct/lps.nii.gz,23,6,5,4,0,x,test")  # fmt: skip
    return root


def test_labels(patches: Path, hu: np.ndarray) -> None:
    task = load_task(patches)
    assert (task.name, task.class_names) == ("patches", ["a", "b"])
    assert [(s.id, s.patient, s.label, s.label_name, s.split) for s in task.samples[1:3]] == [
        ("1.mha", "p0", 1, "b", "train"),
        ("2.mha", "p1", 0, "a", "test"),
    ]
    for i, sample in enumerate(task.samples):
        voxels, spacing = task.read(sample)
        np.testing.assert_array_equal(voxels, np.roll(hu, i, axis=2))
        assert spacing == (3.0, 2.0, 1.0)
    assert load_task(patches / "labels.csv").samples == task.samples


def test_index_refers_to_the_stored_array(indexed: Path, hu: np.ndarray) -> None:
    """i, j, k are x, y, z of the array in the file, flipped axes or not."""
    task = load_task(indexed)
    stored = hu[3:7, 4:8, 8:12]
    np.testing.assert_array_equal(task.read(task.samples[0])[0], stored)
    np.testing.assert_array_equal(task.read(task.samples[1])[0], stored[:, ::-1, ::-1])
    assert task.read(task.samples[1])[1] == (3.0, 2.0, 1.0)
    assert task.samples[0].patient == "ct/lps.nii.gz"


def test_turned_axes(tmp_path: Path, write_image: Writer, hu: np.ndarray) -> None:
    """A sagittal volume: x of the file runs along P; patch and spacing are turned together."""
    write_image(tmp_path / "v.nrrd", hu, direction=(0, 0, 1, 1, 0, 0, 0, 1, 0))
    root = tmp_path / "tasks/t"
    table(root / "index.csv", INDEX, "a,v.nrrd,10,6,5,4,0,x,train")
    task = load_task(root)
    voxels, spacing = task.read(task.samples[0])
    # File axes (z, y, x) run towards L, S, P; canonical ones are (S, P, L).
    np.testing.assert_array_equal(voxels, hu[3:7, 4:8, 8:12].transpose(1, 2, 0))
    assert spacing == (2.0, 1.0, 3.0)


@pytest.mark.parametrize("value", [40, -3024])
def test_uniform_patch_is_a_sample(patches: Path, write_image: Writer, value: int) -> None:
    """What would be refused as a volume is a fair patch of liver, or of air."""
    write_image(patches / "0.mha", np.full((4, 4, 4), value, np.int16))
    task = load_task(patches)
    assert (task.read(task.samples[0])[0] == max(value, -1024)).all()


def test_patch_outside(indexed: Path) -> None:
    task = load_task(indexed)
    with pytest.raises(IndexError, match=r"sample 'c'.*leave the volume"):
        task.read(task.samples[2])


@pytest.mark.parametrize(
    ("lines", "error", "message"),
    [
        (["file,patient,label,split"], ValueError, r"lacks the column\(s\) label_name"),
        ([LABELS], ValueError, "no samples"),
        ([LABELS, "9.mha,p,0,a,train"], FileNotFoundError, "missing, such as 9.mha"),
        ([LABELS, "0.mha,p,one,a,train"], ValueError, "line 2: label 'one' is no whole number"),
        ([LABELS, "0.mha,p,0.5,a,train"], ValueError, "no whole number"),
        ([LABELS, "0.mha,p,-1,a,train"], ValueError, "below 0"),
        (["file,patient,label,label_name"], ValueError, "column split.*fractions="),
        ([LABELS, "../x.mha,p,0,a,train"], ValueError, "leaves the folder 'patches'"),
        ([LABELS, "/etc/hostname,p,0,a,train"], ValueError, "leaves the folder"),
        ([LABELS, "0.mha,p,0,a,train", "0.mha,p,0,a,train"], ValueError, "comes twice"),
        ([LABELS, "0.mha,p,0,a,train", "1.mha,p,0,b,train"], ValueError, "is named 'a' and 'b'"),
        ([LABELS, "0.mha,p,1,a,train"], ValueError, "run from 0"),
        ([LABELS, "0.mha,,0,a,train"], ValueError, "empty name, patient"),
        ([LABELS, "0.mha,p"], ValueError, "no whole number|empty"),
        (["id,volume,i,j,k,label,label_name,split"], ValueError, "patch_size_vox"),
        ([INDEX, "a,../../x.nii,1,1,1,4,0,x,train"], ValueError, "leaves the folder 'data'"),
        ([INDEX, "a,ct/x.nii,1,1,1,4,0,x,train"], FileNotFoundError, "such as x.nii"),
        ([INDEX, "a,ct/x.nii,1,q,1,4,0,x,train"], ValueError, "j 'q' is no whole number"),
        ([INDEX, "a,ct/x.nii,1,1,1,0,0,x,train"], ValueError, "patch_size_vox 0 is below 1"),
    ],
)
def test_bad_tables(patches: Path, lines: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_task(table(patches / "labels.csv", *lines))


def test_patient_in_two_splits_is_said(patches: Path) -> None:
    """It loads, so that it can be allowed knowingly; `check_leaks` refuses it."""
    table(patches / "labels.csv", LABELS, "0.mha,p,0,a,train", "1.mha,p,1,b,test")
    warnings = load_task(patches).warnings
    assert len(warnings) == 1
    assert warnings[0].startswith("1 patient(s) in more than one split, such as 'p' in test and tr")


def test_sound_table_is_silent(patches: Path) -> None:
    task = load_task(patches)
    assert (task.warnings, task.grey, task.dims) == ([], False, 3)


def test_splits_drawn_where_the_table_has_none(patches: Path) -> None:
    lines = [f"{i}.mha,p{i // 2},{i % 2},{'ab'[i % 2]}" for i in range(4)]
    table(patches / "labels.csv", "file,patient,label,label_name", *lines)
    task = load_task(patches, fractions={"train": 0.5, "test": 0.5}, seed=3)
    splits = {p: {s.split for s in task.samples if s.patient == p} for p in ("p0", "p1")}
    assert sorted(map(tuple, splits.values())) == [("test",), ("train",)]
    np.testing.assert_array_equal(task.read(task.samples[2])[0], load_voxels(patches / "2.mha"))


def load_voxels(path: Path) -> np.ndarray:
    voxels: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    return voxels


def test_drawing_splits_forgets_the_given_ones(patches: Path) -> None:
    table(patches / "labels.csv", LABELS, *(f"{i}.mha,p,0,a,{'train' if i else 'test'}"
                                            for i in range(3)), "3.mha,q,0,a,train")  # fmt: skip
    task = load_task(patches, fractions={"train": 0.7, "test": 0.3})
    assert {s.split for s in task.samples if s.patient == "p"} == {"train"}
    assert task.split("test")[0].patient == "q"
    assert task.warnings == []


def test_pictures_and_volumes_do_not_mix(patches: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 4), np.uint8)), str(patches / "p.png"))
    table(patches / "labels.csv", LABELS, "0.mha,p,0,a,train", "p.png,q,0,a,train")
    with pytest.raises(ValueError, match="names 1 pictures among volumes"):
        load_task(patches)


def test_no_task(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no labels\.csv or index\.csv"):
        load_task(tmp_path)


def test_unknown_split(patches: Path) -> None:
    with pytest.raises(ValueError, match="no split 'val', only test, train"):
        load_task(patches).split("val")


def test_broken_sample(patches: Path) -> None:
    (patches / "0.mha").write_bytes(b"")
    task = load_task(patches)
    with pytest.raises(UnreadableVolume, match=r"sample '0\.mha': the file is empty"):
        task.read(task.samples[0])


def test_dataset(patches: Path, hu: np.ndarray) -> None:
    data = TaskDataset(load_task(patches), "test", WIDE, None)
    x, label, index = data[1]
    assert (len(data), label, index) == (2, 1, 1)
    assert x.dtype == torch.float32
    np.testing.assert_allclose(x[0], WIDE.normalise(np.roll(hu, 3, axis=2)), atol=1e-6)


def test_right_size_is_not_touched(patches: Path) -> None:
    task = load_task(patches)
    same, free = (TaskDataset(task, "train", WIDE, size)[0][0] for size in ((12, 20, 24), None))
    assert torch.equal(same, free)


def test_resampling(tmp_path: Path, write_image: Writer) -> None:
    """A ramp stays the ramp: sampled at the centres of the new voxels, edges held."""
    ramp = np.broadcast_to(np.arange(0, 800, 100, dtype=np.int16), (8, 8, 8))
    write_image(tmp_path / "r.mha", np.ascontiguousarray(ramp))
    table(tmp_path / "labels.csv", LABELS, "r.mha,p,0,a,train")
    x = TaskDataset(load_task(tmp_path), "train", WIDE, (4, 8, 16))[0][0]
    assert tuple(x.shape) == (1, 4, 8, 16)
    expected = np.clip((np.arange(16) + 0.5) / 2 - 0.5, 0, 7) * 100
    np.testing.assert_allclose(WIDE.to_hu(x[0, 2, 3]), expected, atol=0.01)


def test_size_of_another_number_of_axes(patches: Path) -> None:
    data = TaskDataset(load_task(patches), "train", WIDE, (12, 20))
    with pytest.raises(
        ValueError, match=r"'0\.mha' has 3 axes .12, 20, 24., the size .12, 20. has"
    ):
        data[0]


def test_unknown_augmentation(patches: Path) -> None:
    with pytest.raises(ValueError, match="'fierce', choose one of none, light, strong"):
        TaskDataset(load_task(patches), "train", WIDE, None, augment="fierce")


def test_true_is_light_and_false_is_none(patches: Path) -> None:
    task = load_task(patches)

    def first(augment: bool | str) -> torch.Tensor:
        return TaskDataset(task, "train", WIDE, None, augment=augment, seed=1)[0][0]

    assert torch.equal(first(True), first("light"))
    assert torch.equal(first(False), first("none"))
    assert not torch.equal(first("strong"), first("light"))


def test_augmentation_is_drawn_by_epoch_and_index(patches: Path) -> None:
    task = load_task(patches)

    def item(epoch: int, seed: int = 0, index: int = 0) -> torch.Tensor:
        data = TaskDataset(task, "train", WIDE, None, augment=True, seed=seed)
        data.set_epoch(epoch)
        return data[index][0]

    assert torch.equal(item(3), item(3))
    assert not torch.equal(item(3), item(4))
    assert not torch.equal(item(3), item(3, seed=1))


def test_augmentation_differs_between_samples(patches: Path) -> None:
    (patches / "1.mha").write_bytes((patches / "0.mha").read_bytes())
    data = TaskDataset(load_task(patches), "train", WIDE, None, augment=True)
    assert not torch.equal(data[0][0], data[1][0])


def test_augmentation_is_flips_and_a_linear_map(patches: Path) -> None:
    task = load_task(patches)
    plain = TaskDataset(task, "train", WIDE, None)[0][0][0].numpy()
    data = TaskDataset(task, "train", WIDE, None, augment=True)
    flips = Counter[tuple[bool, ...]]()
    for epoch in range(80):
        data.set_epoch(epoch)
        x = data[0][0][0].numpy()
        found = None
        for code in np.ndindex(2, 2, 2):
            flipped = np.flip(plain, [axis for axis in range(3) if code[axis]])
            scale, shift = np.polyfit(flipped.ravel(), x.ravel(), 1)
            if np.allclose(flipped * scale + shift, x, atol=1e-4):
                found = tuple(map(bool, code))
                assert 0.9 <= scale <= 1.1
                assert -0.1 <= shift <= 0.1
        assert found is not None
        flips[found] += 1
    assert len(flips) == 8


def test_epoch_reaches_workers(patches: Path) -> None:
    data = TaskDataset(load_task(patches), "train", WIDE, None, augment=True)
    loader = DataLoader(data, batch_size=2, num_workers=1, persistent_workers=True)
    first = next(iter(loader))[0]
    data.set_epoch(1)
    second = next(iter(loader))[0]
    assert not torch.equal(first, second)
    assert torch.equal(second[1], data[1][0])


def test_real_tumour_patches(real_data: Path) -> None:
    """The given splits; patches to the voxel as stored (these files are LPS)."""
    task = load_task(real_data / "tasks/sts_tumour_patches")
    assert task.class_names == ["normal", "tumour"]
    counts = Counter((s.split, s.label) for s in task.samples)
    assert counts == {("train", 0): 132, ("train", 1): 132, ("val", 0): 36, ("val", 1): 36,
                      ("test", 0): 48, ("test", 1): 48}  # fmt: skip
    for sample in task.samples[::60]:
        direct = sitk.GetArrayFromImage(sitk.ReadImage(str(task.root / sample.id)))
        voxels, spacing = task.read(sample)
        np.testing.assert_array_equal(voxels, direct)
        assert spacing == (1.5, 1.5, 1.5)


def test_real_organ_patches(real_data: Path) -> None:
    """Cut straight from the stored array, and the organ's own label fills the centre."""
    root = real_data / "tasks/organ_patches_one_patient"
    task = load_task(root)
    assert len(task.class_names) == 9
    ct = sitk.ReadImage(str(real_data / "ct/abdomen_totalseg_example.nii.gz"))
    stored = sitk.GetArrayFromImage(ct)
    with (root / "index.csv").open() as file:
        rows = list(csv.DictReader(file))
    for sample, row in list(zip(task.samples, rows, strict=True))[::20]:
        i, j, k = (int(row[axis]) for axis in "ijk")
        direct = stored[k - 8 : k + 8, j - 8 : j + 8, i - 8 : i + 8].clip(-1024)
        voxels, spacing = task.read(sample)
        np.testing.assert_array_equal(voxels, direct[:, ::-1, ::-1])  # RAS to LPS
        assert spacing == (3.0, 3.0, 3.0)
    means = {
        name: np.mean([task.read(s)[0][6:10, 6:10, 6:10].mean()
                       for s in task.samples if s.label_name == name][:10])
        for name in ("vertebra", "liver", "urinary_bladder")
    }  # fmt: skip
    assert means["vertebra"] > means["liver"] > means["urinary_bladder"]


def test_every_patch_is_inside(real_data: Path) -> None:
    task: Task = load_task(real_data / "tasks/organ_patches_one_patient")
    assert {task.read(s)[0].shape for s in task.samples} == {(16, 16, 16)}
