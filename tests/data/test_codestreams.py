from __future__ import annotations

import struct
from pathlib import Path

import pytest

from medspark.data.codestreams import check_codestreams
from medspark.data.headers import UnreadableVolume


def pixel_element(*fragments: bytes) -> bytes:
    item = b"".join(struct.pack("<HHI", 0xFFFE, 0xE000, len(f)) + f for f in (b"", *fragments))
    head = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF)
    return head + item + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)


def jpeg(rows: int, columns: int, bits: int = 16, components: int = 1, code: int = 0xC3) -> bytes:
    comment = b"\xff\xfe" + struct.pack(">H", 6) + b"text"
    frame = struct.pack(">BBHBHHB", 0xFF, code, 11, bits, rows, columns, components)
    return b"\xff\xd8" + comment + frame + b"\x01\x11\x00"


def jpeg2000(rows: int, columns: int, bits: int = 12, components: int = 1) -> bytes:
    size = struct.pack(">IIIIIIII", columns + 2, rows + 3, 2, 3, columns, rows, 0, 0)
    return b"\xff\x4f\xff\x51" + struct.pack(">HH", 41, 0) + size + struct.pack(
        ">HBBB", components, bits - 1, 1, 1
    )  # fmt: skip


def check(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"header" + data)
    check_codestreams(path, 6, (20, 30))


@pytest.mark.parametrize("make", [jpeg, jpeg2000])
def test_streams(tmp_path: Path, make) -> None:
    check(tmp_path, pixel_element(make(20, 30), make(20, 30)))
    for wrong in (make(30, 20), make(20, 60000), make(20, 30, 20), make(20, 30, 1),
                  make(20, 30, 12, 3)):  # fmt: skip
        with pytest.raises(UnreadableVolume, match="a compressed frame states"):
            check(tmp_path, pixel_element(make(20, 30), wrong))


def test_jpeg_ls_and_unknown(tmp_path: Path) -> None:
    check(tmp_path, pixel_element(jpeg(20, 30, code=0xF7)))
    with pytest.raises(UnreadableVolume, match="states 21 x 30 pixels"):
        check(tmp_path, pixel_element(jpeg(21, 30, code=0xF7)))
    check(tmp_path, pixel_element(b"continued fragment"))


@pytest.mark.parametrize("keep", [14, 20, 30, 45, 60])
def test_cut(tmp_path: Path, keep: int) -> None:
    with pytest.raises(UnreadableVolume, match=r"truncated or corrupt|corrupt JPEG"):
        check(tmp_path, pixel_element(jpeg(20, 30), jpeg(20, 30))[:keep])


def test_no_frame_header(tmp_path: Path) -> None:
    with pytest.raises(UnreadableVolume, match="no frame header"):
        check(tmp_path, pixel_element(b"\xff\xd8" + b"\0" * 50))
    with pytest.raises(UnreadableVolume, match="no SIZ marker"):
        check(tmp_path, pixel_element(b"\xff\x4f\xff\x52" + b"\0" * 50))


def rle_frame(count: int, offsets: list[int], length: int = 300) -> bytes:
    return struct.pack("<16I", count, *offsets, *[0] * (15 - len(offsets))) + bytes(length - 64)


def test_rle(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(pixel_element(rle_frame(2, [64, 200]), rle_frame(2, [64, 180])))
    check_codestreams(path, 0, (20, 30), 2)
    for count, offsets in ((0, []), (1, [64]), (2, [64, 64]), (2, [64, 9000]), (2, [66, 90])):
        path.write_bytes(pixel_element(rle_frame(2, [64, 200]), rle_frame(count, offsets)))
        with pytest.raises(UnreadableVolume, match="RLE frame"):
            check_codestreams(path, 0, (20, 30), 2)
