"""What a file's header promises, checked against the file itself before anything is allocated.

ITK reads a truncated NIfTI file without complaint and fills the rest with whatever is in memory,
and silently replaces a zero voxel size by 1. So these checks are made here.
Format: the NIfTI-1 and NIfTI-2 headers (nifti1.h, nifti2.h).
"""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, cast

import numpy as np

MAX_VOXELS = 2**31
GZIP_MAX_RATIO = 1032  # deflate cannot pack more than this into a byte
SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")

# NIfTI datatype codes of real scalars.
_NIFTI_TYPES = {
    2: "uint8", 256: "int8", 4: "int16", 512: "uint16", 8: "int32", 768: "uint32",
    16: "float32", 64: "float64", 1024: "int64", 1280: "uint64",
}  # fmt: skip


class UnreadableVolume(ValueError):
    """A file or series that must not be used as a CT volume.

    Attributes:
        reason: Why, in one line, for the manifest.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass
class Header:
    """What the checks found out. `stored_type` is None where the reader has to say it."""

    stored_type: str | None = None
    warnings: list[str] = field(default_factory=list)


def image_suffix(path: Path) -> str | None:
    """The suffix of `SUFFIXES` that the file name ends in, whatever its case, or None."""
    name = path.name.lower()
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s)), None)


def check_file(path: Path) -> Header:
    """Check that a .nii, .nii.gz, .nrrd, .mha or .mhd file is what its suffix says, and whole.

    Raises:
        UnreadableVolume: For an empty file, content of another kind, NIfTI that is truncated,
            promises more voxels than it has or has an impossible voxel size, or a .mhd header
            whose data file is missing.
    """
    if not path.is_file():
        raise UnreadableVolume("no such file")
    if path.stat().st_size == 0:
        raise UnreadableVolume("the file is empty")
    suffix, kind = image_suffix(path), _content(path)
    expected = {".nii": "NIfTI", ".nii.gz": "gzip NIfTI", ".nrrd": "NRRD"}.get(suffix or "", "Meta")
    if kind != expected:
        raise UnreadableVolume(f"the name ends in {suffix} but the content is {kind or 'unknown'}")
    return _check_nifti(path, gzipped=suffix == ".nii.gz") if "NIfTI" in kind else Header()


def check_promise(path: Path, size: tuple[int, ...], voxel_bytes: int) -> None:
    """Refuse sizes that are too large to hold, or larger than the file can unpack to.

    Args:
        path: The file; the data file of a .mhd header counts too.
        size: Voxels along each axis.
        voxel_bytes: Bytes of a voxel as it is stored.

    Raises:
        UnreadableVolume: If the header promises too much.
    """
    voxels = int(np.prod(size, dtype=object))
    if voxels <= 0:
        raise UnreadableVolume(f"the header says size {size}")
    if voxels > MAX_VOXELS:
        raise UnreadableVolume(f"the header promises {voxels} voxels, the limit is {MAX_VOXELS}")
    on_disk = path.stat().st_size
    if image_suffix(path) == ".mhd":
        on_disk += meta_data_file(path).stat().st_size
    if voxels * voxel_bytes > on_disk * GZIP_MAX_RATIO:
        raise UnreadableVolume(
            f"the header promises {voxels * voxel_bytes} bytes of voxels, the file has {on_disk}"
        )


def meta_data_file(path: Path) -> Path:
    """The data file that a .mhd header names, beside the header.

    Raises:
        UnreadableVolume: If it names none, several, one in another folder, or one that is missing.
    """
    text = path.read_bytes()[:65536].decode("latin-1")
    found = re.search(r"^ElementDataFile\s*=\s*(.+?)\s*$", text, re.MULTILINE)
    name = found.group(1) if found else ""
    if not name or name.startswith("LIST") or "%" in name:
        raise UnreadableVolume(
            f"ElementDataFile = '{name}': one data file beside the header needed"
        )
    if name == "LOCAL":
        return path
    if Path(name).name != name:
        raise UnreadableVolume(f"the data file '{name}' is not in the header's folder")
    if not (path.parent / name).is_file():
        raise UnreadableVolume(f"the data file '{name}' is missing")
    return path.parent / name


def _content(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(1024)
    zipped = head[:2] == b"\x1f\x8b"
    if zipped:
        head = zlib.decompressobj(31).decompress(head, 1024) if len(head) > 18 else b""
    if head[344:347] in (b"n+1", b"ni1") or head[4:7] == b"n+2":
        return "gzip NIfTI" if zipped else "NIfTI"
    if head[:4] == b"NRRD":
        return "gzip NRRD" if zipped else "NRRD"
    if b"ObjectType" in head or b"NDims" in head:
        return "Meta"
    return "DICOM" if head[128:132] == b"DICM" else None


@dataclass(frozen=True)
class _Nifti:
    dims: tuple[int, ...]
    datatype: int
    bits: int
    voxel_size: tuple[float, ...]
    offset: float
    sform: np.ndarray | None


def _parse_nifti(head: bytes) -> tuple[_Nifti, Literal["<", ">"]]:
    """The fields that matter, and the byte order."""
    orders: tuple[Literal["<", ">"], ...] = ("<", ">")
    order = next((o for o in orders if struct.unpack_from(o + "i", head)[0] in (348, 540)), None)
    if order is None:
        raise UnreadableVolume("NIfTI header without its size mark")
    if struct.unpack_from(order + "i", head)[0] == 540:
        fields = dict(dim=(16, "8q"), kind=(12, "2h"), pix=(104, "8d"), offset=(168, "q"))
        fields |= dict(code=(348, "i"), rows=(400, "12d"))
    else:
        fields = dict(dim=(40, "8h"), kind=(70, "2h"), pix=(76, "8f"), offset=(108, "f"))
        fields |= dict(code=(254, "h"), rows=(280, "12f"))
    got = {k: struct.unpack_from(order + form, head, at) for k, (at, form) in fields.items()}
    rank = got["dim"][0]
    if not 1 <= rank <= 7:
        raise UnreadableVolume(f"NIfTI header says {rank} dimensions")
    nifti = _Nifti(
        dims=tuple(got["dim"][1 : rank + 1]),
        datatype=got["kind"][0],
        bits=got["kind"][1],
        voxel_size=tuple(got["pix"][1 : min(rank, 3) + 1]),
        offset=float(got["offset"][0]),
        sform=np.array(got["rows"]).reshape(3, 4)[:, :3] if got["code"][0] > 0 else None,
    )
    if not 348 <= nifti.offset < 1 << 24:
        raise UnreadableVolume(f"the header says that voxels start at byte {nifti.offset}")
    return nifti, order


def _check_nifti(path: Path, *, gzipped: bool) -> Header:
    try:
        with cast(IO[bytes], gzip.open(path) if gzipped else path.open("rb")) as file:
            head = file.read(540)
            if len(head) < 348:
                raise UnreadableVolume(f"NIfTI header cut short after {len(head)} bytes")
            nifti, order = _parse_nifti(head)
            if nifti.datatype not in _NIFTI_TYPES:
                raise UnreadableVolume(_no_scalar(nifti.datatype))
            if any(n <= 0 for n in nifti.dims):
                raise UnreadableVolume(f"the header says size {nifti.dims}")
            check_promise(path, nifti.dims, max(1, nifti.bits // 8))
            _check_voxels(file, nifti, order)
    except (OSError, EOFError, zlib.error) as error:
        raise UnreadableVolume(f"truncated or corrupt file: {error}") from error
    if not all(np.isfinite(v) and v > 0 for v in nifti.voxel_size):
        raise UnreadableVolume(f"voxel size {nifti.voxel_size} mm is not positive")
    shear = [] if nifti.sform is None else shear_warning(nifti.sform)
    return Header(_NIFTI_TYPES[nifti.datatype], shear)


def _check_voxels(file: IO[bytes], nifti: _Nifti, order: Literal["<", ">"]) -> None:
    """Read to the end: enough bytes, and no NaN (ITK would quietly turn it into 0)."""
    offset, end = int(nifti.offset), 0
    need = offset + int(np.prod(nifti.dims, dtype=object)) * (nifti.bits // 8)
    kind = np.dtype(_NIFTI_TYPES[nifti.datatype]).newbyteorder(order)
    bad = 0
    file.seek(offset)
    while chunk := file.read(1 << 20):
        end += len(chunk)
        if kind.kind == "f":
            whole = len(chunk) // kind.itemsize * kind.itemsize
            bad += int((~np.isfinite(np.frombuffer(chunk[:whole], kind))).sum())
    if offset + end < need:
        raise UnreadableVolume(
            f"truncated: the header promises {need} bytes ({nifti.dims} voxels), there are "
            f"{offset + end}"
        )
    if bad:
        raise UnreadableVolume(f"{bad} NaN or infinite voxels")


def _no_scalar(datatype: int) -> str:
    kinds = {32: "complex", 1792: "complex", 128: "RGB", 2304: "RGBA"}
    return f"{kinds.get(datatype, 'unsupported')} voxels (NIfTI type {datatype}), not scalar CT"


def shear_warning(axes: np.ndarray) -> list[str]:
    """One warning if the columns of `axes` (`[3, 3]`) are not at right angles to each other."""
    norms = np.linalg.norm(axes, axis=0)
    if not (norms > 0).all():
        raise UnreadableVolume("the header's axes have length zero")
    cosines = np.abs((axes / norms).T @ (axes / norms) - np.eye(3)).max()
    angle = float(np.degrees(np.arcsin(min(1.0, cosines))))
    return [f"sheared by {angle:.1f} degrees: stored without correction"] if angle > 0.5 else []
