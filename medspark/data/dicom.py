"""DICOM headers: the tags of a file, and where its slice lies.

Series are put together in `medspark.data.series`, pixels are read in `medspark.data.pixels`. The
tags are read here without a toolkit: grouping thousands of slices needs a dozen tags of each, also
of the objects that have no image at all.
Format: DICOM PS3.5 (data elements, transfer syntaxes) and PS3.10 (file format).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medspark.data.headers import UnreadableVolume

TRANSFER_SYNTAX = (0x0002, 0x0010)
SOP_CLASS = (0x0008, 0x0016)
SOP_UID = (0x0008, 0x0018)
IMAGE_TYPE = (0x0008, 0x0008)
MODALITY = (0x0008, 0x0060)
PATIENT_NAME = (0x0010, 0x0010)
PATIENT_ID = (0x0010, 0x0020)
SERIES_UID = (0x0020, 0x000E)
POSITION = (0x0020, 0x0032)
ORIENTATION = (0x0020, 0x0037)
SAMPLES = (0x0028, 0x0002)
PHOTOMETRIC = (0x0028, 0x0004)
FRAMES = (0x0028, 0x0008)
ROWS = (0x0028, 0x0010)
COLUMNS = (0x0028, 0x0011)
PIXEL_SPACING = (0x0028, 0x0030)
BITS_ALLOCATED = (0x0028, 0x0100)
BITS_STORED = (0x0028, 0x0101)
HIGH_BIT = (0x0028, 0x0102)
PIXEL_SIGNED = (0x0028, 0x0103)
PADDING = (0x0028, 0x0120)
INTERCEPT = (0x0028, 0x1052)
SLOPE = (0x0028, 0x1053)
RESCALE_TYPE = (0x0028, 0x1054)
LOSSY = (0x0028, 0x2110)
PIXELS = (0x7FE0, 0x0010)

_IMPLICIT, _DEFLATED = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99"
BIG_ENDIAN = "1.2.840.10008.1.2.2"
UNCOMPRESSED = (_IMPLICIT, "1.2.840.10008.1.2.1", BIG_ENDIAN)
_LONG_LENGTH = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT"}
_LONG_LENGTH |= {b"UV"}
_NUMBER = {b"US": "H", b"UL": "I", b"SS": "h", b"SL": "i"}
_BINARY_SHORTS = {SAMPLES, ROWS, COLUMNS, BITS_ALLOCATED, BITS_STORED, HIGH_BIT}
_BINARY_SHORTS |= {PIXEL_SIGNED, PADDING}
UNDEFINED = 0xFFFFFFFF
_LAST_GROUP = 0x0028  # nothing that is used here comes later; pixels are in 7FE0
_HEADER_FIRST, _HEADER_LIMIT = 1 << 17, 16 << 20
# Storage classes without pixels: plans and structure sets, reports, presentation states, ...
DIRECTORY = "1.2.840.10008.1.3.10"
_NO_IMAGE = (DIRECTORY, "1.2.840.10008.5.1.4.1.1.481.3")
_NO_IMAGE_UNDER = tuple(
    "1.2.840.10008.5.1.4.1.1." + s for s in ("481.4", "481.5", "481.8", "88.", "104.", "11.", "66")
)

Tag = tuple[int, int]


def is_dicom(path: Path) -> bool:
    """Whether the file has the DICOM preamble, or is a bare data set named .dcm."""
    with path.open("rb") as file:
        head = file.read(132)
    bare = head[:2] == b"\x08\x00" and path.suffix.lower() in (".dcm", ".ima")
    return head[128:] == b"DICM" or bare


class Parser:
    """Walks the data elements of a data set at the top level. Sequences are skipped."""

    def __init__(self, data: bytes | mmap.mmap, at: int) -> None:
        self.data, self.at, self.order, self.implicit = data, at, "<", False

    def _take(self, form: str) -> tuple[int, ...]:
        values = struct.unpack_from(self.order + form, self.data, self.at)
        self.at += struct.calcsize(form)
        return values

    def head(self) -> tuple[Tag, bytes, int]:
        """Tag, VR (empty if implicit) and length of the element at the current place."""
        group, element = self._take("HH")
        if group == 0xFFFE or self.implicit:
            return (group, element), b"", self._take("I")[0]
        vr = self.data[self.at : self.at + 2]
        self.at += 2
        if vr in _LONG_LENGTH:
            self.at += 2
            return (group, element), vr, self._take("I")[0]
        return (group, element), vr, self._take("H")[0]

    def skip_sequence(self, implicit: bool) -> None:
        """Pass over a sequence of undefined length up to its delimiter."""
        before, self.implicit = self.implicit, implicit
        while True:
            tag, _, length = self.head()
            if tag in ((0xFFFE, 0xE0DD), (0xFFFE, 0xE00D)):
                break
            if length == UNDEFINED:
                self.skip_sequence(self.implicit)
            else:
                self.at += length
        self.implicit = before

    def elements(self, last_group: int) -> Iterator[tuple[Tag, str]]:
        """Tag and value as text, up to and with `last_group`; stops before the next group."""
        while self.at + 8 <= len(self.data):
            start = self.at
            tag, vr, length = self.head()
            if tag[0] > last_group:
                self.at = start
                return
            if length == UNDEFINED:
                # PS3.5 6.2.2: a UN value of undefined length is implicit VR inside.
                self.skip_sequence(self.implicit or vr == b"UN")
                continue
            value = self.data[self.at : self.at + length]
            if len(value) < length:
                raise struct.error("a value runs past the end of the file")
            self.at += length
            yield tag, self.text(tag, vr, value)

    def text(self, tag: Tag, vr: bytes, value: bytes) -> str:
        """A value as text; several numbers are joined by a backslash."""
        code = _NUMBER.get(vr) or ("H" if self.implicit and tag in _BINARY_SHORTS else None)
        if code and len(value) % struct.calcsize(code) == 0:
            count = len(value) // struct.calcsize(code)
            return "\\".join(map(str, struct.unpack(f"{self.order}{count}{code}", value)))
        return value.decode("latin-1").strip(" \0")


def read_tags(path: Path) -> dict[Tag, str]:
    """Top-level tags up to group 0028, values as text (several joined by a backslash).

    Raises:
        UnreadableVolume: If the file is cut short or is no DICOM data set.
    """
    with path.open("rb") as file:
        for limit in (_HEADER_FIRST, _HEADER_LIMIT):
            file.seek(0)
            data = file.read(limit)
            try:
                return _parse(data)
            except (struct.error, RecursionError) as error:
                if len(data) < limit:
                    raise UnreadableVolume(f"broken DICOM header: {error}") from error
    raise UnreadableVolume("broken DICOM header: no image description in its first 16 MB")


def start_parser(parser: Parser) -> dict[Tag, str]:
    """Read the file meta information and set `parser` to what it says about the rest.

    Raises:
        UnreadableVolume: For deflated data sets.
    """
    parser.at = 132 if parser.data[128:132] == b"DICM" else 0
    tags = dict(parser.elements(2))
    syntax = tags.get(TRANSFER_SYNTAX, _IMPLICIT)
    if syntax == _DEFLATED:
        raise UnreadableVolume(
            "transfer syntax Deflated Explicit VR is not supported: store it uncompressed"
        )
    parser.implicit = syntax == _IMPLICIT
    parser.order = ">" if syntax == BIG_ENDIAN else "<"
    return tags


def _parse(data: bytes) -> dict[Tag, str]:
    parser = Parser(data, 0)
    tags = start_parser(parser)
    tags.update(parser.elements(_LAST_GROUP))
    if parser.at + 8 > len(data) and holds_image(tags):
        raise struct.error("the file ends before its pixels")
    return tags


def kind_of(tags: dict[Tag, str]) -> str:
    """SOP class UID of the object."""
    return tags.get(SOP_CLASS) or tags.get((0x0002, 0x0002), "")


def holds_image(tags: dict[Tag, str]) -> bool:
    """Whether the object is of a kind that has pixels (no DICOMDIR, structure set, report)."""
    kind = kind_of(tags)
    return kind not in _NO_IMAGE and not kind.startswith(_NO_IMAGE_UNDER)


@dataclass(frozen=True)
class Slice:
    """One DICOM image file and where it lies in the patient.

    Attributes:
        path: The file.
        tags: Its tags, see `read_tags`.
        position: Centre of the first pixel in mm (x, y, z; LPS), None where the tag is missing.
        axes: Unit vectors along a row and down a column, `[2, 3]`, None where the tag is missing.
        frame: Index of the frame in a multi-frame object.
    """

    path: Path
    tags: dict[Tag, str]
    position: np.ndarray | None
    axes: np.ndarray | None
    frame: int = 0

    @classmethod
    def read(cls, path: Path) -> Slice:
        """Read the header of one file. Raises UnreadableVolume."""
        return cls.of(path, read_tags(path))

    @classmethod
    def of(cls, path: Path, tags: dict[Tag, str], frame: int = 0) -> Slice:
        """From tags that were read before. Raises UnreadableVolume for numbers that are none."""
        axes = numbers(tags, ORIENTATION, 6)
        position = numbers(tags, POSITION, 3)
        return cls(path, tags, position, None if axes is None else _unit(axes), frame)

    def integer(self, tag: Tag, default: int) -> int:
        """A tag that holds one whole number. Raises UnreadableVolume for anything else."""
        text = self.tags.get(tag, "")
        try:
            return int(text) if text else default
        except ValueError as error:
            raise UnreadableVolume(f"tag {tag_name(tag)} holds no whole number") from error


def _unit(axes: np.ndarray) -> np.ndarray:
    rows = axes.reshape(2, 3)
    length = np.linalg.norm(rows, axis=1)
    if (np.abs(length - 1) > 1e-2).any() or abs(rows[0] @ rows[1]) > 1e-2:
        raise UnreadableVolume(
            f"ImageOrientationPatient {axes.tolist()} is no pair of unit vectors at right angles"
        )
    return rows


def tag_name(tag: Tag) -> str:
    """As it is printed in the standard, (0028,0030)."""
    return f"({tag[0]:04X},{tag[1]:04X})"


def numbers(tags: dict[Tag, str], tag: Tag, count: int) -> np.ndarray | None:
    """The numbers of a tag, None where it is missing. Raises UnreadableVolume for others."""
    text = tags.get(tag, "")
    if not text:
        return None
    try:
        values = np.array([float(part) for part in text.split("\\")])
    except ValueError as error:
        # A broken header may have put anything here, a name too: it is not quoted.
        raise UnreadableVolume(f"tag {tag_name(tag)} holds text that is no number") from error
    if len(values) != count or not np.isfinite(values).all() or np.abs(values).max() > 1e6:
        wanted = f"{count} number{'s' if count > 1 else ''}"
        raise UnreadableVolume(f"tag {tag_name(tag)} holds '{text[:40]}', not {wanted}")
    return values
