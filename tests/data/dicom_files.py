"""Writes DICOM objects that SimpleITK cannot: enhanced CT, DICOMDIR, odd tags. No toolkit needed."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

Tag = tuple[int, int]
Value = "bytes | str | int | list[dict[Tag, Value]]"
EXPLICIT = "1.2.840.10008.1.2.1"
CT = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2.1"
_CODES = {(0x0028, 0x0004), (0x0028, 0x2110)}
_TEXT = {0x0002: b"UI", 0x0004: b"CS", 0x0008: b"CS", 0x0010: b"LO", 0x0018: b"CS",
         0x0020: b"DS", 0x0028: b"DS"}  # fmt: skip


def element(tag: Tag, value: object) -> bytes:
    """One element in explicit VR little endian; a list is a sequence of undefined length."""
    head = struct.pack("<HH", *tag)
    if isinstance(value, list):
        items = b"".join(
            struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
            + data_set(item)
            + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
            for item in value
        )
        end = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
        return head + b"SQ\0\0" + struct.pack("<I", 0xFFFFFFFF) + items + end
    if isinstance(value, int):
        return head + b"US" + struct.pack("<HH", 2, value)
    if isinstance(value, bytes):
        return head + b"OW\0\0" + struct.pack("<I", len(value)) + value
    data = str(value).encode()
    data += b" " * (len(data) % 2)
    vr = b"CS" if tag in _CODES else _TEXT.get(tag[0], b"LO")
    return head + vr + struct.pack("<H", len(data)) + data


def data_set(tags: dict) -> bytes:
    return b"".join(element(tag, tags[tag]) for tag in sorted(tags))


def write(path: Path, tags: dict, syntax: str = EXPLICIT, after: bytes = b"") -> Path:
    """A file of these tags; `after` follows them as it is."""
    meta = element((0x0002, 0x0010), syntax + "\0" * (len(syntax) % 2))
    length = struct.pack("<HH2sHI", 0x0002, 0x0000, b"UL", 4, len(meta))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(128) + b"DICM" + length + meta + data_set(tags) + after)
    return path


def image_tags(stored: np.ndarray, **more: object) -> dict:
    """Tags that describe int16 or uint16 pixels `[frame, y, x]`, without the pixels."""
    return {
        (0x0008, 0x0008): "ORIGINAL\\PRIMARY\\VOLUME",
        (0x0008, 0x0016): ENHANCED_CT,
        (0x0008, 0x0018): "1.2.3.4.5",
        (0x0008, 0x0060): "CT",
        (0x0010, 0x0010): "DOE^JANE",
        (0x0010, 0x0020): "MRN4711",
        (0x0020, 0x000E): "1.2.3.4",
        (0x0028, 0x0002): 1,
        (0x0028, 0x0004): "MONOCHROME2",
        (0x0028, 0x0008): str(len(stored)),
        (0x0028, 0x0010): stored.shape[1],
        (0x0028, 0x0011): stored.shape[2],
        (0x0028, 0x0100): 16,
        (0x0028, 0x0101): 16,
        (0x0028, 0x0102): 15,
        (0x0028, 0x0103): int(stored.dtype.kind == "i"),
    }


def groups(
    position: Sequence[float] | None = None, rescale: tuple[float, float] | None = None
) -> dict:
    """Functional groups of a frame: where it lies (x, y, z), slope and intercept."""
    found: dict = {}
    if position is not None:
        text = "\\".join(f"{p:g}" for p in position)
        found[(0x0020, 0x9113)] = [{(0x0020, 0x0032): text}]
    if rescale is not None:
        found[(0x0028, 0x9145)] = [
            {(0x0028, 0x1052): f"{rescale[1]:g}", (0x0028, 0x1053): f"{rescale[0]:g}",
             (0x0028, 0x1054): "HU"}
        ]  # fmt: skip
    return found


SHARED = {
    (0x0020, 0x9116): [{(0x0020, 0x0037): "1\\0\\0\\0\\1\\0"}],
    (0x0028, 0x9110): [{(0x0028, 0x0030): "2\\1", (0x0018, 0x0050): "3"}],
}


def enhanced(
    path: Path,
    stored: np.ndarray,
    positions: Sequence[Sequence[float]],
    rescales: Sequence[tuple[float, float]],
    *,
    tags: dict | None = None,
    syntax: str = EXPLICIT,
    packed: bytes | None = None,
) -> Path:
    """An Enhanced CT of frames `[frame, y, x]`; `packed` is the whole pixel element instead."""
    frames = [groups(p, r) for p, r in zip(positions, rescales, strict=True)]
    about = image_tags(stored) | {(0x5200, 0x9229): [SHARED], (0x5200, 0x9230): frames}
    about |= tags or {}
    pixels = element((0x7FE0, 0x0010), stored.tobytes()) if packed is None else packed
    return write(path, about, syntax, pixels)


def plain_slice(path: Path, plane: np.ndarray, z: float, **more: object) -> Path:
    """One slice of a series, explicit VR, written without a toolkit."""
    tags = image_tags(plane[None]) | {
        (0x0008, 0x0008): "ORIGINAL\\PRIMARY\\AXIAL", (0x0008, 0x0016): CT,
        (0x0008, 0x0018): f"1.2.3.{z:g}", (0x0020, 0x0032): f"0\\0\\{z:g}",
        (0x0020, 0x0037): "1\\0\\0\\0\\1\\0", (0x0028, 0x0030): "1\\1",
        (0x0028, 0x1052): "-1024", (0x0028, 0x1053): "1",
    }  # fmt: skip
    del tags[(0x0028, 0x0008)]
    tags |= more.pop("tags", {})  # type: ignore[operator]
    tags = {tag: value for tag, value in tags.items() if value is not None}
    return write(path, tags, after=element((0x7FE0, 0x0010), plane.tobytes()), **more)


def rle(plane: np.ndarray) -> bytes:
    """Pixel element in RLE Lossless (PS3.5 annex G), literal runs only: high bytes, low bytes."""
    segments = []
    for part in (plane >> 8, plane & 0xFF):
        data = part.astype(np.uint8).tobytes()
        runs = [data[i : i + 128] for i in range(0, len(data), 128)]
        packed = b"".join(bytes([len(run) - 1]) + run for run in runs)
        segments.append(packed + b"\0" * (len(packed) % 2))
    offsets = [2, 64, 64 + len(segments[0])] + [0] * 13
    frame = np.array(offsets, "<u4").tobytes() + b"".join(segments)
    item, end = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0\0\0\0\0"
    head = b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff"
    return head + item + bytes(4) + item + len(frame).to_bytes(4, "little") + frame + end
