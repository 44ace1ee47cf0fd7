"""Pixels of a DICOM series: decoded, rescaled slice by slice, padding set to air."""

from __future__ import annotations

import shutil
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medspark.data import dicom
from medspark.data.codestreams import check_codestreams
from medspark.data.dicom import Slice
from medspark.data.headers import AIR, MAX_BYTES, UnreadableVolume, check_promise
from medspark.data.itk import open_reader, read_pixels, scalar_type, sitk
from medspark.data.multiframe import pixel_data_place

_SYNTAX = "1.2.840.10008.1.2."
# Transfer syntaxes that the reader decodes; the names are those of PS3.6.
_DECODED = {f"{_SYNTAX}{end}" for end in ("1", "2", "5", "4.50", "4.51", "4.57", "4.70", "4.80",
                                          "4.81", "4.90", "4.91")} | {_SYNTAX[:-1]}  # fmt: skip
_UNDECODED = {"4.92": "JPEG 2000 Part 2", "4.93": "JPEG 2000 Part 2", "4.94": "JPIP", "4.95": "JPIP",
              "4.110": "JPEG XL", "4.111": "JPEG XL", "4.112": "JPEG XL", "4.201": "HTJ2K",
              "4.202": "HTJ2K", "4.203": "HTJ2K"}  # fmt: skip
Decoded = dict[Path, np.ndarray]
_RLE = f"{_SYNTAX}5"
_HIGHEST_HU = 3071  # of 12 bits; a padding value above it stands for nothing


def stack(slices: Sequence[Slice], max_bytes: int = MAX_BYTES) -> tuple[np.ndarray, str]:
    """Voxels `[z, y, x]` of sorted slices, each rescaled by its own slope and intercept.

    Args:
        slices: Files or frames, all of one size.
        max_bytes: Refuse series that need more memory than this.

    Returns:
        The voxels, and the type in which the first slice gave them.

    Raises:
        UnreadableVolume: For too many voxels, truncated or undecodable pixels.
    """
    shape = slices[0].integer(dicom.ROWS, 0), slices[0].integer(dicom.COLUMNS, 0)
    _check_series(slices, shape, max_bytes)
    voxels, stored_type = np.empty(0), ""
    decoded: Decoded = {}
    for index, item in enumerate(slices):
        pixels, kind = _pixels(item, shape, index, decoded)
        if index == 0:
            voxels, stored_type = np.empty((len(slices), *shape), pixels.dtype), kind
        elif np.result_type(voxels, pixels) != voxels.dtype:
            voxels = voxels.astype(np.result_type(voxels, pixels))
        voxels[index] = pixels
    return voxels, stored_type


def same_pixels(a: Slice, b: Slice) -> bool:
    """Whether two slices hold the same HU."""
    shapes = [(s.integer(dicom.ROWS, 0), s.integer(dicom.COLUMNS, 0)) for s in (a, b)]
    if shapes[0] != shapes[1]:
        return False
    _check_series([a, b], shapes[0], MAX_BYTES)
    first, second = (_pixels(s, shapes[0], 0, {})[0] for s in (a, b))
    return np.array_equal(first, second)


def check_syntax(slices: Sequence[Slice]) -> None:
    """Refuse transfer syntaxes that cannot be decoded, by name."""
    for syntax in {s.tags.get(dicom.TRANSFER_SYNTAX, _SYNTAX[:-1]) for s in slices} - _DECODED:
        if not set(syntax) <= set("0123456789."):
            raise UnreadableVolume("the transfer syntax (0002,0010) is no UID: a broken header")
        end = syntax.removeprefix(_SYNTAX)
        name = _UNDECODED.get(end, "video" if end.startswith("4.10") else "unknown")
        raise UnreadableVolume(
            f"transfer syntax {syntax[:64]} ({name}) cannot be decoded: have the PACS send "
            "Explicit VR Little Endian, JPEG Lossless, JPEG-LS, JPEG 2000 or RLE"
        )


