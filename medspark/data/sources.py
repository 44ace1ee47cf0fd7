"""What in a folder may be a CT volume: image files, and DICOM files grouped into series."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medspark.data import dicom
from medspark.data.headers import UnreadableVolume, image_suffix
from medspark.data.store import hash_text


@dataclass(frozen=True)
class Source:
    """Something in the source folder that may be a volume.

    Attributes:
        files: The file, or the files of one DICOM series.
        name: Path relative to the source folder, see `Record.source`.
        patient: PatientID of a DICOM series, None elsewhere. Identifying.
        series: SeriesInstanceUID, None elsewhere. Identifying.
        status: "ok" for what is to be read, "ignored" for a DICOM object without an image,
            "quarantined" for a DICOM file whose header is broken.
        reason: Why it is not to be read.
    """

    files: tuple[Path, ...]
    name: str
    patient: str | None = None
    series: str | None = None
    status: str = "ok"
    reason: str = ""

    @property
    def id(self) -> str:
        """Name of the volume in the store."""
        return hash_text(self.name)


def find_sources(folder: Path | str) -> list[Source]:
    """List the volumes of a folder tree, sorted by name. Hidden files are passed over.

    Files are taken by suffix (.nii, .nii.gz, .nrrd, .mha, .mhd), or by content where they are
    DICOM, with or without a suffix. DICOM files are grouped by SeriesInstanceUID and slice
    plane, wherever they lie. The .raw file of a .mhd is no source of its own, nor is a DICOMDIR.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder '{folder}'")
    sources, slices = [], []
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if image_suffix(path):
            sources.append(Source((path,), name))
        elif path.suffix.lower() in (".dcm", ".ima") or dicom.is_dicom(path):
            try:
                tags = dicom.read_tags(path)
                if dicom.holds_image(tags):
                    slices.append(dicom.Slice.of(path, tags))
                elif path.name != "DICOMDIR":
                    reason = "DICOM object without an image (structure set, report, ...)"
                    sources.append(Source((path,), name, status="ignored", reason=reason))
            except UnreadableVolume as error:
                sources.append(Source((path,), name, status="quarantined", reason=error.reason))
    return sorted(sources + _series_sources(folder, slices), key=lambda source: source.name)


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in sorted(files):
            path = Path(root, file)
            if not file.startswith(".") and path.is_file():
                yield path


def _series_sources(folder: Path, slices: Iterable[dicom.Slice]) -> list[Source]:
    groups = dicom.group_series(slices)
    places = [_place(folder, group) for group in groups]
    shared = Counter(places)
    sources = []
    for group, place in zip(groups, places, strict=True):
        tags = group[0].tags
        name = place
        if shared[place] > 1:
            axes = "" if group[0].axes is None else np.array2string(group[0].axes, precision=1)
            name = f"{place}#{hash_text(tags.get(dicom.SERIES_UID, '') + axes, 8)}"
        files = tuple(item.path for item in group)
        patient, series = tags.get(dicom.PATIENT_ID), tags.get(dicom.SERIES_UID)
        sources.append(Source(files, name, patient or None, series or None))
    return sources


def _place(folder: Path, group: Sequence[dicom.Slice]) -> str:
    if len(group) == 1:
        return group[0].path.relative_to(folder).as_posix()
    return Path(os.path.commonpath([s.path.parent for s in group])).relative_to(folder).as_posix()
