"""DICOM headers: tags, the series of a folder, and where each slice lies.

Pixels are read in `medspark.data.io`. The tags are read here without a toolkit: grouping thousands
of slices needs a dozen tags of each, also of the objects that have no image at all.
Format: DICOM PS3.5 (data elements, transfer syntaxes) and PS3.10 (file format).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medspark.data.headers import UnreadableVolume

TRANSFER_SYNTAX = (0x0002, 0x0010)
SOP_CLASS = (0x0008, 0x0016)
IMAGE_TYPE = (0x0008, 0x0008)
MODALITY = (0x0008, 0x0060)
PATIENT_ID = (0x0010, 0x0020)
SERIES_UID = (0x0020, 0x000E)
POSITION = (0x0020, 0x0032)
ORIENTATION = (0x0020, 0x0037)
SAMPLES = (0x0028, 0x0002)
FRAMES = (0x0028, 0x0008)
ROWS = (0x0028, 0x0010)
COLUMNS = (0x0028, 0x0011)
PIXEL_SPACING = (0x0028, 0x0030)
BITS_ALLOCATED = (0x0028, 0x0100)

_IMPLICIT, _BIG_ENDIAN, _DEFLATED = (
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.2",
    "1.2.840.10008.1.2.1.99",
)
UNCOMPRESSED = (_IMPLICIT, "1.2.840.10008.1.2.1", _BIG_ENDIAN)
_LONG_LENGTH = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT"}
_LONG_LENGTH |= {b"UV"}
_NUMBER = {b"US": "H", b"UL": "I", b"SS": "h", b"SL": "i"}
_BINARY_SHORTS = {SAMPLES, ROWS, COLUMNS, BITS_ALLOCATED}
_UNDEFINED = 0xFFFFFFFF
_LAST_GROUP = 0x0028  # nothing that is used here comes later; pixels are in 7FE0
_HEADER_FIRST, _HEADER_LIMIT = 1 << 17, 16 << 20
# Storage classes without pixels: plans and structure sets, reports, presentation states, ...
_NO_IMAGE = ("1.2.840.10008.1.3.10", "1.2.840.10008.5.1.4.1.1.481.3")
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


class _Parser:
    """Walks the data elements of a data set at the top level. Sequences are skipped."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at, self.order, self.implicit = data, at, "<", False

    def _take(self, form: str) -> tuple[int, ...]:
        values = struct.unpack_from(self.order + form, self.data, self.at)
        self.at += struct.calcsize(form)
        return values

    def _head(self) -> tuple[Tag, bytes, int]:
        group, element = self._take("HH")
        if group == 0xFFFE or self.implicit:
            return (group, element), b"", self._take("I")[0]
        vr = self.data[self.at : self.at + 2]
        self.at += 2
        if vr in _LONG_LENGTH:
            self.at += 2
            return (group, element), vr, self._take("I")[0]
        return (group, element), vr, self._take("H")[0]

    def _skip_sequence(self, implicit: bool) -> None:
        before, self.implicit = self.implicit, implicit
        while True:
            tag, _, length = self._head()
            if tag in ((0xFFFE, 0xE0DD), (0xFFFE, 0xE00D)):
                break
            if length == _UNDEFINED:
                self._skip_sequence(self.implicit)
            else:
                self.at += length
        self.implicit = before

    def elements(self, last_group: int) -> Iterator[tuple[Tag, str]]:
        """Tag and value as text, up to and with `last_group`; stops before the next group."""
        while self.at + 8 <= len(self.data):
            start = self.at
            tag, vr, length = self._head()
            if tag[0] > last_group:
                self.at = start
                return
            if length == _UNDEFINED:
                # PS3.5 6.2.2: a UN value of undefined length is implicit VR inside.
                self._skip_sequence(self.implicit or vr == b"UN")
                continue
            value = self.data[self.at : self.at + length]
            if len(value) < length:
                raise struct.error("a value runs past the end of the file")
            self.at += length
            yield tag, self._text(tag, vr, value)

    def _text(self, tag: Tag, vr: bytes, value: bytes) -> str:
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


def _parse(data: bytes) -> dict[Tag, str]:
    parser = _Parser(data, 132 if data[128:132] == b"DICM" else 0)
    tags = dict(parser.elements(2))
    syntax = tags.get(TRANSFER_SYNTAX, _IMPLICIT)
    if syntax == _DEFLATED:
        raise UnreadableVolume("deflated DICOM is not supported: convert it to explicit VR")
    parser.implicit = syntax == _IMPLICIT
    parser.order = ">" if syntax == _BIG_ENDIAN else "<"
    tags.update(parser.elements(_LAST_GROUP))
    if parser.at + 8 > len(data) and holds_image(tags):
        raise struct.error("the file ends before its pixels")
    return tags


def holds_image(tags: dict[Tag, str]) -> bool:
    """Whether the object is of a kind that has pixels (no DICOMDIR, structure set, report)."""
    kind = tags.get(SOP_CLASS) or tags.get((0x0002, 0x0002), "")
    return kind not in _NO_IMAGE and not kind.startswith(_NO_IMAGE_UNDER)


