"""Tasks from MedMNIST files: an `.npz` with images and labels of each split.

`train_images`, `val_images`, `test_images`: uint8 `[N, D, H, W]` (MedMNIST-3D) or `[N, H, W]`, a
channel axis of 1 allowed; `train_labels` ...: whole numbers `[N]` or `[N, 1]`. Facts of the format
are from medmnist.com (Yang et al., Scientific Data 10:41, 2023).

The file is not trusted: nothing is unpickled, only arrays of these names are opened, and what they
promise is compared with the file and with a limit before anything is unpacked.
"""

from __future__ import annotations

import contextlib
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO, cast

import numpy as np

from medspark.data.headers import GZIP_MAX_RATIO, MAX_BYTES
from medspark.data.task_types import Sample, Task, class_names

_SPLITS = ("train", "val", "test")
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError,
    struct.error, SyntaxError, MemoryError, OverflowError, UnicodeError, TypeError, TokenError,
)  # fmt: skip
_SLACK = 4096  # bytes: a very short member may pack better than deflate's limit


@dataclass(frozen=True)
class Entry:
    """One image of an array file."""

    path: Path
    split: str
    index: int

    def read(self, name: str) -> tuple[np.ndarray, tuple[float, ...]]:
        """uint8 `[z, y, x]` or `[y, x]`; the spacing is unknown, so 1."""
        image = np.ascontiguousarray(_images(self.path, self.split)[self.index])
        return image, (1.0,) * image.ndim


@lru_cache(maxsize=3)
def _images(path: Path, split: str) -> np.ndarray:
    with _opened(path) as file:
        images = _read(file, path, f"{split}_images")
    return images.reshape(_plain_shape(path, split, images.shape))


def load_arrays(path: Path, max_bytes: int = MAX_BYTES) -> Task:
    """Load a MedMNIST-like `.npz`. Images are unpacked when the first of a split is read.

    Args:
        path: The file.
        max_bytes: Most that all arrays together may need.

    Raises:
        ValueError: If it is damaged, promises too much, holds pickled objects or names with
            "..", lacks a split's labels, or is not as described above.
    """
    samples: list[Sample] = []
    places: dict[str, Entry] = {}
    dims = set()
    with _opened(path) as file:
        splits = [s for s in _SPLITS if f"{s}_images.npy" in file.namelist()]
        if not splits:
            raise ValueError(f"'{path}' has no train_images, val_images or test_images")
        shapes = _shapes(file, path, splits, max_bytes)
        for split in splits:
            labels = _labels(_read(file, path, f"{split}_labels"), path, split, shapes[split][0])
            dims.add(len(shapes[split]) - 1)
            for index, label in enumerate(labels.tolist()):
                name = f"{split}/{index:05d}"
                samples.append(Sample(name, name, label, str(label), split))
                places[name] = Entry(path, split, index)
    if len(dims) != 1:
        raise ValueError(f"'{path}' has pictures in one split and volumes in another")
    return Task(
        name=path.stem,
        root=path.parent,
        samples=samples,
        class_names=class_names(f"'{path}'", samples),
        grey=True,
        dims=dims.pop(),
        warnings=[
            "the file knows no patients: each sample counts as a patient of its own, and splits may "
            "share people; classes have numbers only",
            "NoduleMNIST3D is cut from LIDC-IDRI: for its results leave LIDC-IDRI out of the "
            "pre-training",
        ],
        places=places,
    )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; whatever damage does while it is open becomes one ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"no file '{path}'")
    try:
        with zipfile.ZipFile(path) as file:
            _check_names(file, path)
            yield file
    except _DAMAGE as error:
        raise ValueError(f"'{path}' is no sound .npz file: {error}") from error


