"""What the text headers of NRRD and MetaImage promise, checked before ITK sees the file.

Both formats can name other files to read voxels from, anywhere on the disk: only a data file beside
a .mhd header is allowed. Formats: NRRD0005 (teem), MetaImage (ITK's MetaIO).
"""

from __future__ import annotations

import math
import re
import zlib
from pathlib import Path

from medspark.data.headers import MAX_BYTES, UnreadableVolume, check_promise

_LONGEST = 1 << 16
_MORE = 1 << 20  # a NRRD header may carry many key-value pairs
_NRRD_BYTES = {
    **dict.fromkeys(("signed char", "int8", "int8_t", "uchar", "unsigned char", "uint8",
                     "uint8_t", "char"), 1),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t",
                     "ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), 2),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t", "uint", "unsigned int", "uint32",
                     "uint32_t", "float"), 4),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long",
                     "signed long long int", "int64", "int64_t", "ulonglong", "unsigned long long",
                     "unsigned long long int", "uint64", "uint64_t", "double"), 8),
}  # fmt: skip
_META_BYTES = {"MET_CHAR": 1, "MET_UCHAR": 1, "MET_SHORT": 2, "MET_USHORT": 2, "MET_INT": 4,
               "MET_UINT": 4, "MET_LONG": 4, "MET_ULONG": 4, "MET_LONG_LONG": 8,
               "MET_ULONG_LONG": 8, "MET_FLOAT": 4, "MET_DOUBLE": 8}  # fmt: skip
_META_END = "ElementDataFile"


def _whole_numbers(text: str, what: str) -> list[int]:
    try:
        return [int(part) for part in text.split()]
    except ValueError as error:
        raise UnreadableVolume(f"{what} '{text[:40]}' is no list of whole numbers") from error


def check_nrrd(path: Path, max_bytes: int = MAX_BYTES) -> None:
    """Check size, type and encoding of a NRRD file with its voxels inside.

    Raises:
        UnreadableVolume: For a detached header, missing fields, or a size the file cannot hold.
    """
    with path.open("rb") as file:
        data = file.read(_MORE)
    end = re.search(rb"\r?\n\r?\n", data)
    if end is None:
        raise UnreadableVolume("NRRD header without an end")
    fields: dict[str, str] = {}
    for line in data[: end.start()].decode("latin-1").splitlines()[1:]:
        key, colon, value = line.partition(": ")
        if line.startswith("#") or not colon or ":=" in key:
            continue
        if key.strip().lower() in fields:
            raise UnreadableVolume(f"NRRD header says '{key.strip()[:40]}' twice")
        fields[key.strip().lower()] = value.strip()
    # Refused by any spelling: the field may stand without a space after the colon.
    if re.search(rb"^data ?file\s*:", data[: end.start()], re.MULTILINE | re.IGNORECASE):
        raise UnreadableVolume("NRRD header with its voxels in another file: not followed")
    for key in ("dimension", "sizes", "type", "encoding"):
        if key not in fields:
            raise UnreadableVolume(f"NRRD header without the field '{key}'")
    if any(fields.get(f"{unit} {skip}", "0") != "0" for unit in ("line", "byte")
           for skip in ("skip",)):  # fmt: skip
        raise UnreadableVolume("NRRD header with line skip or byte skip")
    _nrrd_size(path, fields, end.end(), max_bytes)


def _nrrd_size(path: Path, fields: dict[str, str], start: int, max_bytes: int) -> None:
    size = _whole_numbers(fields["sizes"], "NRRD sizes")
    if _whole_numbers(fields["dimension"], "NRRD dimension") != [len(size)]:
        raise UnreadableVolume(f"NRRD header of dimension {fields['dimension'][:9]} has {size}")
    voxel = _NRRD_BYTES.get(fields["type"].lower())
    if voxel is None:
        raise UnreadableVolume(f"NRRD voxels of type '{fields['type'][:40]}', not scalar CT")
    encoding = fields["encoding"].lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise UnreadableVolume(f"NRRD encoding '{encoding[:20]}': store it raw or gzip")
    check_promise(path, size, voxel, max_bytes, packed=encoding != "raw", before=start)


