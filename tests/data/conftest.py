"""Small CT-like files, made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from medspark.data.phantom import kept_locale
from medspark.data.store import Record, Store, write_array

SeriesWriter = Callable[..., list[Path]]


@pytest.fixture
def hu() -> np.ndarray:
    """int16 `[12, 20, 24]`, no symmetry anywhere, from -1000 to 1000."""
    return np.random.default_rng(7).integers(-1000, 1001, (12, 20, 24)).astype(np.int16)


@pytest.fixture
def write_image() -> Callable[..., Path]:
    """Write `[z, y, x]` with spacing (z, y, x) to a file in any format SimpleITK knows."""

    def write(
        path: Path,
        array: np.ndarray,
        spacing: tuple[float, float, float] = (3.0, 2.0, 1.0),
        direction: tuple[float, ...] | None = None,
        compress: bool = True,
    ) -> Path:
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(spacing[::-1])
        if direction is not None:
            image.SetDirection(direction)
        path.parent.mkdir(parents=True, exist_ok=True)
        with kept_locale():
            sitk.WriteImage(image, str(path), useCompression=compress)
        return path

    return write


@pytest.fixture
def write_series() -> SeriesWriter:
    """Write `[z, y, x]` as DICOM slices 3 mm apart; returns the files from foot to head."""

    def write(
        folder: Path,
        array: np.ndarray,
        *,
        uid: str = "1.2.3.4",
        patient: str = "someone",
        step: tuple[float, float, float] = (0.0, 0.0, 3.0),
        intercept: int = -1024,
        **tags: str,
    ) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        paths = []
        for z, plane in enumerate(array):
            position = [10 + z * step[0], 20 + z * step[1], 30 + z * step[2]]
            image = sitk.GetImageFromArray(plane[None])
            image.SetSpacing((1.0, 2.0, 3.0))
            image.SetOrigin(position)
            values = {
                "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
                "0008|0018": f"{uid}.{z + 1}",
                "0008|0060": "CT",
                "0010|0020": patient,
                "0020|000e": uid,
                "0020|0032": "\\".join(f"{p:g}" for p in position),
                "0020|0037": "1\\0\\0\\0\\1\\0",
                "0028|1052": str(intercept),
                "0028|1053": "1",
            }
            for tag, value in (values | tags).items():
                image.SetMetaData(tag, value)
            # Names run against the positions, so that only sorting by position is right.
            paths.append(folder / f"{len(array) - z:03d}.dcm")
            writer.SetFileName(str(paths[-1]))
            with kept_locale():
                writer.Execute(image)
        return paths

    return write


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., Store]:
    """A store of given arrays: `make_store({"id": (patient, array)})`."""

    def make(volumes: dict[str, tuple[str, np.ndarray]]) -> Store:
        store = Store.create(tmp_path / "store")
        for name, (_, array) in volumes.items():
            write_array(store.volume_path(name), array)
        store.put(
            Record(id=name, source=f"{name}.mha", patient=patient, size=array.shape,
                   spacing=(2.0, 1.0, 1.0))
            for name, (patient, array) in volumes.items()
        )  # fmt: skip
        return store

    return make