def _check_names(file: zipfile.ZipFile, path: Path) -> None:
    names = file.namelist()
    for name in names:
        if ".." in name or name.startswith("/") or "\\" in name or "\0" in name:
            raise ValueError(f"'{path}' holds an array with the name '{name[:80]}': not trusted")
    if len(set(names)) < len(names):
        raise ValueError(f"'{path}' holds two arrays of the same name")


def _header(file: zipfile.ZipFile, path: Path, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array, checked against its place in the archive."""
    try:
        info = file.getinfo(f"{name}.npy")
    except KeyError:
        raise ValueError(f"'{path}' lacks the array {name}") from None
    with file.open(info) as member:
        try:
            shape, dtype = _array_header(cast("BinaryIO", member))
        except ValueError as error:  # numpy's words name no file
            raise ValueError(f"'{path}': {name}: {error}") from error
        start = member.tell()
    if dtype.kind not in "iub":  # objects too
        raise ValueError(f"'{path}': {name} holds {dtype} values, whole numbers are needed")
    if any(n < 0 for n in shape):
        raise ValueError(f"'{path}': {name} has the shape {shape}")
    promised = start + math.prod(shape) * dtype.itemsize
    if info.file_size != promised:
        raise ValueError(f"'{path}': {name} promises {promised} bytes, {info.file_size} are packed")
    room = min(info.compress_size, path.stat().st_size)
    if promised > GZIP_MAX_RATIO * room + _SLACK:
        raise ValueError(f"'{path}': {name} promises {promised} bytes from {room} packed ones")
    return shape, dtype


def _array_header(member: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(member)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(member)
    else:
        raise ValueError(f"npy version {version} is not known")
    return tuple(shape), dtype


def _shapes(
    file: zipfile.ZipFile, path: Path, splits: list[str], max_bytes: int
) -> dict[str, tuple[int, ...]]:
    """Plain shape of each split's images. Nothing is unpacked."""
    shapes, need = {}, 0
    for split in splits:
        shape, dtype = _header(file, path, f"{split}_images")
        if dtype != np.uint8:
            raise ValueError(f"'{path}': {split}_images are {dtype}, uint8 is needed")
        labels, label_type = _header(file, path, f"{split}_labels")
        need += math.prod(shape) + math.prod(labels) * label_type.itemsize
        shapes[split] = _plain_shape(path, split, shape)
    if need > max_bytes:
        raise ValueError(
            f"'{path}' promises {need / 2**30:.1f} GiB, the limit is {max_bytes / 2**30:g} GiB"
        )
    return shapes


def _plain_shape(path: Path, split: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without a channel axis of 1. Raises ValueError for colour and the like."""
    plain = shape
    if len(shape) in (4, 5) and 1 in (shape[1], shape[-1]):
        plain = shape[:-1] if shape[-1] == 1 else (shape[0], *shape[2:])
    if len(plain) == 4 and plain[-1] == 3:
        raise ValueError(f"'{path}': {split}_images {shape} are colour pictures, grey is needed")
    if len(plain) not in (3, 4) or 0 in plain:
        raise ValueError(
            f"'{path}': {split}_images have the shape {shape}, [N, D, H, W] or [N, H, W] is needed"
        )
    return plain


def _read(file: zipfile.ZipFile, path: Path, name: str) -> np.ndarray:
    _header(file, path, name)
    with file.open(f"{name}.npy") as member:
        try:
            return np.lib.format.read_array(cast("BinaryIO", member), allow_pickle=False)
        except ValueError as error:
            raise ValueError(f"'{path}': {name}: {error}") from error


def _labels(labels: np.ndarray, path: Path, split: str, count: int) -> np.ndarray:
    if labels.shape not in ((count,), (count, 1)):
        raise ValueError(
            f"'{path}': {split}_labels have the shape {labels.shape} for {count} images; "
            "one class per image is needed"
        )
    if labels.min() < 0:
        raise ValueError(f"'{path}': {split}_labels go down to {labels.min()}, classes start at 0")
    return labels.reshape(-1).astype(np.int64)
