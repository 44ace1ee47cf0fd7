"""The C++ readers (SimpleITK): opened quietly, errors in one line without paths or addresses."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from medspark.data.headers import UnreadableVolume

_quiet_lock = threading.Lock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the C++ readers from writing to the terminal; exceptions carry what matters.

    Works on the file descriptor, as these libraries write to it directly.
    """
    with _quiet_lock, tempfile.TemporaryFile() as sink:
        before = os.dup(2)
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)


def sitk() -> Any:
    """SimpleITK, imported at its first use."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def _last_line(error: Exception, path: Path) -> str:
    # ITK's text names the file with its whole path, which may hold a person's name.
    text = str(error).replace(str(path), "the file").replace(path.name, "the file")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Class names with addresses, as in "GDCMImageIO(0x5581...): ", would differ on every run.
    return re.sub(r"\w+\(0x[0-9a-f]+\): |(sitk::|ITK )ERROR: ", "", (lines or [""])[-1])[:200]


def open_reader(path: Path, image_io: str = "") -> Any:
    """An ITK reader that has read the header of `path`. Raises UnreadableVolume."""
    reader = sitk().ImageFileReader()
    reader.SetFileName(str(path))
    if image_io:
        reader.SetImageIO(image_io)
    try:
        with quiet():
            reader.ReadImageInformation()
    except (RuntimeError, MemoryError) as error:
        raise UnreadableVolume(f"unreadable header: {_last_line(error, path)}") from error
    return reader


def read_pixels(reader: Any, path: Path) -> Any:
    """The image of an opened reader. Raises UnreadableVolume."""
    try:
        with quiet():
            return reader.Execute()
    except (RuntimeError, MemoryError) as error:
        raise UnreadableVolume(f"truncated or corrupt voxels: {_last_line(error, path)}") from error


def scalar_type(reader: Any) -> np.dtype[Any]:
    """Voxel type of an opened reader. Raises UnreadableVolume for what is no real scalar."""
    kind = sitk().GetPixelIDValueAsString(reader.GetPixelID())
    if reader.GetNumberOfComponents() != 1 or "complex" in kind or "vector" in kind:
        raise UnreadableVolume(f"{kind} voxels (RGB, vector or complex), not scalar CT")
    view = sitk().GetArrayViewFromImage(sitk().Image([1, 1], reader.GetPixelID()))
    return np.dtype(view.dtype)
