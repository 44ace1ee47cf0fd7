from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from medspark.data.headers import UnreadableVolume
from medspark.data.phantom import kept_locale
from medspark.data.task_images import read_picture
from medspark.data.tasks import TaskDataset, load_task
from medspark.data.windows import Intensity

WIDE = Intensity.named("wide")


def save(path: Path, array: np.ndarray, vector: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with kept_locale():
        sitk.WriteImage(sitk.GetImageFromArray(array, isVector=vector), str(path))
    return path


@pytest.fixture
def grey() -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (9, 13)).astype(np.uint8)


def png(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A grey 8-bit PNG file that promises a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))  # fmt: skip

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
            + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b""))  # fmt: skip


@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF", ".PNG"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_values(tmp_path: Path, grey: np.ndarray, suffix: str, dtype: type) -> None:
    array = grey.astype(dtype) * (257 if dtype is np.uint16 else 1)
    found = read_picture(save(tmp_path / f"a{suffix}", array))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, array)


def test_jpeg(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(32) * 3, np.arange(40) * 2).astype(np.uint8)
    found = read_picture(save(tmp_path / "a.jpg", smooth))
    assert found.shape == (32, 40)
    assert np.abs(found.astype(int) - smooth).max() <= 4


def test_own_png(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(3, 2, b"\0\x01\x02\x03\0\x04\x05\xff"))
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), [[1, 2, 3], [4, 5, 255]])


@pytest.mark.parametrize("channels", [3, 4])
def test_colours(tmp_path: Path, grey: np.ndarray, channels: int) -> None:
    """Equal channels are grey; one pixel of colour, or one that shines through, is not."""
    array = np.stack([grey] * channels, axis=-1)
    if channels == 4:
        array[..., 3] = 255
    found = read_picture(save(tmp_path / "a.png", array, vector=True))
    np.testing.assert_array_equal(found, grey)
    other = array.copy()
    other[3, 4, 2] ^= 1
    with pytest.raises(UnreadableVolume, match=r"colour picture \(1 of 117 pixels"):
        read_picture(save(tmp_path / "b.png", other, vector=True))
    if channels == 4:
        array[0, 0, 3] = 254
        with pytest.raises(UnreadableVolume, match="partly transparent"):
            read_picture(save(tmp_path / "c.png", array, vector=True))


def test_white_as_zero(tmp_path: Path, grey: np.ndarray) -> None:
    """ITK would hand it over inverted, without a word."""
    path = save(tmp_path / "a.tif", grey)
    data = path.read_bytes()
    tag = struct.pack("<HHI", 262, 3, 1)
    assert data.count(tag) == 1
    at = data.index(tag) + len(tag)
    assert data[at] == 1
    path.write_bytes(data[:at] + b"\0" + data[at + 1 :])
    with pytest.raises(UnreadableVolume, match="MinIsWhite"):
        read_picture(path)


