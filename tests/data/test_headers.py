from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medspark.data.headers import (
    MAX_BYTES,
    UnreadableVolume,
    check_file,
    check_promise,
    image_suffix,
    shear_angle,
)
from medspark.data.io import read_volume
from medspark.data.text_headers import check_nrrd, meta_data_file

Writer = Callable[..., Path]


@pytest.fixture
def nifti(tmp_path: Path, write_image: Writer, hu: np.ndarray) -> Path:
    return write_image(tmp_path / "a.nii", hu)


def patched(path: Path, form: str, at: int, *values: float) -> Path:
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, at, *values)
    path.write_bytes(data)
    return path


def zipped(path: Path) -> Path:
    packed = path.with_suffix(".nii.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    return packed


def test_suffix() -> None:
    assert image_suffix(Path("A.NII.GZ")) == ".nii.gz"
    assert image_suffix(Path("a.nii")) == ".nii"
    assert image_suffix(Path("a.gz")) is None


@pytest.mark.parametrize("zip_it", [False, True])
@pytest.mark.parametrize(
    ("form", "at", "values", "reason"),
    [
        ("<3h", 42, (24, 20, 13), "truncated: the header promises 12832 bytes"),
        (
            "<3h",
            42,
            (30000, 30000, 30000),
            "promises 27000000000000 voxels .50291.4 GiB., the limit is 4",
        ),
        ("<h", 46, (0,), "size"),
        ("<h", 46, (-5,), "size"),
        ("<f", 88, (0.0,), "not positive"),
        ("<f", 84, (-2.0,), "not positive"),
        ("<f", 80, (float("nan"),), "not positive"),
        ("<h", 40, (9,), "9 dimensions"),
        ("<h", 70, (128,), "RGB"),
        ("<h", 70, (32,), "complex"),
        ("<h", 70, (1,), "unsupported"),
        ("<i", 344, (0x78787878,), "content is unknown"),
    ],
)
def test_nifti_header(
    nifti: Path, zip_it: bool, form: str, at: int, values: tuple[float, ...], reason: str
) -> None:
    path = patched(nifti, form, at, *values)
    with pytest.raises(UnreadableVolume, match=reason):
        read_volume(zipped(path) if zip_it else path)


def test_small_gzip_cannot_promise_much(nifti: Path) -> None:
    packed = zipped(patched(nifti, "<3h", 42, 1000, 1000, 1000))
    with pytest.raises(UnreadableVolume, match="promises 2000000000 bytes of voxels, the file has"):
        check_file(packed)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha"])
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.98])
def test_truncated(
    tmp_path: Path, write_image: Writer, hu: np.ndarray, name: str, keep: float
) -> None:
    path = write_image(tmp_path / name, hu)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UnreadableVolume):
        read_volume(path)


def test_corrupt_gzip(tmp_path: Path, write_image: Writer, hu: np.ndarray) -> None:
    path = write_image(tmp_path / "a.nii.gz", hu)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UnreadableVolume, match="corrupt"):
        read_volume(path)


def test_stored_type_is_the_files(nifti: Path) -> None:
    assert check_file(nifti).stored_type == "int16"


def test_big_endian(nifti: Path) -> None:
    """A header of the other byte order is understood: its sizes are checked too."""
    data = bytearray(348)
    struct.pack_into(">i", data, 0, 348)
    struct.pack_into(">8h", data, 40, 3, 4, 5, 6, 1, 1, 1, 1)
    struct.pack_into(">2h", data, 70, 4, 16)
    struct.pack_into(">8f", data, 76, 1, 1, 1, 1, 0, 0, 0, 0)
    struct.pack_into(">f", data, 108, 352.0)
    data[344:348] = b"n+1\0"
    nifti.write_bytes(bytes(data) + bytes(4 + 240))
    check_file(nifti)
    nifti.write_bytes(bytes(data) + bytes(4 + 238))
    with pytest.raises(UnreadableVolume, match="promises 592 bytes"):
        check_file(nifti)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("a.nii.gz", "b.nrrd"), ("a.nrrd", "b.nii.gz"), ("a.mha", "b.nii"), ("a.nii", "b.mha")],
)
def test_wrong_suffix(
    tmp_path: Path, write_image: Writer, hu: np.ndarray, name: str, wrong: str
) -> None:
    path = write_image(tmp_path / name, hu).rename(tmp_path / wrong)
    with pytest.raises(UnreadableVolume, match="but the content is"):
        read_volume(path)


