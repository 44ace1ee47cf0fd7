from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from medspark.data.io import UnreadableVolume, read_volume
from medspark.data.phantom import kept_locale

Writer = Callable[..., Path]
SeriesWriter = Callable[..., list[Path]]
AWKWARD_OK = {  # entry: words of its warnings, each of which must be said
    "phantom_oblique_uint8.nii.gz": ("8 bits", "not look like HU", "oblique"),
    "phantom_sheared_affine.nii.gz": ("sheared", "straightened", "8 bits"),
    "head_no_intercept.nii.gz": ("not look like HU",),
    "chest_8bit_windowed.nii.gz": ("8 bits", "not look like HU"),
    "head_template_cormack_units.nii": ("not look like HU",),
    "not_ct_pet_sts002.nii.gz": ("not look like HU",),
    "not_ct_mr_t1_sts002.nii.gz": ("not look like HU",),
    "not_ct_mr_totalseg.nii.gz": ("not look like HU",),
    "mr_mislabelled_as_ct": ("not look like HU",),
    "chest_two_slices.nrrd": (),
    "chest_minimal_tags": ("no Modality", "below -1024"),
    "ct_folder_with_rtstruct": (),
    "multiframe_sc_ct_phantom.dcm": (),
}
AWKWARD_REFUSED = {  # entry: the reason
    "head_gantry_tilt_irregular": "uneven slice spacing",
    "phantom_mixed_series": "4 series or slice planes",
    "enhanced_ct_perfusion_map.dcm": "a parametric map, not HU",
    "dicom_4d_tiny": "19 series",
    "ct_perfusion_rgb.nii.gz": "RGB",
    "mr_complex64.nii.gz": "complex",
    "chest_one_slice_patch.nrrd": "1 slice",
    "pancreas_j2k_one_slice.dcm": "1 slice",
    "head_j2k_pixelrep_mismatch.dcm": "1 slice",
    "ct_small_one_slice.dcm": "1 slice",
    "dicomdir_mixed_modalities": "no DICOM image",
}


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.mhd"])
def test_formats(tmp_path: Path, write_image: Writer, hu: np.ndarray, name: str) -> None:
    volume = read_volume(write_image(tmp_path / name, hu), patient="p")
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.hu.dtype == np.int16
    assert volume.spacing == (3.0, 2.0, 1.0)
    assert (volume.orientation, volume.stored_type, volume.patient) == ("LPS", "int16", "p")
    assert volume.warnings == []


def test_ras_is_turned(tmp_path: Path, write_image: Writer, hu: np.ndarray) -> None:
    path = write_image(tmp_path / "a.nii.gz", hu, direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.hu, hu[:, ::-1, ::-1])
    assert volume.orientation == "RAS"
    np.testing.assert_allclose(volume.origin, (-23, -38, 0))
    np.testing.assert_array_equal(read_volume(path, canonical=False).hu, hu)


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.float64])
def test_types_are_rounded_to_hu(
    tmp_path: Path, write_image: Writer, hu: np.ndarray, dtype: type
) -> None:
    stored = hu.astype(dtype) + (0.4 if dtype != np.int32 else 0)
    volume = read_volume(write_image(tmp_path / "a.nrrd", stored.astype(dtype)))
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.stored_type == np.dtype(dtype).name


def test_padding_is_set_to_air(tmp_path: Path, write_image: Writer, hu: np.ndarray) -> None:
    hu[0] = -3024
    volume = read_volume(write_image(tmp_path / "a.mha", hu))
    assert (volume.hu[0] == -1024).all()
    np.testing.assert_array_equal(volume.hu[1:], hu[1:])
    assert volume.warnings == [
        "480 voxels below -1024 HU (padding or noise, lowest -3024) set to -1024"
    ]


def spoil(array: np.ndarray, how: str) -> np.ndarray:
    floats = array.astype(np.float32)
    if how in ("nan", "inf"):
        floats[1, 2, 3] = float(how)
    return {
        "nan": floats,
        "inf": floats,
        "constant": np.full_like(array, 40),
        "padding": np.where(array > 0, -2000, -3000).astype(np.int16),
        "huge": array.astype(np.int32) + 40000,
        "slice": array[:1],
        "labels": np.random.default_rng(0).integers(0, 60, (20, 30, 30)).astype(np.uint8),
        "vector": np.stack([array] * 3, axis=-1),
        "complex": array.astype(np.complex64),
        "4d": np.stack([array] * 2),
    }[how]