def _check_series(slices: Sequence[Slice], shape: tuple[int, int], max_bytes: int) -> None:
    check_syntax(slices)
    # Rescaled voxels come as int32 at most times.
    check_promise(slices[0].path, (len(slices), *shape), 4, max_bytes, packed=None)
    for index, item in enumerate(slices):
        check_bits(item)
        on_disk = item.path.stat().st_size
        need = shape[0] * shape[1] * item.integer(dicom.BITS_ALLOCATED, 16) // 8
        if item.tags.get(dicom.TRANSFER_SYNTAX, _SYNTAX[:-1]) not in dicom.UNCOMPRESSED:
            check_promise(item.path, shape, 1, max_bytes)
            start, packed = pixel_data_place(item.path)
            if packed and item.frame == 0:
                rle = item.tags.get(dicom.TRANSFER_SYNTAX) == _RLE
                segments = check_bits(item)[0] // 8 if rle else None
                check_codestreams(item.path, start, shape, segments)
        elif on_disk < need * (item.frame + 1):
            raise UnreadableVolume(
                f"truncated slice {index + 1}: {need} bytes of pixels promised, the file has "
                f"{on_disk}"
            )


def _pixels(
    item: Slice, shape: tuple[int, int], index: int, decoded: Decoded
) -> tuple[np.ndarray, str]:
    plain = item.tags.get(dicom.TRANSFER_SYNTAX, _SYNTAX[:-1]) in dicom.UNCOMPRESSED
    if plain or item.integer(dicom.FRAMES, 1) > 1:
        pixels, kind = _frame(item, shape, decoded)
    else:
        reader = open_reader(item.path, "GDCMImageIO")
        kind, size = scalar_type(reader).name, reader.GetSize()[::-1]
        if size[-2:] != shape or any(n != 1 for n in size[:-2]):
            raise UnreadableVolume(f"slice {index + 1} is {size}, its header says {shape}")
        image = read_pixels(reader, item.path)
        pixels = sitk().GetArrayFromImage(image).reshape(shape)
    return without_padding(item, pixels), kind


def without_padding(item: Slice, pixels: np.ndarray) -> np.ndarray:
    """Rescaled pixels whose padding above all tissue is air; lower padding is clipped later."""
    padding = dicom.numbers(item.tags, dicom.PADDING, 1)
    if padding is None:
        return pixels
    value = float(padding[0])
    if item.integer(dicom.PIXEL_SIGNED, 0) and value > 32767:
        value -= 65536
    slope, intercept = rescale_of(item)
    if value * slope + intercept <= _HIGHEST_HU:
        return pixels
    return np.where(pixels == value * slope + intercept, pixels.dtype.type(AIR), pixels)


def rescale_of(item: Slice) -> tuple[float, float]:
    """Slope and intercept, 1 and 0 where missing. Raises UnreadableVolume for a slope of 0."""
    slope = dicom.numbers(item.tags, dicom.SLOPE, 1)
    intercept = dicom.numbers(item.tags, dicom.INTERCEPT, 1)
    if slope is not None and slope[0] == 0:
        raise UnreadableVolume("RescaleSlope is 0")
    return (
        1.0 if slope is None else float(slope[0]),
        0.0 if intercept is None else float(intercept[0]),
    )


def _frame(item: Slice, shape: tuple[int, int], decoded: Decoded) -> tuple[np.ndarray, str]:
    """One plain slice or frame, by its own scale (the toolkit knows only the first frame's)."""
    start, packed = pixel_data_place(item.path)
    if packed and item.path not in decoded:
        decoded[item.path] = _unpack(item, start, shape)
    raw = decoded[item.path][item.frame] if packed else _plain(item, start, shape)
    slope, intercept = rescale_of(item)
    whole = slope == round(slope) and intercept == round(intercept)
    kind = np.int32 if whole else np.float32
    return (raw.astype(kind) * kind(slope) + kind(intercept)), raw.dtype.name


