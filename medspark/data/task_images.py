"""Tasks from 2D grey pictures: `folder/{train,val,test}/{class}/*.png|jpg|tif`, or in a labels.csv.

Read with SimpleITK, which the project needs anyway. A picture's kind is told by its first bytes,
never left to ITK, and its size is checked before memory for it is taken.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medspark.data.headers import GZIP_MAX_RATIO, UnreadableVolume
from medspark.data.itk import open_reader, read_pixels, sitk
from medspark.data.task_types import Sample, Task, class_names

SPLITS = ("train", "val", "test")
MAX_PIXELS = 2**26  # of one picture: 64 Mpixel, a large mammogram is 14
_SUFFIXES = {
    ".png": "PNGImageIO",
    ".jpg": "JPEGImageIO",
    ".jpeg": "JPEGImageIO",
    ".tif": "TIFFImageIO",
    ".tiff": "TIFFImageIO",
}
_MAGIC = {
    "PNGImageIO": (b"\x89PNG\r\n\x1a\n",),
    "JPEGImageIO": (b"\xff\xd8\xff",),
    "TIFFImageIO": (b"II*\0", b"MM\0*"),
}
_PHOTOMETRIC, _MIN_IS_WHITE = 262, 0  # TIFF 6.0, section 3: PhotometricInterpretation


@dataclass(frozen=True)
class Picture:
    """A file that is one grey picture."""

    path: Path

    def read(self, name: str) -> tuple[np.ndarray, tuple[float, ...]]:
        """uint8 or uint16 `[y, x]`; the spacing is (1, 1), pictures seldom know theirs."""
        return read_picture(self.path), (1.0, 1.0)


def is_picture(path: Path) -> bool:
    """Whether the name ends as that of a picture does."""
    return path.suffix.lower() in _SUFFIXES


def read_picture(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a grey picture of 8 or 16 bits: PNG, JPEG or TIFF.

    Colour is taken only where all channels are equal, so that nothing is lost. Orientation tags
    of cameras (Exif) play no part.

    Returns:
        uint8 or uint16 `[y, x]`, white is high.

    Raises:
        UnreadableVolume: For other content than the name says, too many pixels, real colour,
            transparency, several pages, white stored as 0, or a damaged file.
    """
    kind = _SUFFIXES[path.suffix.lower()]
    with path.open("rb") as file:
        head = file.read(16)
    if not head.startswith(_MAGIC[kind]):
        word = "the file is empty" if not head else "the content is of another kind"
        raise UnreadableVolume(f"the name ends in {path.suffix}, but {word}")
    if kind == "TIFFImageIO" and _tiff_tag(path, _PHOTOMETRIC) == _MIN_IS_WHITE:
        raise UnreadableVolume("stores white as 0 (MinIsWhite): save it with black as 0")
    reader = open_reader(path, kind)
    size, channels = reader.GetSize(), reader.GetNumberOfComponents()
    pixels = math.prod(size)
    if not 0 < pixels <= max_pixels:
        raise UnreadableVolume(f"{pixels} pixels, the limit is {max_pixels}")
    if len(size) != 2 and any(n != 1 for n in size[2:]):
        raise UnreadableVolume(f"{size[2]} pages or planes, one picture is needed")
    if kind == "PNGImageIO" and pixels > 8 * GZIP_MAX_RATIO * path.stat().st_size:
        raise UnreadableVolume(f"promises {pixels} pixels, the file is too short for them")
    return _grey(sitk().GetArrayFromImage(read_pixels(reader, path)), channels)


def _grey(array: np.ndarray, channels: int) -> np.ndarray:
    if array.dtype not in (np.uint8, np.uint16):
        raise UnreadableVolume(f"pixels of {array.dtype}, 8 or 16 bits without sign are needed")
    array = array.reshape(*array.shape[-3 if channels > 1 else -2 :])
    if channels == 1:
        return array
    if channels == 4 and (array[..., 3] != np.iinfo(array.dtype).max).any():
        raise UnreadableVolume("partly transparent: its grey values depend on a background")
    if channels not in (3, 4):
        raise UnreadableVolume(f"{channels} channels, grey or RGB is needed")
    grey: np.ndarray = array[..., 0]
    unlike = int(((array[..., 1] != grey) | (array[..., 2] != grey)).sum())
    if unlike:
        raise UnreadableVolume(
            f"a colour picture ({unlike} of {grey.size} pixels are not grey): grey ones are needed, "
            "and which mix of colours is meant is yours to say"
        )
    return np.ascontiguousarray(grey)


def _tiff_tag(path: Path, tag: int) -> int | None:
    """A short number from the first directory of a TIFF file, None where it is not there."""
    with path.open("rb") as file:
        order = "<" if file.read(2) == b"II" else ">"
        file.seek(4)
        try:
            file.seek(struct.unpack(f"{order}I", file.read(4))[0])
            (count,) = struct.unpack(f"{order}H", file.read(2))
            for _ in range(count):
                key, _, _, value = struct.unpack(f"{order}HHIH2x", file.read(12))
                if key == tag:
                    return int(value)
        except struct.error:
            raise UnreadableVolume("truncated: its directory is missing") from None
    return None


def load_folder(root: Path) -> Task:
    """Load `root/{train,val,test}/{class}/*`; classes are numbered in the order of their names.

    Raises:
        FileNotFoundError: If there is no picture.
        ValueError: If a picture is a link that leaves the folder.
    """
    found: list[tuple[str, str, Path]] = []
    others = 0
    for split in SPLITS:
        for path in sorted((root / split).glob("*/*")):
            if is_picture(path) and path.is_file():
                if not path.resolve().is_relative_to(root.resolve()):
                    raise ValueError(f"'{path}' is a link that leaves the folder '{root}'")
                found.append((split, path.parent.name, path))
            elif not path.name.startswith("."):
                others += 1
    if not found:
        raise FileNotFoundError(f"no pictures in '{root}/{{train,val,test}}/{{class}}'")
    names = sorted({name for _, name, _ in found})
    samples, places = [], {}
    for split, name, path in found:
        sample = path.relative_to(root).as_posix()
        samples.append(Sample(sample, sample, names.index(name), name, split))
        places[sample] = Picture(path)
    return Task(
        name=root.resolve().name,
        root=root,
        samples=samples,
        class_names=class_names(f"'{root}'", samples),
        grey=True,
        dims=2,
        warnings=_warnings(found, names, others),
        places=places,
    )


def _warnings(found: list[tuple[str, str, Path]], names: list[str], others: int) -> list[str]:
    lines = [
        "a folder of pictures knows no patients: each picture counts as a patient of its own, and "
        "splits may share people; a labels.csv can name them"
    ]
    there = {(split, name) for split, name, _ in found}
    for split in SPLITS:
        missing = [name for name in names if (split, name) not in there]
        if missing:
            lines.append(f"the split '{split}' has no picture of {', '.join(missing)}")
    if others:
        lines.append(f"{others} other file(s) in the folders of classes are left out")
    return lines