@pytest.mark.parametrize(
    ("how", "reason"),
    [("nan", "1 NaN or infinite"), ("inf", "1 NaN or infinite"), ("constant", "every voxel is 40"),
     ("padding", "nothing but padding"), ("huge", "are no HU"), ("slice", "1 slice"),
     ("labels", "label map"), ("4d", "4D")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha"])
def test_refused(tmp_path: Path, hu: np.ndarray, name: str, how: str, reason: str) -> None:
    image = sitk.GetImageFromArray(spoil(hu, how), isVector=False)
    with kept_locale():
        sitk.WriteImage(image, str(tmp_path / name))
    with pytest.raises(UnreadableVolume, match=reason) as caught:
        read_volume(tmp_path / name)
    assert caught.value.reason == str(caught.value)


@pytest.mark.parametrize("name", ["a.nii", "a.nrrd"])
def test_complex_is_refused(tmp_path: Path, hu: np.ndarray, name: str) -> None:
    with kept_locale():
        sitk.WriteImage(sitk.GetImageFromArray(spoil(hu, "complex")), str(tmp_path / name))
    with pytest.raises(UnreadableVolume, match=r"complex|vector"):
        read_volume(tmp_path / name)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.nii"])
def test_vectors_are_refused(tmp_path: Path, hu: np.ndarray, name: str) -> None:
    image = sitk.GetImageFromArray(spoil(hu, "vector"), isVector=True)
    with kept_locale():
        sitk.WriteImage(image, str(tmp_path / name))
    with pytest.raises(UnreadableVolume, match=r"vector|dimensions|size|D image"):
        read_volume(tmp_path / name)


def test_min_slices(tmp_path: Path, write_image: Writer, hu: np.ndarray) -> None:
    path = write_image(tmp_path / "a.mha", hu[:3])
    assert read_volume(path, min_slices=3).hu.shape[0] == 3
    with pytest.raises(UnreadableVolume, match=r"3 slice\(s\), at least 4"):
        read_volume(path, min_slices=4)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UnreadableVolume, match="no such file"):
        read_volume(tmp_path / "nothing.nii")


def test_series_is_sorted_and_rescaled(
    tmp_path: Path, write_series: SeriesWriter, hu: np.ndarray
) -> None:
    files = write_series(tmp_path / "s", hu)
    for source in (tmp_path / "s", files, files[::-1], [files[i] for i in (3, 1, 0, 2)]):
        volume = read_volume(source)
        expected = hu if len(volume.hu) == len(hu) else hu[:4]
        np.testing.assert_array_equal(volume.hu, expected)
        assert volume.spacing == (3.0, 2.0, 1.0)
        assert volume.origin == (10.0, 20.0, 30.0)
    assert (volume.modality, volume.patient, volume.series) == ("CT", "someone", "1.2.3.4")


def test_slope_of_each_slice(tmp_path: Path, write_series: SeriesWriter) -> None:
    """Slices that are stored with different intercepts come out on one scale."""
    hu = np.random.default_rng(0).integers(-900, 900, (2, 8, 9)).astype(np.int16)
    a = write_series(tmp_path, hu[:1], intercept=-1024)
    b = write_series(tmp_path / "b", hu, intercept=0)[1]
    np.testing.assert_array_equal(read_volume([*a, b]).hu, hu)


def test_missing_slice(tmp_path: Path, write_series: SeriesWriter, hu: np.ndarray) -> None:
    write_series(tmp_path, hu)[5].unlink()
    with pytest.raises(UnreadableVolume, match=r"1 slice\(s\) missing: step 6.000 mm after"):
        read_volume(tmp_path)


def test_copied_slice_is_left_out(
    tmp_path: Path, write_series: SeriesWriter, hu: np.ndarray
) -> None:
    files = write_series(tmp_path, hu)
    (tmp_path / "copy.dcm").write_bytes(files[4].read_bytes())
    (tmp_path / "again.dcm").write_bytes(files[0].read_bytes())
    volume = read_volume(tmp_path)
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.warnings == ["2 repeated copies of slices left out"]


def test_other_slice_at_the_same_place(
    tmp_path: Path, write_series: SeriesWriter, hu: np.ndarray
) -> None:
    write_series(tmp_path, hu)
    other = write_series(tmp_path / "b", hu[:, ::-1])[4]
    other.rename(tmp_path / "other.dcm")
    with pytest.raises(UnreadableVolume, match="1 of 13 slices repeat a position with other"):
        read_volume(tmp_path)


def test_time_points_are_no_volume(
    tmp_path: Path, write_series: SeriesWriter, hu: np.ndarray
) -> None:
    for time in range(3):
        for path in write_series(tmp_path / "b", hu + time):
            path.rename(tmp_path / f"{time}-{path.name}")
    with pytest.raises(UnreadableVolume, match="4D series: 3 images at each of 12 positions"):
        read_volume(tmp_path)


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_slice(
    tmp_path: Path, write_series: SeriesWriter, hu: np.ndarray, keep: float
) -> None:
    path = write_series(tmp_path, hu)[2]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(UnreadableVolume):
        read_volume(tmp_path)


@pytest.mark.parametrize(
    ("tag", "value", "reason"),
    [("0008|0060", "MR", "modality MR"),
     ("0008|0008", "ORIGINAL\\PRIMARY\\LOCALIZER", "localizer")],
)  # fmt: skip
def test_refused_series(
    tmp_path: Path, write_series: SeriesWriter, hu: np.ndarray, tag: str, value: str, reason: str
) -> None:
    write_series(tmp_path, hu, **{tag: value})
    with pytest.raises(UnreadableVolume, match=reason):
        read_volume(tmp_path)


def test_two_series(tmp_path: Path, write_series: SeriesWriter, hu: np.ndarray) -> None:
    files = write_series(tmp_path / "a", hu) + write_series(tmp_path / "b", hu, uid="1.2.9")
    with pytest.raises(UnreadableVolume, match="2 series"):
        read_volume(files)


def test_patient_differs(tmp_path: Path, write_series: SeriesWriter, hu: np.ndarray) -> None:
    files = write_series(tmp_path / "a", hu[:6])
    files += write_series(tmp_path / "b", hu, patient="another")[6:]
    with pytest.raises(UnreadableVolume, match="patient differs"):
        read_volume(files)


def test_terminal_stays_clean(
    tmp_path: Path, write_image: Writer, hu: np.ndarray, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_image(tmp_path / "a.mha", hu)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UnreadableVolume) as caught:
        read_volume(path)
    assert capfd.readouterr() == ("", "")
    assert str(tmp_path) not in caught.value.reason
    assert "0x" not in caught.value.reason


def test_whole_corpus(real_data: Path) -> None:
    """Size, spacing, orientation, type and range of every volume are the manifest's."""
    with (real_data / "ct/manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 53
    for row in rows:
        volume = read_volume(real_data / "ct" / row["file"])
        size = tuple(int(n) for n in row["size_vox"].split("x"))[::-1]
        spacing = [float(s) for s in row["spacing_mm"].split("x")][::-1]
        assert volume.hu.shape == size, row["file"]
        np.testing.assert_allclose(volume.spacing, spacing, rtol=1e-3, err_msg=row["file"])
        # Of DICOM the manifest has the type after the rescale.
        stored = ("int16", "uint16") if row["file"].startswith("dicom/") else (row["dtype"],)
        assert volume.orientation == row["orientation"]
        assert volume.stored_type in stored
        low, high = max(float(row["min"]), -1024), float(row["max"])
        assert (volume.hu.min(), volume.hu.max()) == (round(low), round(high)), row["file"]


def test_same_voxels_in_two_formats(real_data: Path) -> None:
    ct = real_data / "ct"
    for a, b in (("chest_cip_ct64.nrrd", "dicom/chest_cip_ct64"),
                 ("chest_elastix_lung_small.mha", "mhd/chest_elastix_lung_small.mhd")):  # fmt: skip
        first, second = read_volume(ct / a), read_volume(ct / b)
        np.testing.assert_array_equal(first.hu, second.hu)
        np.testing.assert_allclose(first.spacing, second.spacing, rtol=1e-4)


def test_awkward_files(real_data: Path) -> None:
    """Every entry of the manifest is read with the right warning or refused for the reason."""
    with (real_data / "awkward/manifest.csv").open() as file:
        names = {row["file"] for row in csv.DictReader(file)}
    assert names == set(AWKWARD_OK) | set(AWKWARD_REFUSED)
    for name, words in AWKWARD_OK.items():
        said = " | ".join(read_volume(real_data / "awkward" / name).warnings)
        assert all(word in said for word in words), (name, said)
        assert bool(said) == bool(words), (name, said)
    for name, reason in AWKWARD_REFUSED.items():
        with pytest.raises(UnreadableVolume, match=reason):
            read_volume(real_data / "awkward" / name)


def test_jpeg2000_does_not_wrap(real_data: Path) -> None:
    path = real_data / "awkward/head_j2k_pixelrep_mismatch.dcm"
    volume = read_volume(path, min_slices=1)
    assert (volume.hu.min(), volume.hu.max()) == (-1024, 1896)
    assert "lowest -2000" in volume.warnings[0]
