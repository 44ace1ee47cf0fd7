"""CT windows in HU and the fixed intensity scaling of a run."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch

Array = TypeVar("Array", np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class Window:
    """A closed range of HU. Values outside are clipped to its ends.

    Attributes:
        name: Name of the window, a key of `WINDOWS` or the caller's own.
        low: Lowest HU that is told apart.
        high: Highest HU that is told apart.
    """

    name: str
    low: float
    high: float

    def __post_init__(self) -> None:
        """Raise ValueError for an empty or infinite window."""
        if not (np.isfinite(self.low) and np.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"window '{self.name}': low {self.low} must be finite and below high {self.high}"
            )

    @property
    def width(self) -> float:
        """Width in HU, as radiology workstations state it."""
        return self.high - self.low

    @property
    def level(self) -> float:
        """Centre in HU, as radiology workstations state it."""
        return (self.low + self.high) / 2


def _window(name: str, width: float, level: float) -> Window:
    return Window(name, level - width / 2, level + width / 2)


# Usual display presets, (width, level) in HU; they vary by some tens of HU between hospitals.
WINDOWS: dict[str, Window] = {
    window.name: window
    for window in (
        _window("wide", 2000, 0),  # -1000..1000: air to dense bone, the pre-training default
        _window("soft_tissue", 400, 40),  # -160..240
        _window("lung", 1500, -600),  # -1350..150
        _window("bone", 1800, 400),  # -500..1300
        _window("brain", 80, 40),  # 0..80
        _window("subdural", 300, 100),  # -50..250
        _window("abdomen", 400, 50),  # -150..250
        _window("liver", 150, 75),  # 0..150
        _window("mediastinum", 350, 50),  # -125..225
    )
}


@dataclass(frozen=True)
class Intensity:
    """Window, then fixed mean and SD: the same numbers for a whole run, never per crop.

    In a sparse network an absent voxel is 0, so 0 has to mean the same HU in every crop, in
    pre-training and in fine-tuning. The object therefore travels in the checkpoint (`as_dict`).

    Attributes:
        window: Range of HU that is mapped to 0..1.
        mean: Mean of the values scaled to 0..1.
        std: SD of the values scaled to 0..1, positive.
    """

    window: Window
    mean: float
    std: float

    def __post_init__(self) -> None:
        """Raise ValueError for a mean or SD that cannot standardise."""
        if not (np.isfinite(self.mean) and np.isfinite(self.std) and self.std > 0):
            raise ValueError(f"mean {self.mean} must be finite and std {self.std} positive")

    @classmethod
    def named(cls, name: str) -> Intensity:
        """The window `name` of `WINDOWS` with the project's fixed mean and SD for it.

        Raises:
            ValueError: If there is no such window.
        """
        if name not in WINDOWS:
            raise ValueError(f"unknown window '{name}', choose one of {', '.join(WINDOWS)}")
        return cls(WINDOWS[name], *_MEAN_STD[name])

    def normalise(self, hu: Array) -> Array:
        """HU to standardised values: clip to the window, scale to 0..1, subtract mean, divide SD.

        Args:
            hu: Array or tensor of HU, any shape, any real dtype.

        Returns:
            A new float32 array or tensor of the same shape (and device).
        """
        if isinstance(hu, torch.Tensor):
            return self.normalise_into(torch.empty_like(hu, dtype=torch.float32), hu)
        shift, scale = self._shift_scale()
        low = self.window.low
        out = np.clip(np.asarray(hu, dtype=np.float32), low, self.window.high)
        out -= np.float32(shift)
        out *= np.float32(scale)
        return out

    def normalise_into(self, out: torch.Tensor, hu: torch.Tensor) -> torch.Tensor:
        """`normalise` into float32 memory of the same shape; CPU and GPU give the same numbers.

        In place after one copy: on large batches fresh memory costs more than the arithmetic.

        Returns:
            `out`.
        """
        shift, scale = self._shift_scale()
        return out.copy_(hu).clamp_(self.window.low, self.window.high).sub_(shift).mul_(scale)

    def _shift_scale(self) -> tuple[float, float]:
        width = self.window.width
        return self.window.low + self.mean * width, 1 / (width * self.std)

    def to_hu(self, x: Array) -> Array:
        """Inverse of `normalise` inside the window. Nothing is clipped."""
        shift = self.window.low + self.mean * self.window.width
        return x * (self.window.width * self.std) + shift

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON types, for checkpoints."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Intensity:
        """Inverse of `as_dict`.

        Raises:
            ValueError: If a key is missing or unknown.
        """
        try:
            return cls(
                Window(**values["window"]), **{k: v for k, v in values.items() if k != "window"}
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"not an intensity record ({error}); expected window {{name, low, high}}, mean, std"
            ) from error


def finish(hu: torch.Tensor, flips: torch.Tensor, intensity: Intensity) -> torch.Tensor:
    """Mirror and normalise a batch, on the device it is on; every device gives the same numbers.

    Args:
        hu: int16 `[B, 1, D, H, W]`; mirrored in place.
        flips: bool `[B, 3]` on the CPU, axes (z, y, x) to mirror.
        intensity: Window and standardisation.

    Returns:
        float32 `[B, 1, D, H, W]`.
    """
    for sample, axes in zip(hu, flips.tolist(), strict=True):
        mirrored = [1 + axis for axis in range(3) if axes[axis]]
        if mirrored:
            sample.copy_(sample.flip(mirrored))
    out = _fresh(hu.shape) if hu.device.type == "cpu" else torch.empty_like(hu, dtype=torch.float32)
    return intensity.normalise_into(out, hu)


def _fresh(shape: Sequence[int]) -> torch.Tensor:
    """Float32 memory of a batch, in huge pages where Linux has them: less to fault in."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            memory = mmap.mmap(-1, 4 * math.prod(shape), flags=flags)
            memory.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(memory, dtype=torch.float32).view(*shape)
    return torch.empty(*shape)


# Mean and SD of 0..1 values over random 64^3 crops (at least 30 % body) of mixed CT at 2 mm.
# They only centre and scale; what matters is that they never change.
_MEAN_STD: dict[str, tuple[float, float]] = {
    "wide": (0.36, 0.24),
    "soft_tissue": (0.29, 0.28),
    "lung": (0.70, 0.30),
    "bone": (0.20, 0.16),
    "brain": (0.25, 0.35),
    "subdural": (0.18, 0.25),
    "abdomen": (0.28, 0.28),
    "liver": (0.17, 0.28),
    "mediastinum": (0.27, 0.28),
}