def check_bits(item: Slice) -> tuple[int, int, int]:
    """Bits allocated, bits stored, signed (0 or 1); toolkits crash on what makes no sense.

    Raises:
        UnreadableVolume: For numbers that no CT has.
    """
    bits, signed = item.integer(dicom.BITS_ALLOCATED, 16), item.integer(dicom.PIXEL_SIGNED, 0)
    stored = item.integer(dicom.BITS_STORED, bits)
    high = item.integer(dicom.HIGH_BIT, stored - 1)
    if bits not in (8, 16, 32) or not 0 < stored <= bits or high != stored - 1:
        raise UnreadableVolume(f"{stored} bits stored in {bits} bits, the highest is bit {high}")
    if signed not in (0, 1):
        raise UnreadableVolume(f"PixelRepresentation is {signed}, it must be 0 or 1")
    return bits, stored, signed


def _plain(item: Slice, offset: int, shape: tuple[int, int]) -> np.ndarray:
    bits, stored, signed = check_bits(item)
    order = ">" if item.tags.get(dicom.TRANSFER_SYNTAX) == dicom.BIG_ENDIAN else "<"
    kind = np.dtype(f"{order}{'i' if signed else 'u'}{bits // 8}")
    count = shape[0] * shape[1]
    start = offset + item.frame * count * kind.itemsize
    if item.path.stat().st_size < start + count * kind.itemsize:
        raise UnreadableVolume(f"truncated: frame {item.frame + 1} is not in the file")
    raw = np.fromfile(item.path, kind, count, offset=start).reshape(shape)
    native = raw.astype(kind.newbyteorder("="))
    # Bits above the stored ones may hold overlays: shifting up and down drops them.
    return (native << (bits - stored)) >> (bits - stored)


def _unpack(item: Slice, start: int, shape: tuple[int, int]) -> np.ndarray:
    """Stored values `[frame, y, x]` of a compressed multi-frame object.

    The compressed frames are given to the reader under a header without rescale and position.
    """
    count = item.integer(dicom.FRAMES, 1)
    with tempfile.TemporaryDirectory() as folder, item.path.open("rb") as source:
        bare = Path(folder, "frames.dcm")
        source.seek(start)
        with bare.open("wb") as target:
            target.write(_bare_header(item, shape, count))
            shutil.copyfileobj(source, target)
        reader = open_reader(bare, "GDCMImageIO")
        size = reader.GetSize()[::-1]
        if size != (count, *shape):
            raise UnreadableVolume(f"frames are {size}, the header says {(count, *shape)}")
        scalar_type(reader)
        return np.asarray(sitk().GetArrayFromImage(read_pixels(reader, bare)))


def _bare_header(item: Slice, shape: tuple[int, int], count: int) -> bytes:
    bits, stored, signed = check_bits(item)
    numbers = {dicom.SAMPLES: 1, dicom.ROWS: shape[0], dicom.COLUMNS: shape[1],
               dicom.BITS_ALLOCATED: bits, dicom.BITS_STORED: stored, dicom.HIGH_BIT: stored - 1,
               dicom.PIXEL_SIGNED: signed}  # fmt: skip
    kind = "1.2.840.10008.5.1.4.1.1.7.3"  # multi-frame grayscale word secondary capture
    values: dict[dicom.Tag, tuple[bytes, bytes]] = {
        tag: (b"US", struct.pack("<H", number)) for tag, number in numbers.items()
    }
    values[dicom.SOP_CLASS] = b"UI", kind.encode()
    values[dicom.PHOTOMETRIC] = b"CS", b"MONOCHROME2"
    values[dicom.FRAMES] = b"IS", str(count).encode()
    syntax = _element(dicom.TRANSFER_SYNTAX, b"UI", item.tags[dicom.TRANSFER_SYNTAX].encode())
    meta = _element((0x0002, 0x0000), b"UL", struct.pack("<I", len(syntax)))
    body = b"".join(_element(tag, *values[tag]) for tag in sorted(values))
    return bytes(128) + b"DICM" + meta + syntax + body


def _element(tag: dicom.Tag, vr: bytes, value: bytes) -> bytes:
    value += (b"\0" if vr == b"UI" else b" ") * (len(value) % 2)
    return struct.pack("<HH2sH", *tag, vr, len(value)) + value
