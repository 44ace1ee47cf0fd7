"""What a file's header promises, checked against the file itself before anything is allocated.

ITK reads a truncated NIfTI file without complaint and fills the rest with whatever is in memory,
and silently replaces a zero voxel size by 1. So these checks are made here.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

AIR = -1024  # lowest stored HU; scanners pad with lower values, which carry nothing
MAX_BYTES = 2**32  # of the voxels of one volume, unless the caller says otherwise
STRAIGHT = 0.5  # degrees: axes that miss a right angle by less are taken as they are
GZIP_MAX_RATIO = 1032  # deflate cannot pack more than this into a byte
_LONGEST_REASON = 300
SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")


class UnreadableVolume(ValueError):
    """A file or series that must not be used as a CT volume.

    Attributes:
        reason: Why, in one line, for the manifest.
    """

    def __init__(self, reason: str) -> None:
        # Parts of it may come from the file: no line breaks, nothing endless.
        self.reason = re.sub(r"[\x00-\x1f\x7f-\x9f]+", "?", reason)[:_LONGEST_REASON]
        super().__init__(self.reason)


@dataclass
class Header:
    """What the checks found out.

    Attributes:
        stored_type: Voxel type in the file, None where the reader has to say it.
        affine: Voxel index (i, j, k, 1) to mm in the LPS frame, `[3, 4]`, of a sheared NIfTI file,
            which ITK squares without a word or refuses; None elsewhere.
    """

    stored_type: str | None = None
    affine: np.ndarray | None = None


def image_suffix(path: Path) -> str | None:
    """The suffix of `SUFFIXES` that the file name ends in, whatever its case, or None."""
    name = path.name.lower()
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s)), None)


def check_file(path: Path, max_bytes: int = MAX_BYTES) -> Header:
    """Check that a .nii, .nii.gz, .nrrd, .mha or .mhd file is what its suffix says, and whole.

    Raises:
        UnreadableVolume: For an empty file, content of another kind, a header that promises more
            voxels than the file has or than `max_bytes` hold, an impossible voxel size, or a
            header that names a data file in another folder.
    """
    # These modules use the checks of this one.
    from medspark.data.nifti import check_nifti
    from medspark.data.text_headers import check_meta, check_nrrd

    if not path.is_file():
        raise UnreadableVolume("no such file")
    if path.stat().st_size == 0:
        raise UnreadableVolume("the file is empty")
    suffix, kind = image_suffix(path), _content(path)
    expected = {".nii": "NIfTI", ".nii.gz": "gzip NIfTI", ".nrrd": "NRRD"}.get(suffix or "", "Meta")
    if kind != expected:
        raise UnreadableVolume(f"the name ends in {suffix} but the content is {kind or 'unknown'}")
    if "NIfTI" in kind:
        return check_nifti(path, max_bytes, gzipped=suffix == ".nii.gz")
    (check_nrrd if kind == "NRRD" else check_meta)(path, max_bytes)
    return Header()


def check_promise(
    path: Path,
    size: Sequence[int],
    voxel_bytes: int,
    max_bytes: int = MAX_BYTES,
    *,
    packed: bool | None = True,
    before: int = 0,
) -> None:
    """Refuse sizes that are too large to hold, or larger than the file can unpack to.

    Args:
        path: The file that holds the voxels.
        size: Voxels along each axis.
        voxel_bytes: Bytes of a voxel as it is stored.
        max_bytes: Most that the voxels may need.
        packed: True if the file is compressed, False if not, None to leave its size alone.
        before: Bytes in the file before the voxels.

    Raises:
        UnreadableVolume: If the header promises too much.
    """
    if not size or any(n <= 0 for n in size):
        raise UnreadableVolume(f"the header says size {tuple(size)}")
    voxels = math.prod(int(n) for n in size)
    need = voxels * voxel_bytes
    if need > max_bytes:
        raise UnreadableVolume(
            f"the header promises {voxels} voxels ({need / 2**30:.1f} GiB), the limit is "
            f"{max_bytes / 2**30:g} GiB (max_gib)"
        )
    on_disk = max(0, path.stat().st_size - before)
    if packed is not None and need > on_disk * (GZIP_MAX_RATIO if packed else 1):
        word = "promises" if packed else "truncated or corrupt: the header promises"
        start = f"the header {word}" if packed else word
        raise UnreadableVolume(f"{start} {need} bytes of voxels, the file has {on_disk}")


def _content(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(1024)
    zipped = head[:2] == b"\x1f\x8b"
    if zipped:
        try:
            head = zlib.decompressobj(31).decompress(head, 1024) if len(head) > 18 else b""
        except zlib.error:
            return "corrupt gzip"
    if head[344:347] in (b"n+1", b"ni1") or head[4:7] == b"n+2":
        return "gzip NIfTI" if zipped else "NIfTI"
    if head[:4] == b"NRRD":
        return "gzip NRRD" if zipped else "NRRD"
    if b"ObjectType" in head or b"NDims" in head:
        return "Meta"
    return "DICOM" if head[128:132] == b"DICM" else None


def shear_angle(axes: np.ndarray) -> float:
    """Largest angle in degrees by which the columns of `axes` (`[3, 3]`) miss a right angle.

    Raises:
        UnreadableVolume: If an axis is zero or not finite.
    """
    sound = np.isfinite(axes).all() and np.abs(axes).max() < 1e12
    norms = np.linalg.norm(axes, axis=0) if sound else np.zeros(3)
    if not (norms > 1e-12).all():
        raise UnreadableVolume("the header's axes have length zero or are not finite")
    cosines = np.abs((axes / norms).T @ (axes / norms) - np.eye(3)).max()
    return float(np.degrees(np.arcsin(min(1.0, cosines))))
