from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from medspark.data import dicom
from medspark.data.headers import UnreadableVolume
from medspark.data.series import group_series, series_geometry

SeriesWriter = Callable[..., list[Path]]


def element(group: int, number: int, vr: str, value: bytes, order: str = "<") -> bytes:
    """One data element; implicit VR for an empty `vr`."""
    head = struct.pack(order + "HH", group, number)
    if not vr:
        return head + struct.pack(order + "I", len(value)) + value
    if vr in ("OB", "OW", "SQ", "UN", "UT"):
        return head + vr.encode() + b"\0\0" + struct.pack(order + "I", len(value)) + value
    return head + vr.encode() + struct.pack(order + "H", len(value)) + value


def data_set(implicit: bool, order: str) -> bytes:
    """Rows after a nested sequence of undefined length that holds a decoy Rows."""

    def vr(name: str) -> str:
        return "" if implicit else name

    decoy = element(0x28, 0x10, vr("US"), struct.pack(order + "H", 999), order)
    item = struct.pack(order + "HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    ends = struct.pack(order + "HHIHHI", 0xFFFE, 0xE00D, 0, 0xFFFE, 0xE0DD, 0)
    sequence = struct.pack(order + "HH", 0x08, 0x1140)
    sequence += b"" if implicit else b"SQ\0\0"
    sequence += struct.pack(order + "I", 0xFFFFFFFF)
    return b"".join(
        [
            element(0x08, 0x60, vr("CS"), b"CT", order),
            sequence + item + decoy + ends,
            element(0x28, 0x10, vr("US"), struct.pack(order + "H", 7), order),
            element(0x7FE0, 0x10, vr("OW"), b"\0\0" * 4, order),
        ]
    )


def part10(syntax: str, body: bytes) -> bytes:
    return b"\0" * 128 + b"DICM" + element(2, 0x10, "UI", syntax.encode()) + body


@pytest.mark.parametrize(
    ("syntax", "implicit", "order"),
    [("1.2.840.10008.1.2", True, "<"), ("1.2.840.10008.1.2.1", False, "<"),
     ("1.2.840.10008.1.2.2", False, ">")],
)  # fmt: skip
def test_transfer_syntaxes(tmp_path: Path, syntax: str, implicit: bool, order: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(part10(syntax, data_set(implicit, order)))
    tags = dicom.read_tags(path)
    assert dicom.is_dicom(path)
    assert tags[dicom.MODALITY] == "CT"
    assert tags[dicom.ROWS] == "7"


def test_deflated_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(part10("1.2.840.10008.1.2.1.99", b"zz"))
    with pytest.raises(UnreadableVolume, match="Deflated"):
        dicom.read_tags(path)


def test_bare_data_set(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(data_set(True, "<"))
    assert dicom.is_dicom(path)
    assert dicom.read_tags(path)[dicom.ROWS] == "7"


@pytest.mark.parametrize("length", [0, 100, 132, 140, 150, 180])
def test_cut_header(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(part10("1.2.840.10008.1.2.1", data_set(False, "<"))[:length])
    with pytest.raises(UnreadableVolume, match="broken DICOM header"):
        dicom.read_tags(path)


def test_tags_are_those_of_itk(real_data: Path) -> None:
    wanted = [dicom.MODALITY, dicom.PATIENT_ID, dicom.SERIES_UID, dicom.POSITION,
              dicom.ORIENTATION, dicom.PIXEL_SPACING, dicom.IMAGE_TYPE, dicom.SOP_CLASS]  # fmt: skip
    folders = [*(real_data / "ct/dicom").iterdir(), real_data / "awkward/mr_mislabelled_as_ct"]
    files = [sorted(p for p in folder.iterdir() if p.is_file())[0] for folder in folders]
    files += sorted((real_data / "awkward").glob("*.dcm"))
    assert len(files) >= 9
    for path in files:
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        tags = dicom.read_tags(path)
        for tag in wanted:
            key = f"{tag[0]:04x}|{tag[1]:04x}"
            theirs = reader.GetMetaData(key).strip() if reader.HasMetaDataKey(key) else ""
            assert tags.get(tag, "") == theirs, (path.name, key)


def test_kinds_without_image() -> None:
    for uid in ("1.2.840.10008.1.3.10", "1.2.840.10008.5.1.4.1.1.481.3",
                "1.2.840.10008.5.1.4.1.1.88.11"):  # fmt: skip
        assert not dicom.holds_image({dicom.SOP_CLASS: uid})
    assert dicom.holds_image({dicom.SOP_CLASS: "1.2.840.10008.5.1.4.1.1.2"})
    assert dicom.holds_image({})


def slice_at(z: float, uid: str = "1", axes: str = "1\\0\\0\\0\\1\\0", y: float = 0) -> dicom.Slice:
    tags = {dicom.POSITION: f"5\\{y}\\{z}", dicom.ORIENTATION: axes, dicom.SERIES_UID: uid,
            dicom.PIXEL_SPACING: "2\\1"}  # fmt: skip
    return dicom.Slice.of(Path(f"{z}.dcm"), tags)


def test_groups() -> None:
    sagittal = "0\\1\\0\\0\\0\\-1"
    items = [slice_at(0, "a"), slice_at(0, "b"), slice_at(1, "a"), slice_at(0, "a", sagittal)]
    groups = group_series(items)
    assert groups == [[items[0], items[2]], [items[1]], [items[3]]]


def test_geometry_by_position() -> None:
    items = [slice_at(z) for z in (4, -2, 1, 7)]
    grid = series_geometry(items)
    assert [s.path.name for s in grid.order] == ["-2.dcm", "1.dcm", "4.dcm", "7.dcm"]
    np.testing.assert_allclose(grid.spacing, [1, 2, 3])
    np.testing.assert_allclose(grid.origin, [5, 0, -2])
    np.testing.assert_array_equal(grid.direction, np.eye(3))
    assert grid.tilt == 0


def test_downward_normal_sorts_downwards() -> None:
    grid = series_geometry([slice_at(z, axes="1\\0\\0\\0\\-1\\0") for z in (0, 2, 4)])
    assert grid.origin[2] == 4
    np.testing.assert_array_equal(grid.direction[:, 2], [0, 0, -1])


def test_tilt_is_measured() -> None:
    grid = series_geometry([slice_at(z, y=z * np.tan(np.radians(20))) for z in (0, 5, 10)])
    assert grid.tilt == pytest.approx(20)
    assert grid.spacing[2] == pytest.approx(5)


@pytest.mark.parametrize(
    ("places", "reason"),
    [
        ((0, 3, 6, 12, 15), r"1 slice\(s\) missing: step 6.000 mm after slice 3"),
        ((0, 3, 6, 15, 18), r"2 slice\(s\) missing"),
        ((0, 3, 6, 9.1, 12), "uneven slice spacing"),
        ((0, 3, 3, 6), "1 of 4 slices repeat a position with other pixels"),
        ((0, 3, 0, 3, 0, 3), "4D series: 3 images at each of 2 positions"),
        ((0, 3, 6, 3, 6), "2 of 5 slices repeat"),
    ],
)
def test_bad_steps(places: tuple[float, ...], reason: str) -> None:
    with pytest.raises(UnreadableVolume, match=reason):
        series_geometry([slice_at(z) for z in places])


def test_one_percent_is_allowed() -> None:
    assert series_geometry([slice_at(z) for z in (0, 3, 6.02, 9)]).spacing[2] == 3


@pytest.mark.parametrize(
    ("tag", "text"), [(dicom.POSITION, "1\\2"), (dicom.POSITION, "1\\x\\3"),
                      (dicom.ORIENTATION, "1\\0\\0\\0\\nan\\0")],
)  # fmt: skip
def test_bad_numbers(tag: tuple[int, int], text: str) -> None:
    with pytest.raises(UnreadableVolume, match="holds"):
        dicom.Slice.of(Path("a"), {tag: text})


@pytest.mark.parametrize(
    "tags", [{}, {dicom.POSITION: "0\\0\\0", dicom.ORIENTATION: "1\\0\\0\\0\\1\\0"}]
)
def test_missing_geometry(tags: dict[tuple[int, int], str]) -> None:
    with pytest.raises(UnreadableVolume, match="lack"):
        series_geometry([dicom.Slice.of(Path("a"), tags)])