def _meta_fields(path: Path) -> tuple[dict[str, str], int]:
    """The fields of a MetaImage header, and the first byte after it."""
    with path.open("rb") as file:
        data = file.read(_LONGEST)
    fields: dict[str, str] = {}
    at = 0
    while at < len(data):
        end = data.find(b"\n", at)
        end = len(data) if end < 0 else end
        line = data[at:end].decode("latin-1").strip()
        at = end + 1
        key, mark, value = line.partition("=")
        if not mark:
            raise UnreadableVolume(f"MetaImage header line {len(fields) + 1} is no 'key = value'")
        if key.strip() in fields:
            raise UnreadableVolume(f"MetaImage header says '{key.strip()[:40]}' twice")
        fields[key.strip()] = value.strip()
        if key.strip() == _META_END:
            return fields, at
    raise UnreadableVolume(f"MetaImage header without {_META_END}")


def meta_data_file(path: Path) -> Path:
    """The data file that a .mha or .mhd header names: the file itself, or one beside a .mhd.

    Raises:
        UnreadableVolume: If it names none, several, one in another folder, or one that is missing.
    """
    name = _meta_fields(path)[0][_META_END]
    if name.upper() == "LOCAL":
        return path
    if path.suffix.lower() == ".mha" or not name or name.startswith("LIST") or "%" in name:
        raise UnreadableVolume(
            f"{_META_END} = '{name[:80]}': one data file beside a .mhd header needed"
        )
    if Path(name).name != name or "\\" in name:
        raise UnreadableVolume(f"the data file '{name[:80]}' is not in the header's folder")
    found = path.parent / name
    if not found.is_file():
        raise UnreadableVolume(f"the data file '{name[:80]}' is missing")
    if found.resolve().parent != path.parent.resolve():
        raise UnreadableVolume(f"the data file '{name[:80]}' is a link out of the header's folder")
    return found


def check_meta(path: Path, max_bytes: int = MAX_BYTES) -> None:
    """Check size, type and data file of a .mha or .mhd file.

    Raises:
        UnreadableVolume: For missing fields, a data file elsewhere, or a size it cannot hold.
    """
    fields, end = _meta_fields(path)
    data_file = meta_data_file(path)
    if fields.get("HeaderSize", "0") not in ("0", "-1"):
        raise UnreadableVolume("MetaImage with HeaderSize: write it anew without")
    size = _whole_numbers(fields.get("DimSize", ""), "DimSize")
    if _whole_numbers(fields.get("NDims", ""), "NDims") != [len(size)]:
        raise UnreadableVolume(f"MetaImage of NDims {fields.get('NDims', '')[:9]} has size {size}")
    kind = fields.get("ElementType", "")
    if kind not in _META_BYTES:
        raise UnreadableVolume(f"MetaImage voxels of type '{kind[:40]}', not scalar CT")
    channels = _whole_numbers(fields.get("ElementNumberOfChannels", "1"), "channels")
    if channels != [1]:
        raise UnreadableVolume(f"{channels} channels (RGB or vector), not scalar CT")
    packed = fields.get("CompressedData", "False").lower()[:1] in ("t", "y", "1")
    before = end if data_file == path else 0
    check_promise(data_file, size, _META_BYTES[kind], max_bytes, packed=packed, before=before)
    if packed:
        _check_inflates(data_file, before, math.prod(size) * _META_BYTES[kind])


def _check_inflates(path: Path, start: int, need: int) -> None:
    """Unpack to the end without keeping it: MetaIO goes round for ever on a damaged stream."""
    stream = zlib.decompressobj(47)
    got = 0
    try:
        with path.open("rb") as file:
            file.seek(start)
            while not stream.eof and got <= need and (chunk := file.read(1 << 16)):
                while chunk and got <= need:
                    got += len(stream.decompress(chunk, 1 << 20))
                    chunk = stream.unconsumed_tail
    except zlib.error as error:
        raise UnreadableVolume(f"truncated or corrupt voxels: {error}") from error
    if got != need or not stream.eof:
        raise UnreadableVolume(
            f"truncated or corrupt: the header promises {need} bytes of voxels, {got} unpack"
        )
