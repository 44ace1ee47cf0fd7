from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from medspark.data import dicom
from medspark.data.io import UnreadableVolume, read_volume
from medspark.data.phantom import kept_locale
from medspark.data.pixels import without_padding

from .dicom_files import plain_slice, rle


@pytest.fixture
def stored() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 2000, (4, 8, 10)).astype(np.uint16)


def series(folder: Path, stored: np.ndarray, tags: dict | None = None) -> Path:
    for z, plane in enumerate(stored):
        plain_slice(folder / f"{z}", plane, 2.5 * z, tags=tags or {})
    return folder


def test_plain_series(tmp_path: Path, stored: np.ndarray) -> None:
    volume = read_volume(series(tmp_path, stored))
    np.testing.assert_array_equal(volume.hu, stored.astype(int) - 1024)
    assert volume.warnings == []


@pytest.mark.parametrize(("compressor", "end"), [("JPEG2000", "4.90"), ("JPEG", "4.70")])
def test_compressed_slices(tmp_path: Path, stored: np.ndarray, compressor: str, end: str) -> None:
    """Lossless syntaxes give the same voxels."""
    for z, plane in enumerate(stored):
        writer = sitk.ImageFileWriter()
        writer.SetFileName(str(tmp_path / "packed.dcm"))
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
        with kept_locale():
            writer.Execute(sitk.GetImageFromArray(plane[None]))
        syntax = dicom.read_tags(tmp_path / "packed.dcm")[dicom.TRANSFER_SYNTAX]
        assert syntax.endswith(f".{end}")
        packed = (tmp_path / "packed.dcm").read_bytes()
        packed = packed[packed.index(b"\xe0\x7f\x10\x00") :]
        path = plain_slice(tmp_path / f"s/{z}", plane, 2.5 * z, syntax=syntax)
        data = path.read_bytes()
        path.write_bytes(data[: data.index(b"\xe0\x7f\x10\x00")] + packed)
    np.testing.assert_array_equal(read_volume(tmp_path / "s").hu, stored.astype(int) - 1024)


def test_rle(tmp_path: Path, stored: np.ndarray) -> None:
    for z, plane in enumerate(stored):
        path = plain_slice(tmp_path / f"{z}", plane, 2.5 * z, syntax="1.2.840.10008.1.2.5")
        data = path.read_bytes()
        path.write_bytes(data[: data.index(b"\xe0\x7f\x10\x00")] + rle(plane))
    np.testing.assert_array_equal(read_volume(tmp_path).hu, stored.astype(int) - 1024)


@pytest.mark.parametrize(
    ("end", "name"),
    [("4.201", "HTJ2K"), ("4.110", "JPEG XL"), ("4.102", "video"), ("4.999", "unknown")],
)
def test_syntax_that_cannot_be_decoded(
    tmp_path: Path, stored: np.ndarray, end: str, name: str
) -> None:
    for z, plane in enumerate(stored):
        plain_slice(tmp_path / f"{z}", plane, z, syntax=f"1.2.840.10008.1.2.{end}")
    with pytest.raises(UnreadableVolume, match=rf"{end} \({name}\) cannot be decoded: have the"):
        read_volume(tmp_path)


def test_high_padding_becomes_air(tmp_path: Path, stored: np.ndarray) -> None:
    stored[:, 0, :3] = 65535
    padding = {(0x0028, 0x0120): 65535}
    hu = read_volume(series(tmp_path / "a", stored, padding)).hu
    assert (hu[:, 0, :3] == -1024).all()
    np.testing.assert_array_equal(hu[:, 1:], stored[:, 1:].astype(int) - 1024)
    with pytest.raises(UnreadableVolume, match="are no HU"):
        read_volume(series(tmp_path / "b", stored))