@pytest.mark.parametrize("text", ["", "hello, this is not an image\n" * 20])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.mhd"])
def test_no_image(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UnreadableVolume, match="empty" if not text else "unknown"):
        read_volume(tmp_path / name)


def test_promise() -> None:
    here = Path(__file__)
    check_promise(here, (10, 10, 10), 2)
    with pytest.raises(UnreadableVolume, match="the limit is 4 GiB"):
        check_promise(here, (MAX_BYTES, 1, 1), 2)
    with pytest.raises(UnreadableVolume, match="the limit is"):
        check_promise(here, (2**62, 2**62, 2**62), 8)
    with pytest.raises(UnreadableVolume, match="size"):
        check_promise(here, (10, 0, 10), 1)
    with pytest.raises(UnreadableVolume, match="size"):
        check_promise(here, (-10, -1, 10), 1)
    size = here.stat().st_size
    check_promise(here, (size - 9,), 1, packed=False, before=9)
    with pytest.raises(UnreadableVolume, match="truncated or corrupt"):
        check_promise(here, (size - 8,), 1, packed=False, before=9)


def test_limit_is_the_callers(nifti: Path) -> None:
    need = 12 * 20 * 24 * 2
    assert read_volume(nifti, max_bytes=need).hu.shape == (12, 20, 24)
    with pytest.raises(UnreadableVolume, match="max_gib"):
        read_volume(nifti, max_bytes=need - 1)


def meta(path: Path, old: str, new: str) -> Path:
    data = path.read_bytes()
    assert old.encode() in data
    path.write_bytes(data.replace(old.encode(), new.encode(), 1))
    return path


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("ElementSpacing = 1 ", "ElementSpacing = 0 ", "not positive"),
        ("ElementSpacing = 1 ", "ElementSpacing = -1 ", "not positive"),
        ("DimSize = 24 20 12", "DimSize = 24 20 1200", "truncated or corrupt"),
        ("DimSize = 24 20 12", "DimSize = 24 20000 200000", "the limit"),
        ("DimSize = 24 20 12", "DimSize = 2400 2000 400", "the file has"),
    ],
)
def test_meta_header(
    tmp_path: Path, write_image: Writer, hu: np.ndarray, old: str, new: str, reason: str
) -> None:
    path = write_image(tmp_path / "a.mha", hu, compress=False)
    with pytest.raises(UnreadableVolume, match=reason):
        read_volume(meta(path, old, new))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("../a.raw", "not in the header's folder"), ("other.raw", "missing"), ("LIST", "one data"),
     ("slice%03d.raw 1 9 1", "one data")],
)  # fmt: skip
def test_mhd_data_file(
    tmp_path: Path, write_image: Writer, hu: np.ndarray, name: str, reason: str
) -> None:
    path = write_image(tmp_path / "a.mhd", hu, compress=False)
    assert meta_data_file(path) == tmp_path / "a.raw"
    with pytest.raises(UnreadableVolume, match=reason):
        read_volume(meta(path, "a.raw", name))


def test_mhd_short_data(tmp_path: Path, write_image: Writer, hu: np.ndarray) -> None:
    path = write_image(tmp_path / "a.mhd", hu, compress=False)
    raw = tmp_path / "a.raw"
    raw.write_bytes(raw.read_bytes()[:-2])
    with pytest.raises(UnreadableVolume, match="truncated or corrupt"):
        read_volume(path)


