"""DICOMDIR: what the index of a disc lists, and whether the files are there.

Files are found by walking the folder and reading their content, so the index is never followed:
it can only tell what is missing. Format: DICOM PS3.3 annex F.
"""

from __future__ import annotations

from pathlib import Path, PureWindowsPath

from medspark.data.multiframe import DIRECTORY_RECORDS, REFERENCED_FILE, read_tree


def describe_dicomdir(path: Path) -> str:
    """One line for the manifest: how many files the index lists, and how many are not there.

    References with "..", an absolute path or a link that leave the folder are counted, not opened.

    Raises:
        UnreadableVolume: If the file is broken.
    """
    records = read_tree(path, DIRECTORY_RECORDS).get(DIRECTORY_RECORDS, [])
    names = [r.get(REFERENCED_FILE) for r in records if isinstance(r, dict)]
    listed = [name for name in names if isinstance(name, str) and name]
    outside = missing = 0
    root = path.parent.resolve()
    for name in listed:
        parts = name.split("\\")
        if any(p in ("", ".", "..") or "/" in p or PureWindowsPath(p).drive for p in parts):
            outside += 1
        else:
            found = root.joinpath(*parts)
            if not found.resolve().is_relative_to(root):
                outside += 1
            elif not found.is_file():
                missing += 1
    text = f"DICOMDIR, an index of {len(listed)} files"
    text += f"; {missing} of them missing: the export is incomplete" if missing else ""
    return text + (f"; {outside} outside of its folder, not followed" if outside else "")
