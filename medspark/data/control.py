"""The phantom positive control: a task where pre-training must help if it works at all.

Each phantom is a cube of fibres in noise. They lean to the left or to the right, which is the class.
One class is the mirror image of the other, so that every statistic that ignores places, the HU
histogram among them, has the same distribution in both. The direction shows only where many voxels
are put together, and the noise is stronger than the fibres: a few labelled cubes do not teach it,
and filling in hidden cells needs it. Cubes whose voxels were shuffled keep their
histogram and lose the fibres: pre-training on them must not help.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from medspark.data.store import write_atomically
from medspark.data.windows import Intensity

CLASS_NAMES = ("left", "right")
WINDOW = "soft_tissue"
SPACING = 1.5  # mm
_TISSUE, _CONTRAST = 40.0, 60.0  # HU: mean, and SD of the noise
_FIBRES, _SHADING = 0.7, 0.5  # SD of fibres and of slow changes, in units of the noise
_LEAN = (20.0, 70.0)  # degrees between fibre and x axis, in the plane
_TILT = 0.5  # greatest slope out of the plane
_PERIOD = (5.0, 9.0)  # voxels from fibre to fibre
_LENGTH = 0.03  # cycles per voxel along a fibre: about ten voxels of one grey value
_SLOW = 0.04  # cycles per voxel of the shading


def fibre_phantom(seed: int, index: int, label: int, size: int = 32) -> np.ndarray:
    """Phantom `index` of a series, int16 HU `[z, y, x]`, a function of its arguments.

    Args:
        seed: Series.
        index: Number in the series.
        label: 0 leans to the left, 1 is mirrored along x.
        size: Edge in voxels.
    """
    rng = np.random.default_rng([seed, index])
    k = np.stack(np.meshgrid(*[np.fft.fftfreq(size)] * 3, indexing="ij"))
    lean = math.radians(rng.uniform(*_LEAN))
    direction = np.array([rng.uniform(-_TILT, _TILT), math.sin(lean), math.cos(lean)])
    direction /= np.linalg.norm(direction)
    squared = (k**2).sum(0)
    along = np.tensordot(direction, k, 1)
    across = np.sqrt(np.maximum(squared - along**2, 0))
    centre = 1 / rng.uniform(*_PERIOD)
    ring = np.exp(-0.5 * ((across - centre) / (0.3 * centre)) ** 2 - 0.5 * (along / _LENGTH) ** 2)
    strength = _FIBRES * rng.uniform(0.7, 1.3)
    values = strength * _noise(rng, ring) + _SHADING * _noise(
        rng, np.exp(-0.5 * squared / _SLOW**2)
    )
    values += rng.standard_normal(values.shape)
    if label:
        values = values[:, :, ::-1]
    return np.round(_TISSUE + _CONTRAST * values).astype(np.int16)


def _noise(rng: np.random.Generator, gain: np.ndarray) -> np.ndarray:
    """Noise with the amplitude `gain` at each frequency, scaled to SD 1."""
    values = np.fft.ifftn(np.fft.fftn(rng.standard_normal(gain.shape)) * gain).real
    found: np.ndarray = values / values.std()
    return found


class FibrePhantoms(Dataset[torch.Tensor]):
    """Unlabelled phantoms for pre-training, as many as are asked for.

    Args:
        seed: Series; keep it apart from that of the labelled ones.
        length: Phantoms.
        shuffled: Shuffle the voxels of each: the negative control.
        size: Edge in voxels.
    """

    def __init__(self, seed: int, length: int, *, shuffled: bool = False, size: int = 32) -> None:
        self.seed, self.length, self.shuffled, self.size = seed, length, shuffled, size
        self.intensity = Intensity.named(WINDOW)

    def __len__(self) -> int:
        """Phantoms."""
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        """Phantom `index` as float32 `[1, D, H, W]`, normalised; leaning either way."""
        hu = fibre_phantom(self.seed, index, index % 2, self.size)
        if self.shuffled:
            rng = np.random.default_rng([self.seed, index, 1])
            hu = rng.permuted(hu.ravel()).reshape(hu.shape)
        return torch.from_numpy(self.intensity.normalise(hu)[None])


def write_control_task(
    folder: Path, splits: Mapping[str, tuple[int, int]], *, size: int = 32
) -> Path:
    """Write labelled phantoms as a task folder, classes alternating; each is a patient of its own.

    Args:
        folder: Made if absent.
        splits: Series and number of phantoms of each split. Splits of one series would share phantoms.
        size: Edge in voxels.

    Returns:
        `folder`, with labels.csv and patches.

    Raises:
        ValueError: If a series comes twice.
    """
    import SimpleITK as sitk

    if len({series for series, _ in splits.values()}) < len(splits):
        raise ValueError(f"each split needs a series of its own, not {dict(splits)}")
    (folder / "patches").mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", "patient", "label", "label_name", "split"])
    for split, (series, number) in splits.items():
        for index in range(number):
            label = index % 2
            image = sitk.GetImageFromArray(fibre_phantom(series, index, label, size))
            image.SetSpacing((SPACING,) * 3)
            name = f"{series}-{index:05d}"
            sitk.WriteImage(image, str(folder / f"patches/{name}.mha"), useCompression=True)
            rows.writerow([f"patches/{name}.mha", name, label, CLASS_NAMES[label], split])
    write_atomically(folder / "labels.csv", text.getvalue())
    return folder