def test_shear() -> None:
    assert shear_angle(np.diag([1.0, -2.0, 3.0])) == 0
    tilted = np.array([[1, 0, 0], [0, 1, np.tan(np.radians(12))], [0, 0, 1.0]])
    assert shear_angle(tilted) == pytest.approx(12)
    for bad in (0.0, np.nan, np.inf):
        with pytest.raises(UnreadableVolume, match="axes"):
            shear_angle(np.diag([1.0, 2.0, bad]))


def test_data_files_elsewhere(tmp_path: Path, write_image: Writer, hu: np.ndarray) -> None:
    """No header reads a file of another folder, or names one where it must not."""
    outside = write_image(tmp_path / "secret.mhd", hu, compress=False).with_suffix(".raw")
    path = write_image(tmp_path / "in/a.mhd", hu, compress=False)
    (tmp_path / "in/a.raw").unlink()
    (tmp_path / "in/a.raw").symlink_to(outside)
    with pytest.raises(UnreadableVolume, match="a link out of"):
        read_volume(path)
    mha = write_image(tmp_path / "in/b.mha", hu, compress=False)
    with pytest.raises(UnreadableVolume, match="one data file beside"):
        read_volume(meta(mha, "ElementDataFile = LOCAL", "ElementDataFile = a.raw"))


@pytest.mark.parametrize("field", ["data file", "datafile", "Data File", "DATAFILE"])
@pytest.mark.parametrize("colon", [":", ": ", " : "])
def test_detached_nrrd(
    tmp_path: Path, write_image: Writer, hu: np.ndarray, field: str, colon: str
) -> None:
    path = write_image(tmp_path / "a.nrrd", hu)
    with pytest.raises(UnreadableVolume, match="another file"):
        read_volume(meta(path, "type: short", f"type: short\n{field}{colon}../secret.raw"))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("sizes: 24 20 12", "sizes: 24 20 1200", "truncated or corrupt"),
        ("sizes: 24 20 12", "sizes: 24 20000 2000000", "the limit"),
        ("sizes: 24 20 12", "sizes: 24 20 x", "no list of whole numbers"),
        ("sizes: 24 20 12", "sizes: 24 20", "of dimension 3 has"),
        ("sizes: 24 20 12", "sizes: 24 20 -12", "the header says size"),
        ("type: short", "type: block", "not scalar CT"),
        ("type: short", "type: short\ntype: double", "twice"),
        ("type: short", "content: x", "without the field 'type'"),
        ("encoding: raw", "encoding: bz2", "store it raw or gzip"),
        ("encoding: raw", "encoding: raw\nbyte skip: -1", "skip"),
    ],
)
def test_nrrd_header(
    tmp_path: Path, write_image: Writer, hu: np.ndarray, old: str, new: str, reason: str
) -> None:
    path = write_image(tmp_path / "a.nrrd", hu, compress=False)
    check_nrrd(path)
    with pytest.raises(UnreadableVolume, match=reason):
        read_volume(meta(path, old, new))


@pytest.mark.timeout(60)
def test_damaged_stream_of_meta_image(tmp_path: Path, write_image: Writer, hu: np.ndarray) -> None:
    """ITK's reader goes round for ever where the packed voxels do not unpack to what is promised."""
    path = write_image(tmp_path / "a.mha", hu)
    sound = path.read_bytes()
    start = sound.index(b"LOCAL\n") + 6
    for spoilt in (
        sound[:start] + b"x = 1 0 0 0 1\n" + sound[start:],
        sound[:start] + zlib.compress(hu[:-1].tobytes()),
        sound[:start] + zlib.compress(hu.tobytes() + b"more"),
        sound[:-20],
    ):
        path.write_bytes(spoilt)
        with pytest.raises(UnreadableVolume, match="truncated or corrupt"):
            read_volume(path)
