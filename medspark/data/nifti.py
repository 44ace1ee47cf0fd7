"""NIfTI files: header checked against the file, and voxels where ITK cannot read them right.

Format: the NIfTI-1 and NIfTI-2 headers (nifti1.h, nifti2.h).
"""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

import numpy as np

from medspark.data.headers import (
    STRAIGHT,
    Header,
    UnreadableVolume,
    check_promise,
    shear_angle,
)

# NIfTI datatype codes of real scalars.
_NIFTI_TYPES = {
    2: "uint8", 256: "int8", 4: "int16", 512: "uint16", 8: "int32", 768: "uint32",
    16: "float32", 64: "float64", 1024: "int64", 1280: "uint64",
}  # fmt: skip


@dataclass(frozen=True)
class _Nifti:
    dims: tuple[int, ...]
    datatype: int
    bits: int
    voxel_size: tuple[float, ...]
    offset: float
    scale: tuple[float, float]
    sform: np.ndarray | None


def _parse_nifti(head: bytes) -> tuple[_Nifti, Literal["<", ">"]]:
    """The fields that matter, and the byte order."""
    orders: tuple[Literal["<", ">"], ...] = ("<", ">")
    order = next((o for o in orders if struct.unpack_from(o + "i", head)[0] in (348, 540)), None)
    if order is None:
        raise UnreadableVolume("NIfTI header without its size mark")
    if struct.unpack_from(order + "i", head)[0] == 540:
        if len(head) < 540:
            raise UnreadableVolume(f"NIfTI-2 header cut short after {len(head)} bytes")
        fields = dict(dim=(16, "8q"), kind=(12, "2h"), pix=(104, "8d"), offset=(168, "q"))
        fields |= dict(scale=(176, "2d"))
        fields |= dict(code=(348, "i"), rows=(400, "12d"))
    else:
        fields = dict(dim=(40, "8h"), kind=(70, "2h"), pix=(76, "8f"), offset=(108, "f"))
        fields |= dict(scale=(112, "2f"))
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
        scale=(float(got["scale"][0]), float(got["scale"][1])),
        sform=np.array(got["rows"]).reshape(3, 4) if got["code"][0] > 0 else None,
    )
    if not 348 <= nifti.offset < 1 << 24:
        raise UnreadableVolume(f"the header says that voxels start at byte {nifti.offset}")
    return nifti, order


def check_nifti(path: Path, max_bytes: int, *, gzipped: bool) -> Header:
    """Check header and voxels against the file, see `headers.check_file`."""
    try:
        with cast(IO[bytes], gzip.open(path) if gzipped else path.open("rb")) as file:
            head = file.read(540)
            if len(head) < 348:
                raise UnreadableVolume(f"NIfTI header cut short after {len(head)} bytes")
            nifti, order = _parse_nifti(head)
            if nifti.datatype not in _NIFTI_TYPES:
                raise UnreadableVolume(_no_scalar(nifti.datatype))
            size = np.dtype(_NIFTI_TYPES[nifti.datatype]).itemsize
            if nifti.bits != 8 * size:
                raise UnreadableVolume(f"NIfTI type {nifti.datatype} with {nifti.bits} bits")
            check_promise(path, nifti.dims, size, max_bytes)
            _check_voxels(file, nifti, order)
    except (OSError, EOFError, zlib.error) as error:
        raise UnreadableVolume(f"truncated or corrupt file: {error}") from error
    if not all(np.isfinite(v) and v > 0 for v in nifti.voxel_size):
        raise UnreadableVolume(f"voxel size {nifti.voxel_size} mm is not positive")
    affine = None
    if nifti.sform is not None and shear_angle(nifti.sform[:, :3]) > STRAIGHT:
        affine = nifti.sform * np.array([[-1.0], [-1.0], [1.0]])  # NIfTI's world is RAS
    return Header(_NIFTI_TYPES[nifti.datatype], affine)


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


def nifti_voxels(path: Path) -> np.ndarray:
    """Voxels `[k, j, i]` of a file that `check_nifti` has passed, with slope and intercept.

    Raises:
        UnreadableVolume: If it is no 3D image.
    """
    with cast(IO[bytes], gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")) as f:
        nifti, order = _parse_nifti(f.read(540))
        shape = (*nifti.dims, 1, 1, 1)
        if any(n != 1 for n in shape[3:]):
            raise UnreadableVolume(
                f"{len(nifti.dims)}D image of size {nifti.dims}: one volume needed"
            )
        kind = np.dtype(_NIFTI_TYPES[nifti.datatype]).newbyteorder(order)
        f.seek(int(nifti.offset))
        data = f.read(int(np.prod(shape[:3], dtype=object)) * kind.itemsize)
    stored = np.frombuffer(data, kind).reshape(shape[2::-1])
    slope, intercept = nifti.scale
    if slope == 0 or not np.isfinite((slope, intercept)).all() or (slope, intercept) == (1, 0):
        return stored.astype(kind.newbyteorder("="))
    return stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)
