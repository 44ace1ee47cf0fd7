from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medspark.data.sources import find_sources

Writer = Callable[..., Path]
SeriesWriter = Callable[..., list[Path]]


def test_by_suffix_and_content(
    tmp_path: Path, write_image: Writer, write_series: SeriesWriter, hu: np.ndarray
) -> None:
    for name in ("b/a.nii", "a.NII.GZ", "c.nrrd", "d.mha", "e.mhd"):
        path = write_image(tmp_path / name.lower(), hu, compress=False)
        path.rename(tmp_path / name)
    for path in write_series(tmp_path / "series", hu[:3]):
        path.rename(path.with_suffix(""))
    for name in ("notes.txt", "table.csv", ".hidden.nii", "picture"):
        (tmp_path / name).write_text("not an image")
    found = find_sources(tmp_path)
    assert [s.name for s in found] == ["a.NII.GZ", "b/a.nii", "c.nrrd", "d.mha", "e.mhd", "series"]
    assert all(s.status == "ok" for s in found)
    assert len(found[-1].files) == 3
    assert (found[-1].patient, found[-1].series) == ("someone", "1.2.3.4")


def test_series_in_one_folder(tmp_path: Path, write_series: SeriesWriter, hu: np.ndarray) -> None:
    for uid in ("1.2.3", "1.2.4"):
        for path in write_series(tmp_path / uid, hu[:3], uid=uid):
            (tmp_path / "all").mkdir(exist_ok=True)
            path.rename(tmp_path / "all" / f"{uid}-{path.name}")
    found = find_sources(tmp_path)
    assert {s.series for s in found} == {"1.2.3", "1.2.4"}
    assert [len(s.files) for s in found] == [3, 3]
    assert all(s.name.startswith("all#") for s in found)
    assert "1.2.3" not in found[0].name + found[1].name


def test_series_over_folders(tmp_path: Path, write_series: SeriesWriter, hu: np.ndarray) -> None:
    for path in write_series(tmp_path / "p" / "one", hu[:4])[:2]:
        (tmp_path / "p" / "two").mkdir(exist_ok=True)
        path.rename(tmp_path / "p" / "two" / path.name)
    (source,) = find_sources(tmp_path)
    assert (source.name, len(source.files)) == ("p", 4)


def test_broken_dicom_is_listed(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(b"\0" * 128 + b"DICM\2\0")
    (tmp_path / "empty.dcm").touch()
    found = find_sources(tmp_path)
    assert [(s.name, s.status) for s in found] == [
        ("a.dcm", "quarantined"),
        ("empty.dcm", "quarantined"),
    ]
    assert "broken DICOM header" in found[0].reason


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_sources(tmp_path / "nothing")


def test_real_folders(real_data: Path, tmp_path: Path) -> None:
    awkward = real_data / "awkward"
    found = {s.name: s for s in find_sources(awkward)}
    assert found["ct_folder_with_rtstruct/RS.dcm"].status == "ignored"
    assert len(found["ct_folder_with_rtstruct"].files) == 6
    mixed = [s for s in found.values() if s.name.startswith("phantom_mixed_series")]
    assert sorted(len(s.files) for s in mixed) == [1, 1, 4, 6]
    assert sum(s.name.startswith("dicom_4d_tiny#") for s in found.values()) == 19
    index = found["dicomdir_mixed_modalities/DICOMDIR"]
    assert (index.status, index.reason) == ("ignored", "DICOMDIR, an index of 31 files")
    assert not any(name.endswith(".raw") for name in found)
    files = [f for s in found.values() for f in s.files]
    assert len(files) == len(set(files))
    shutil.copytree(real_data / "ct/mhd", tmp_path / "mhd")
    assert [s.name for s in find_sources(tmp_path)] == ["mhd/chest_elastix_lung_small.mhd"]
