from __future__ import annotations

from pathlib import Path

import pytest

from medspark.data.dicomdir import describe_dicomdir
from medspark.data.headers import UnreadableVolume
from medspark.data.sources import find_sources

from .dicom_files import write

KIND = {(0x0008, 0x0016): "1.2.840.10008.1.3.10"}


def index(folder: Path, names: list[str]) -> Path:
    records = [{(0x0004, 0x1430): "IMAGE", (0x0004, 0x1500): name} for name in names]
    records.insert(0, {(0x0004, 0x1430): "PATIENT", (0x0010, 0x0010): "DOE^JANE"})
    return write(folder / "DICOMDIR", KIND | {(0x0004, 0x1220): records})


def test_missing_and_outside(tmp_path: Path) -> None:
    disc = tmp_path / "disc"
    (disc / "CT").mkdir(parents=True)
    (disc / "CT/1").write_text("x")
    (tmp_path / "secret").write_text("x")
    (disc / "LINK").symlink_to(tmp_path)
    path = index(disc, ["CT\\1", "CT\\2", "..\\secret", "LINK\\secret", "CT\\..\\..\\secret",
                        "C:\\secret", "\\secret", "../secret"])  # fmt: skip
    assert describe_dicomdir(path) == (
        "DICOMDIR, an index of 8 files; 1 of them missing: the export is incomplete; 6 outside of "
        "its folder, not followed"
    )


def test_row_of_the_index(tmp_path: Path) -> None:
    index(tmp_path, ["CT\\1"])
    (source,) = find_sources(tmp_path)
    assert (source.name, source.status) == ("DICOMDIR", "ignored")
    assert source.reason.startswith("DICOMDIR, an index of 1 files; 1 of them missing")
    assert "DOE" not in source.reason


@pytest.mark.parametrize("cut", [30, 40, 300])
def test_broken_index(tmp_path: Path, cut: int) -> None:
    path = index(tmp_path, ["CT\\1"] * 50)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UnreadableVolume, match="broken DICOM header"):
        describe_dicomdir(path)


def test_real_index(real_data: Path) -> None:
    path = real_data / "awkward/dicomdir_mixed_modalities/DICOMDIR"
    assert describe_dicomdir(path) == "DICOMDIR, an index of 31 files"


@pytest.mark.parametrize("inside", [True, False])
def test_links(tmp_path: Path, inside: bool) -> None:
    """Links within the source folder are read, links out of it get a row with a reason."""
    source = tmp_path / "source"
    home = source if inside else tmp_path
    (home / "files").mkdir(parents=True)
    (home / "files/a.nii").write_text("x")
    source.mkdir(exist_ok=True)
    (source / "link.nii").symlink_to(home / "files/a.nii")
    (source / "folder").symlink_to(home / "files")
    found = {s.name: s for s in find_sources(source)}
    if inside:
        assert found["link.nii"].status == found["files/a.nii"].status == "ok"
        assert found["folder"].status == "ignored"
    else:
        assert {s.status for s in found.values()} == {"quarantined"}
        assert set(found) == {"link.nii", "folder"}
        assert "link out of the source folder" in found["folder"].reason


def test_names_of_any_bytes(tmp_path: Path) -> None:
    (tmp_path / "line\nbreak.nii").write_text("x")
    with open(bytes(tmp_path) + b"/\xff\xfe.nii", "w") as file:
        file.write("x")
    assert [s.name for s in find_sources(tmp_path)] == ["\\xff\\xfe.nii", "line\\x0abreak.nii"]