@dataclass(frozen=True)
class Slice:
    """One DICOM image file and where it lies in the patient.

    Attributes:
        path: The file.
        tags: Its tags, see `read_tags`.
        position: Centre of the first pixel in mm (x, y, z; LPS), None where the tag is missing.
        axes: Unit vectors along a row and down a column, `[2, 3]`, None where the tag is missing.
    """

    path: Path
    tags: dict[Tag, str]
    position: np.ndarray | None
    axes: np.ndarray | None

    @classmethod
    def read(cls, path: Path) -> Slice:
        """Read the header of one file. Raises UnreadableVolume."""
        return cls.of(path, read_tags(path))

    @classmethod
    def of(cls, path: Path, tags: dict[Tag, str]) -> Slice:
        """From tags that were read before. Raises UnreadableVolume for numbers that are none."""
        axes = _numbers(tags, ORIENTATION, 6)
        return cls(
            path, tags, _numbers(tags, POSITION, 3), None if axes is None else axes.reshape(2, 3)
        )


def _numbers(tags: dict[Tag, str], tag: Tag, count: int) -> np.ndarray | None:
    text = tags.get(tag, "")
    if not text:
        return None
    try:
        values = np.array([float(part) for part in text.split("\\")])
    except ValueError as error:
        raise UnreadableVolume(f"tag {tag[0]:04x},{tag[1]:04x} holds '{text}'") from error
    if len(values) != count or not np.isfinite(values).all():
        raise UnreadableVolume(f"tag {tag[0]:04x},{tag[1]:04x} holds '{text}', not {count} numbers")
    return values


def group_series(slices: Iterable[Slice]) -> list[list[Slice]]:
    """Group by SeriesInstanceUID and slice orientation; a localizer does not join its series.

    The order of files is kept inside a group, groups come in order of their first file.
    """
    groups: list[list[Slice]] = []
    by_uid: dict[str, list[list[Slice]]] = {}
    for item in slices:
        same_uid = by_uid.setdefault(item.tags.get(SERIES_UID) or str(item.path.parent), [])
        for group in same_uid:
            if _same_plane(group[0], item):
                group.append(item)
                break
        else:
            same_uid.append([item])
            groups.append(same_uid[-1])
    return groups


def _same_plane(a: Slice, b: Slice) -> bool:
    if a.axes is None or b.axes is None:
        return a.axes is b.axes
    return bool(np.allclose(a.axes, b.axes, atol=1e-2))


@dataclass(frozen=True)
class Geometry:
    """Grid of a sorted series.

    Attributes:
        order: Slices sorted along the slice normal.
        spacing: Step along (x, y, z) in mm; z is the distance of slice planes.
        origin: Centre of the first voxel in mm (LPS).
        direction: Columns are unit vectors of the array axes (i, j, k), `[3, 3]`.
        tilt: Angle in degrees between the line of slice origins and the slice normal.
    """

    order: list[Slice]
    spacing: np.ndarray
    origin: np.ndarray
    direction: np.ndarray
    tilt: float


def series_geometry(slices: list[Slice], *, tolerance: float = 0.01) -> Geometry:
    """Sort a series by position along its normal and check that the steps are even.

    Args:
        slices: At least two slices of one series, or one (its thickness is then unknown: 1 mm).
        tolerance: Largest allowed deviation of a step, as a fraction of the median step.

    Raises:
        UnreadableVolume: For missing positions, repeated positions, uneven or missing slices.
    """
    first = slices[0]
    pixel = _numbers(first.tags, PIXEL_SPACING, 2)
    if first.axes is None or pixel is None or any(s.position is None for s in slices):
        raise UnreadableVolume("ImagePositionPatient, ImageOrientationPatient or PixelSpacing lack")
    if (pixel <= 0).any():
        raise UnreadableVolume(f"PixelSpacing is {pixel.tolist()}, it must be positive")
    normal = np.cross(first.axes[0], first.axes[1])
    along = np.array([s.position @ normal for s in slices if s.position is not None])
    order = np.argsort(along, kind="stable")
    step = _even_step(along[order], tolerance)
    ordered = [slices[i] for i in order]
    start, end = ordered[0].position, ordered[-1].position
    assert start is not None
    assert end is not None
    across = np.linalg.norm((end - start) - ((end - start) @ normal) * normal)
    tilt = float(np.degrees(np.arctan2(across, (end - start) @ normal))) if len(order) > 1 else 0.0
    direction = np.stack([first.axes[0], first.axes[1], normal], axis=1)
    return Geometry(ordered, np.array([pixel[1], pixel[0], step]), start, direction, tilt)


def _even_step(along: np.ndarray, tolerance: float) -> float:
    if len(along) == 1:
        return 1.0
    steps = np.diff(along)
    repeated = int((steps < 1e-3).sum())
    if repeated:
        raise UnreadableVolume(
            f"{repeated} of {len(along)} slices repeat a position: a doubled slice or a 4D series"
        )
    step = float(np.median(steps))
    worst = int(np.argmax(np.abs(steps - step)))
    if abs(steps[worst] - step) > tolerance * step:
        ratio = steps[worst] / step
        missing = round(ratio) >= 2 and abs(ratio - round(ratio)) <= tolerance * 2
        what = f"{round(ratio) - 1} slice(s) missing" if missing else "uneven slice spacing"
        raise UnreadableVolume(
            f"{what}: step {steps[worst]:.3f} mm after slice {worst + 1}, usual step {step:.3f} mm"
        )
    return float((along[-1] - along[0]) / (len(along) - 1))