def test_refused(tmp_path: Path, grey: np.ndarray) -> None:
    several = save(tmp_path / "pages.tif", np.stack([grey, grey]))
    with pytest.raises(UnreadableVolume, match="2 pages"):
        read_picture(several)
    floats = save(tmp_path / "float.tif", grey.astype(np.float32))
    with pytest.raises(UnreadableVolume, match="pixels of float32"):
        read_picture(floats)
    save(tmp_path / "a.mha", grey).rename(tmp_path / "a.png")
    with pytest.raises(UnreadableVolume, match="content is of another kind"):
        read_picture(tmp_path / "a.png")
    (tmp_path / "e.png").write_bytes(b"")
    with pytest.raises(UnreadableVolume, match="the file is empty"):
        read_picture(tmp_path / "e.png")
    (tmp_path / "t.tif").write_bytes(b"II*\0\x08\0\0\0")
    with pytest.raises(UnreadableVolume, match="directory is missing"):
        read_picture(tmp_path / "t.tif")
    whole = save(tmp_path / "w.png", grey).read_bytes()
    (tmp_path / "w.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadableVolume, match="truncated or corrupt"):
        read_picture(tmp_path / "w.png")


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [(900_000, 900_000, "pixels, the limit is 67108864"), (8192, 8191, "too short for them")],
)
def test_sizes_are_checked_first(tmp_path: Path, width: int, height: int, message: str) -> None:
    (tmp_path / "a.png").write_bytes(png(width, height))
    with pytest.raises(UnreadableVolume, match=message):
        read_picture(tmp_path / "a.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Value 10 a picture: train 2 + 1, val 1 + 1, test 1 + 1."""
    names = ["train/zebra/a.png", "train/zebra/b.tif", "train/ant/a.png",
             "val/zebra/a.png", "val/ant/a.png", "test/zebra/a.png", "test/ant/a.png"]  # fmt: skip
    for i, name in enumerate(names):
        save(tmp_path / "pics" / name, np.full((4, 6), 10 * i, np.uint8))
    return tmp_path / "pics"


def test_folder(folder: Path) -> None:
    task = load_task(folder)
    assert (task.name, task.class_names, task.grey, task.dims) == (
        "pics",
        ["ant", "zebra"],
        True,
        2,
    )
    found = {s.id: (s.split, s.label, int(task.read(s)[0][0, 0])) for s in task.samples}
    assert found["train/zebra/b.tif"] == ("train", 1, 10)
    assert found["train/ant/a.png"] == ("train", 0, 20)
    assert found["test/ant/a.png"] == ("test", 0, 60)
    assert len(found) == 7
    assert len(task.warnings) == 1
    assert "knows no patients" in task.warnings[0]


def test_folder_with_doubts(folder: Path) -> None:
    (folder / "val/ant/a.png").unlink()
    (folder / "test/ant/notes.txt").write_text("x")
    (folder / "test/ant/.hidden").write_text("x")
    lines = load_task(folder).warnings
    assert lines[1:] == [
        "the split 'val' has no picture of ant",
        "1 other file(s) in the folders of classes are left out",
    ]


def test_link_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "secret.png", np.zeros((4, 4), np.uint8))
    (folder / "train/ant/b.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="link that leaves the folder"):
        load_task(folder)


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "train/ant").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no pictures"):
        load_task(tmp_path)


@pytest.mark.parametrize("top", [255, 65535])
def test_table_of_pictures(tmp_path: Path, top: int) -> None:
    """8 and 16 bits alike: the top of the type is the high end of the window."""
    array = np.array([[0, top // 5], [top // 5 * 4, top]], np.uint8 if top == 255 else np.uint16)
    save(tmp_path / "x/a.png", array)
    lines = ["file,patient,label,label_name,split", "x/a.png,p,0,only,train"]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    task = load_task(tmp_path)
    assert (task.grey, task.dims, task.samples[0].patient, task.warnings) == (True, 2, "p", [])
    x = TaskDataset(task, "train", WIDE, None)[0][0]
    np.testing.assert_allclose(WIDE.to_hu(x[0]), [[-1000, -600], [600, 1000]], atol=1e-2)


def test_broken_picture_names_its_sample(folder: Path) -> None:
    (folder / "train/ant/a.png").write_bytes(b"nothing")
    task = load_task(folder)
    with pytest.raises(UnreadableVolume, match=r"sample 'train/ant/a\.png': the name ends in"):
        task.read(next(s for s in task.samples if s.id == "train/ant/a.png"))


def test_pictures_are_augmented(folder: Path, write_image: Callable[..., Path]) -> None:
    save(folder / "train/ant/a.png", np.random.default_rng(0).integers(0, 255, (4, 6)).astype("u1"))
    task = load_task(folder)
    plain = TaskDataset(task, "train", WIDE, None)[0][0]
    data = TaskDataset(task, "train", WIDE, None, augment="light")
    seen = set()
    for epoch in range(30):
        data.set_epoch(epoch)
        x = data[0][0]
        for code in np.ndindex(2, 2):
            flipped = plain.flip([1 + a for a in range(2) if code[a]])
            if np.corrcoef(flipped.flatten(), x.flatten())[0, 1] > 0.9999:
                seen.add(code)
    assert len(seen) == 4
