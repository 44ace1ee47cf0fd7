from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from medspark.data import dicom
from medspark.data.io import UnreadableVolume, read_volume
from medspark.data.multiframe import pixel_data_place, read_tree
from medspark.data.phantom import kept_locale

from .dicom_files import element, enhanced, image_tags, write

PLACES = [(10.0, 20.0, 30.0 + 3 * z) for z in range(5)]
SCALES = [(1.0, -1024.0), (1.0, -1000.0), (2.0, -1024.0), (0.5, -900.0), (1.0, 0.0)]


@pytest.fixture
def stored() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 2000, (5, 8, 11)).astype(np.uint16)


def expected(stored: np.ndarray, scales: list[tuple[float, float]]) -> np.ndarray:
    planes = [np.rint(s * p.astype(float) + b) for p, (s, b) in zip(stored, scales, strict=True)]
    return np.maximum(np.array(planes), -1024)


def test_enhanced_ct(tmp_path: Path, stored: np.ndarray) -> None:
    """Each frame by its own position and rescale, whatever the order of the frames."""
    order = [3, 0, 4, 1, 2]
    path = enhanced(
        tmp_path / "a.dcm", stored[order], [PLACES[i] for i in order], [SCALES[i] for i in order]
    )
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.hu, expected(stored, SCALES))
    assert volume.spacing == (3.0, 2.0, 1.0)
    assert volume.origin == (10.0, 20.0, 30.0)
    assert (volume.patient, volume.series, volume.modality) == ("MRN4711", "1.2.3.4", "CT")


def test_signed_and_high_bits(tmp_path: Path) -> None:
    """12 of 16 bits: what stands above them is no part of the value."""
    values = np.random.default_rng(3).integers(-2000, 2000, (3, 9, 8)).astype(np.int16)
    values[:, 0, 0] = -900
    stored = ((values & 0x0FFF) | 0x7000).astype(np.int16)
    bits = {(0x0028, 0x0101): 12, (0x0028, 0x0102): 11}
    path = enhanced(tmp_path / "a.dcm", stored, PLACES[:3], [(1, 0)] * 3, tags=bits)
    np.testing.assert_array_equal(read_volume(path).hu, np.maximum(values, -1024))


@pytest.mark.parametrize("compressor", ["JPEG2000", "JPEG"])
@pytest.mark.parametrize("scales", [[(1.0, -1024.0)] * 5, SCALES])
def test_compressed_frames(
    tmp_path: Path, stored: np.ndarray, compressor: str, scales: list[tuple[float, float]]
) -> None:
    """The toolkit would apply the first frame's rescale to all: it is not left to it."""
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(tmp_path / "packed.dcm"))
    writer.UseCompressionOn()
    writer.SetCompressor(compressor)
    with kept_locale():
        writer.Execute(sitk.GetImageFromArray(stored))
    start, packed = pixel_data_place(tmp_path / "packed.dcm")
    assert packed
    syntax = dicom.read_tags(tmp_path / "packed.dcm")[dicom.TRANSFER_SYNTAX]
    pixels = (tmp_path / "packed.dcm").read_bytes()[start:]
    path = enhanced(tmp_path / "a.dcm", stored, PLACES, scales, syntax=syntax, packed=pixels)
    np.testing.assert_array_equal(read_volume(path).hu, expected(stored, scales))


def test_repeated_positions_are_4d(tmp_path: Path, stored: np.ndarray) -> None:
    places = [PLACES[0], PLACES[1]] * 2
    path = enhanced(tmp_path / "a.dcm", stored[:4], places, [(1, -1024)] * 4)
    with pytest.raises(UnreadableVolume, match="4D series: 2 images at each of 2 positions"):
        read_volume(path)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({(0x0008, 0x0060): "MR"}, "modality MR"),
        ({(0x0028, 0x0008): "9"}, "NumberOfFrames is 9, there are 5"),
        ({(0x0028, 0x0008): "x"}, "holds no whole number"),
        ({(0x0028, 0x0010): 9}, "truncated"),
        ({(0x0028, 0x0010): 65535, (0x0028, 0x0011): 65535}, "the limit is 4 GiB"),
        ({(0x0028, 0x0101): 17}, "17 bits stored in 16"),
        ({(0x0028, 0x0101): 0}, "0 bits stored in 16"),
        ({(0x0008, 0x0008): "DERIVED\\PRIMARY\\PERFUSION\\CBF"}, "parametric map"),
        ({(0x0008, 0x0008): "ORIGINAL\\PRIMARY\\LOCALIZER"}, "localizer"),
        ({(0x5200, 0x9230): []}, "without per-frame positions"),
    ],
)
def test_refused(tmp_path: Path, stored: np.ndarray, tags: dict, reason: str) -> None:
    path = enhanced(tmp_path / "a.dcm", stored, PLACES, [(1, -1024)] * 5, tags=tags)
    with pytest.raises(UnreadableVolume, match=reason):
        read_volume(path)


def test_other_units(tmp_path: Path, stored: np.ndarray) -> None:
    path = enhanced(tmp_path / "a.dcm", stored, PLACES, [(1, -1024)] * 5)
    path.write_bytes(path.read_bytes().replace(b"HU", b"OD"))
    with pytest.raises(UnreadableVolume, match=r"in 'OD' .RescaleType., not HU"):
        read_volume(path)


def test_no_pixels(tmp_path: Path, stored: np.ndarray) -> None:
    path = write(tmp_path / "a.dcm", image_tags(stored))
    with pytest.raises(UnreadableVolume):
        read_volume(path)
    with pytest.raises(UnreadableVolume, match=r"broken DICOM header|no pixel data"):
        pixel_data_place(path)


def test_nesting_has_an_end(tmp_path: Path) -> None:
    inside: dict = {}
    for _ in range(30):
        inside = {(0x5200, 0x9229): [inside]}
    path = write(tmp_path / "a.dcm", inside)
    with pytest.raises(UnreadableVolume, match="nested deeper"):
        read_tree(path, (0x5200, 0x9230))


@pytest.mark.parametrize("length", [40, 10**6, 2**32 - 2])
def test_lengths_that_lie(tmp_path: Path, length: int) -> None:
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 8) + element((0x0020, 0x0032), "")
    group = struct.pack("<HH2sHI", 0x5200, 0x9229, b"SQ", 0, length)
    path = write(tmp_path / "a.dcm", {}, after=group + item)
    with pytest.raises(UnreadableVolume, match="broken DICOM header"):
        read_tree(path, (0x5200, 0x9230))


def test_real_multiframe_capture(real_data: Path) -> None:
    """Its frames run downwards; the voxels are those of ITK, turned."""
    path = real_data / "awkward/multiframe_sc_ct_phantom.dcm"
    volume = read_volume(path)
    theirs = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    np.testing.assert_array_equal(volume.hu, theirs[::-1])
    assert volume.spacing == (4.0, 1.023438, 1.023438)
    assert volume.origin[2] == -480
