"""Compressed DICOM frames: the size and depth that the codestream itself states, before decoding.

Decoders believe the codestream, not the DICOM header: one with another size or an impossible depth
makes them crash or take memory without limit. Formats: ISO 10918-1 and 14495-1 (frame header SOF),
15444-1 (SIZ), DICOM PS3.5 A.4 (fragments) and G (RLE).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

from medspark.data.headers import UnreadableVolume

_ITEM, _END = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
_LONGEST = 1 << 16


def check_codestreams(
    path: Path, start: int, shape: tuple[int, int], rle_segments: int | None = None
) -> None:
    """Check every JPEG, JPEG-LS, JPEG 2000 or RLE stream of an encapsulated pixel element.

    Args:
        path: The file.
        start: First byte of the element.
        shape: Rows and columns by the DICOM header.
        rle_segments: Bytes of a pixel, if the transfer syntax is RLE.

    Raises:
        UnreadableVolume: If a stream states another size, several components, or a depth that is
            not 2 to 16 bits, or if the fragments are broken.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            for at, length in _fragments(data, start):
                head = data[at : at + min(length, _LONGEST)]
                stated = None
                if rle_segments is not None:
                    _check_rle(head, length, rle_segments)
                elif head[:2] == b"\xff\xd8":
                    stated = _jpeg(head)
                elif head[:2] == b"\xff\x4f":
                    stated = _jpeg2000(head)
                if stated is not None and (stated[:3] != (*shape, 1) or not 2 <= stated[3] <= 16):
                    raise UnreadableVolume(
                        f"a compressed frame states {stated[0]} x {stated[1]} pixels, {stated[2]} "
                        f"component(s) of {stated[3]} bits, the header {shape[0]} x {shape[1]}"
                    )
        except struct.error as error:
            raise UnreadableVolume(f"truncated or corrupt compressed frame: {error}") from error


def _fragments(data: mmap.mmap, start: int) -> Iterator[tuple[int, int]]:
    """Place and length of every fragment; the first item, the offset table, is left out."""
    at = start + 12  # tag, VR, two reserved bytes, undefined length
    if data[start + 4 : start + 6] not in (b"OB", b"OW", b"UN"):
        at = start + 8  # implicit VR
    first = True
    while True:
        group, element, length = struct.unpack_from("<HHI", data, at)
        if (group, element) == _END:
            return
        if (group, element) != _ITEM or at + 8 + length > len(data):
            raise UnreadableVolume("truncated or corrupt: compressed fragments run past the file")
        if not first:
            yield at + 8, length
        first, at = False, at + 8 + length


def _check_rle(head: bytes, length: int, wanted: int) -> None:
    """Each byte of a pixel is a segment, one after the other (PS3.5 annex G)."""
    count, *offsets = struct.unpack_from("<16I", head, 0)
    used = offsets[:wanted]
    if count != wanted or used[0] != 64 or used != sorted(set(used)) or used[-1] >= length:
        raise UnreadableVolume(f"truncated or corrupt RLE frame: {count} segments, not {wanted}")


def _jpeg(head: bytes) -> tuple[int, int, int, int]:
    """Rows, columns, components and bits of the frame header."""
    at = 2
    while True:
        mark, code, length = struct.unpack_from(">BBH", head, at)
        if mark != 0xFF:
            raise UnreadableVolume("corrupt JPEG stream: no frame header")
        if code in _FRAME_HEADERS:
            bits, rows, columns, components = struct.unpack_from(">BHHB", head, at + 4)
            return rows, columns, components, bits
        at += 1 if code == 0xFF else 2 + length


def _jpeg2000(head: bytes) -> tuple[int, int, int, int]:
    """The same of a SIZ marker, which must come first."""
    mark, _, _, x1, y1, x0, y0 = struct.unpack_from(">HHHIIII", head, 2)
    *_, components, depth = struct.unpack_from(">IIIIHB", head, 24)
    if mark != 0xFF51:
        raise UnreadableVolume("corrupt JPEG 2000 stream: no SIZ marker")
    return y1 - y0, x1 - x0, components, (depth & 0x7F) + 1