def test_signed_padding(tmp_path: Path) -> None:
    """In implicit VR a padding of -2000 reads 63536: it is no value above all tissue."""
    stored = np.random.default_rng(5).integers(-900, 2000, (4, 8, 10)).astype(np.int16)
    stored[:, 0] = -2000
    tags = {(0x0028, 0x0120): 63536, (0x0028, 0x1052): "0"}
    volume = read_volume(series(tmp_path, stored, tags))
    np.testing.assert_array_equal(volume.hu, np.maximum(stored, -1024))
    item = dicom.Slice.of(tmp_path, {dicom.PADDING: "63536", dicom.PIXEL_SIGNED: "1"})
    raised = np.full((2, 2), 63536, np.int32)
    np.testing.assert_array_equal(without_padding(item, raised), raised)
    unsigned = dicom.Slice.of(tmp_path, {dicom.PADDING: "63536", dicom.PIXEL_SIGNED: "0"})
    assert (without_padding(unsigned, raised) == -1024).all()


def test_padding_value_of_tissue_is_not_believed(tmp_path: Path, stored: np.ndarray) -> None:
    """A PixelPaddingValue that stands for soft tissue would punch holes into the body."""
    hu = read_volume(series(tmp_path, stored, {(0x0028, 0x0120): 1064})).hu
    np.testing.assert_array_equal(hu, stored.astype(int) - 1024)


def test_missing_rescale(tmp_path: Path, stored: np.ndarray) -> None:
    none = {(0x0028, 0x1052): None, (0x0028, 0x1053): None}
    volume = read_volume(series(tmp_path, stored, none))
    np.testing.assert_array_equal(volume.hu, stored)
    assert any("no RescaleIntercept tag" in w for w in volume.warnings)
    assert any("does not look like HU" in w for w in volume.warnings)
    plain_slice(tmp_path / "2", stored[2], 5.0)
    with pytest.raises(UnreadableVolume, match="3 of 4 slices lack RescaleIntercept"):
        read_volume(tmp_path)


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({(0x0028, 0x1053): "0"}, "RescaleSlope is 0"),
        ({(0x0028, 0x0100): 20}, "16 bits stored in 20"),
        ({(0x0028, 0x0103): 7}, "PixelRepresentation is 7"),
        ({(0x0028, 0x1054): "OD"}, "'OD' .RescaleType., not HU"),
        ({(0x0028, 0x0004): "PALETTE COLOR"}, "palette"),
        ({(0x0028, 0x0004): "MONOCHROME1"}, "inverted"),
        ({(0x0008, 0x0060): "PT"}, "modality PT"),
        ({(0x0008, 0x0008): "DERIVED\\SECONDARY\\SCREEN SAVE"}, "screen capture"),
        ({(0x0008, 0x0008): "DERIVED\\PRIMARY\\MIP"}, "projection"),
        ({(0x0020, 0x0037): "1\\0\\0\\1\\0\\0"}, "no pair of unit vectors"),
        ({(0x0020, 0x0037): "0\\0\\0\\0\\0\\0"}, "no pair of unit vectors"),
        ({(0x0028, 0x0030): "1\\0"}, "must be positive"),
        ({(0x0028, 0x0030): "1"}, "not 2 numbers"),
        ({(0x0028, 0x0030): None}, "PixelSpacing lack"),
        ({(0x0020, 0x0032): None}, "ImagePositionPatient"),
    ],
)
def test_refused_tags(tmp_path: Path, stored: np.ndarray, tags: dict, reason: str) -> None:
    with pytest.raises(UnreadableVolume, match=reason):
        read_volume(series(tmp_path, stored, tags))


def test_lossy_is_said(tmp_path: Path, stored: np.ndarray) -> None:
    assert read_volume(series(tmp_path, stored, {(0x0028, 0x2110): "01"})).warnings == [
        "lossy compressed: HU are approximate"
    ]


def test_limit_of_a_series(tmp_path: Path, stored: np.ndarray) -> None:
    series(tmp_path, stored)
    assert read_volume(tmp_path, max_bytes=4 * stored.size).hu.shape == stored.shape
    with pytest.raises(UnreadableVolume, match="max_gib"):
        read_volume(tmp_path, max_bytes=4 * stored.size - 1)


def test_no_name_in_reasons(tmp_path: Path, stored: np.ndarray) -> None:
    """What a broken header holds in place of a number may be a name."""
    series(tmp_path / "DOE_JANE", stored, {(0x0028, 0x0030): "DOE^JANE"})
    with pytest.raises(UnreadableVolume) as caught:
        read_volume(tmp_path / "DOE_JANE")
    assert "DOE" not in caught.value.reason
