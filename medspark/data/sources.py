"""What in a folder may be a CT volume: image files, and DICOM files grouped into series."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medspark.data import dicom
from medspark.data.dicomdir import describe_dicomdir
from medspark.data.headers import UnreadableVolume, image_suffix
from medspark.data.series import group_series
from medspark.data.store import hash_text


@dataclass(frozen=True)
class Source:
    """Something in the source folder that may be a volume.

    Attributes:
        files: The file, or the files of one DICOM series.
        name: Path relative to the source folder, see `Record.source`. May be identifying.
        patient: PatientID of a DICOM series, None elsewhere. Identifying.
        series: SeriesInstanceUID, None elsewhere. Identifying.
        status: "ok" for what is to be read, "ignored" for a DICOM object without an image,
            "quarantined" for a DICOM file whose header is broken.
        reason: Why it is not to be read.
        secrets: Patient id and name as in the file. Identifying.
    """

    files: tuple[Path, ...]
    name: str
    patient: str | None = None
    series: str | None = None
    status: str = "ok"
    reason: str = ""
    secrets: tuple[str, ...] = field(default=(), repr=False)


def find_sources(folder: Path | str) -> list[Source]:
    """List the volumes of a folder tree, sorted by name. Hidden files are passed over.

    Files are taken by suffix (.nii, .nii.gz, .nrrd, .mha, .mhd), or by content where they are
    DICOM, with or without a suffix. DICOM files are grouped by SeriesInstanceUID and slice
    plane, wherever they lie. The .raw file of a .mhd is no source of its own. Links
    are followed only if they stay inside the folder.

    Raises:
        FileNotFoundError: If there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder '{folder}'")
    sources: list[Source] = []
    slices: list[dicom.Slice] = []
    for path in _walk(folder):
        name = _name(folder, path)
        outside = _outside(folder, path)
        if outside:
            sources.append(Source((path,), name, status="quarantined", reason=outside))
        elif path.is_dir():
            reason = "a link to a folder inside the source folder: its files are found there"
            sources.append(Source((path,), name, status="ignored", reason=reason))
        elif image_suffix(path):
            sources.append(Source((path,), name))
        elif path.suffix.lower() in (".dcm", ".ima") or dicom.is_dicom(path):
            try:
                found = _dicom_source(path, name)
                slices += [found] if isinstance(found, dicom.Slice) else []
                sources += [found] if isinstance(found, Source) else []
            except UnreadableVolume as error:
                sources.append(Source((path,), name, status="quarantined", reason=error.reason))
    return sorted(sources + _series_sources(folder, slices), key=lambda source: source.name)


def _dicom_source(path: Path, name: str) -> Source | dicom.Slice:
    """A slice of some series, or a row that says why the object is not to be read."""
    tags = dicom.read_tags(path)
    if dicom.holds_image(tags):
        return dicom.Slice.of(path, tags)
    reason = "DICOM object without an image (structure set, report, ...)"
    if dicom.kind_of(tags) == dicom.DIRECTORY:
        reason = describe_dicomdir(path)
    return Source((path,), name, status="ignored", reason=reason, secrets=_secrets(tags))


def _secrets(tags: dict[dicom.Tag, str]) -> tuple[str, ...]:
    found = (tags.get(tag, "") for tag in (dicom.PATIENT_ID, dicom.PATIENT_NAME))
    return tuple(text for text in found if text)


def _name(folder: Path, path: Path) -> str:
    """Path relative to the folder as text that can be written down, whatever bytes it is of."""
    name = path.relative_to(folder).as_posix()
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\x{ord(found.group()):02x}", name)


def _outside(folder: Path, path: Path) -> str:
    """Why a link must not be followed, empty if there is no reason."""
    if not path.is_symlink() or path.resolve().is_relative_to(folder.resolve()):
        return ""
    return "a link out of the source folder, not followed: give the folder it points to as source"


def _walk(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        links = [f for f in folders if Path(root, f).is_symlink()]  # not descended into
        for file in sorted([*files, *links]):
            path = Path(root, file)
            if not file.startswith(".") and (path.is_file() or file in links):
                yield path


def _series_sources(folder: Path, slices: Iterable[dicom.Slice]) -> list[Source]:
    groups = group_series(slices)
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
        secrets = _secrets(tags)
        sources.append(Source(files, name, patient or None, series or None, secrets=secrets))
    return sources


def _place(folder: Path, group: Sequence[dicom.Slice]) -> str:
    if len(group) == 1:
        return _name(folder, group[0].path)
    return _name(folder, Path(os.path.commonpath([s.path.parent for s in group])))


def read_patients(path: Path) -> dict[str, str]:
    """Who is whose, from a table with the columns `file` and `patient`.

    Raises:
        FileNotFoundError: If there is no such table.
        ValueError: If a column is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no table of patients '{path}'")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if not {"file", "patient"} <= set(reader.fieldnames or ()):
            raise ValueError(f"'{path}' needs the columns file and patient")
        return {row["file"].strip("/"): row["patient"] for row in reader if row["patient"]}


def patient_of(item: Source, patients: Mapping[str, str]) -> str | None:
    """Patient id of a source in clear: by the table, for the file or a folder above it, else its own."""
    name = item.name.split("#")[0]
    for candidate in (item.name, name, *(p.as_posix() for p in Path(name).parents)):
        if candidate in patients:
            return patients[candidate]
    return item.patient


def person_of(item: Source, patient: str | None) -> str:
    """What is hashed to tell people apart; a source without an id is a person of its own."""
    return f"file:{item.name}" if patient is None else f"patient:{patient}"
