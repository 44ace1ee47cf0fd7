"""Random changes of training patches: a function of (seed, epoch, index) alone.

Works on one standardised patch, `[D, H, W]` or `[H, W]`. Nothing here knows which side is left: where
the label depends on the side (or the level) of the body, mirroring along that axis must be off.
Quarter turns in the axial plane are off in every preset: nobody is scanned like that, except for
patches of tissue without an up and down, where they are as good as mirroring.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

_BLUR_SHARE = 0.5  # of the patches, where blur is on
_AXES = 3


@dataclass(frozen=True)
class Augmentation:
    """How strongly patches are changed; the default changes nothing.

    Ranges are symmetric and uniform, axes are (z, y, x); a picture `[H, W]` uses (y, x), and of
    the rotations the first.

    Attributes:
        flips: Axes that are mirrored with probability 1/2.
        quarter_turns: Turn the (y, x) plane by 0, 90, 180 or 270 degrees; 0 or 180 where the
            plane is not square in voxels and mm.
        rotate: Largest rotation in degrees about z, y and x. In mm: thick slices stay thick.
        zoom: Largest change of scale, 0.1 for 1/1.1 to 1.1.
        translate: Largest shift as a share of each axis.
        contrast: Largest change of the factor on the values, 0.1 for 0.9 to 1.1.
        brightness: Largest shift of the values, in standardised units.
        noise: Largest SD of Gaussian noise, in standardised units.
        blur: Largest SD of a Gaussian blur in voxels; half of the patches get one.
    """

    flips: tuple[bool, bool, bool] = (False, False, False)
    quarter_turns: bool = False
    rotate: tuple[float, float, float] = (0.0, 0.0, 0.0)
    zoom: float = 0.0
    translate: float = 0.0
    contrast: float = 0.0
    brightness: float = 0.0
    noise: float = 0.0
    blur: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for negative or impossible strengths."""
        sizes = (*self.rotate, self.zoom, self.translate, self.contrast, self.brightness)
        if len(self.flips) != _AXES or len(self.rotate) != _AXES:
            raise ValueError("flips and rotate need three values (z, y, x)")
        if not all(0 <= s < math.inf for s in (*sizes, self.noise, self.blur)):
            raise ValueError(f"strengths must be finite and not negative: {self}")
        if self.contrast >= 1 or self.translate >= 1:
            raise ValueError("contrast and translate must be below 1")

    def __call__(
        self,
        x: torch.Tensor,
        key: Sequence[int],
        spacing: Sequence[float] | None = None,
    ) -> torch.Tensor:
        """A changed copy of a patch.

        Args:
            x: float32 `[D, H, W]` or `[H, W]`, standardised.
            key: What the draw depends on, such as (seed, epoch, index), each from 0.
            spacing: mm of the axes of `x`; None takes them as equal.

        Returns:
            The same shape.

        Raises:
            ValueError: For another number of axes.
        """
        if x.ndim not in (2, 3):
            raise ValueError(f"a patch has 2 or 3 axes (z, y, x), got the shape {tuple(x.shape)}")
        mm = np.ones(x.ndim) if spacing is None else np.array(spacing, float)
        rng = np.random.default_rng([*key])
        x = x.flip([a for a, on in enumerate(self.flips[-x.ndim :]) if rng.random() < 0.5 and on])
        scale, shift = rng.uniform(-1, 1, size=2) * (self.contrast, self.brightness)
        # Always as many numbers: what one change is set to alters no other change.
        turns, *place = rng.random(1 + 3 + 1 + 3).tolist()
        noise, blur, blurred = rng.random(3).tolist()
        if self.quarter_turns:
            x = _turned(x, turns, mm)
        u = 2 * np.array(place) - 1
        angles = np.radians(u[:3] * self.rotate)
        zoom = (1 + self.zoom) ** u[3]
        move = u[4:][-x.ndim :] * self.translate * np.array(x.shape)
        if angles.any() or zoom != 1 or move.any():
            x = affine(x, rotation(angles, x.ndim) * zoom, move, mm)
        if self.blur and blurred < _BLUR_SHARE:
            x = smooth(x, [blur * self.blur] * x.ndim)
        x = x * float(1 + scale) + float(shift) if self.contrast or self.brightness else x
        if self.noise:
            drawn = rng.standard_normal(tuple(x.shape), dtype=np.float32)
            x = x + torch.from_numpy(drawn) * (noise * self.noise)
        return x


def _turned(x: torch.Tensor, u: float, mm: np.ndarray) -> torch.Tensor:
    square = x.shape[-1] == x.shape[-2] and mm[-1] == mm[-2]
    turns = int(4 * u) if square else 2 * int(2 * u)
    return torch.rot90(x, turns, (-2, -1))


def rotation(angles: Sequence[float] | np.ndarray, dims: int) -> np.ndarray:
    """Rotation matrix on vectors (z, y, x), or (y, x) by the first angle.

    Args:
        angles: Radians about z, y and x, applied in the order x, y, z; a positive one turns the
            earlier axis of the plane towards the later.
        dims: 3 or 2.
    """
    matrix = np.eye(3)
    for angle, (a, b) in zip(angles, ((1, 2), (0, 2), (0, 1)), strict=True):
        plane = np.eye(3)
        plane[a, a] = plane[b, b] = math.cos(angle)
        plane[a, b], plane[b, a] = -math.sin(angle), math.sin(angle)
        matrix = matrix @ plane
        if dims == 2:
            break
    return matrix[-dims:, -dims:]


def affine(
    x: torch.Tensor, matrix: np.ndarray, move: Sequence[float] | np.ndarray, mm: np.ndarray
) -> torch.Tensor:
    """Move the content of a patch about its centre, linear interpolation, one sampling.

    Content at `p` (mm from the centre, (z, y, x)) comes to `matrix @ p`, then `move` voxels on.
    What comes in from outside is the patch mirrored at its faces: no invented air.

    Args:
        x: float32 `[D, H, W]` or `[H, W]`.
        matrix: `[dims, dims]`, invertible.
        move: Voxels along each axis.
        mm: Voxel size of each axis.
    """
    size = np.array(x.shape, float)
    back = np.linalg.inv(matrix)
    # In grid_sample an axis runs from -1 to 1 from face to face, and axes come last one first.
    to_mm = size * mm / 2
    linear = back * to_mm[None, :] / to_mm[:, None]
    offset = -linear @ (2 * np.array(move, float) / size)
    theta = np.concatenate([linear[::-1, ::-1], offset[::-1, None]], axis=1)
    grid = F.affine_grid(
        torch.from_numpy(theta[None].astype(np.float32)), [1, 1, *x.shape], align_corners=False
    )
    return F.grid_sample(
        x[None, None], grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )[0, 0]


def smooth(x: torch.Tensor, sigma: Sequence[float]) -> torch.Tensor:
    """Gaussian blur with `sigma` voxels along each axis, cut at 3 sigma, edges repeated."""
    for axis, sd in enumerate(sigma):
        reach = math.ceil(3 * sd)
        if not reach:
            continue
        t = torch.arange(-reach, reach + 1, dtype=x.dtype)
        kernel = torch.exp(-0.5 * (t / sd) ** 2)
        kernel /= kernel.sum()
        n = x.shape[axis]
        rows = x.movedim(axis, -1).reshape(-1, 1, n)
        rows = F.conv1d(F.pad(rows, (reach, reach), mode="replicate"), kernel[None, None])
        moved = [*x.shape[:axis], *x.shape[axis + 1 :], n]
        x = rows.reshape(moved).movedim(-1, axis)
    return x.contiguous()


PRESETS: dict[str, Augmentation] = {
    "none": Augmentation(),
    "light": Augmentation(flips=(True, True, True), contrast=0.1, brightness=0.1),
    "strong": Augmentation(
        flips=(True, True, True),
        rotate=(20.0, 10.0, 10.0),
        zoom=0.15,
        translate=0.08,
        contrast=0.15,
        brightness=0.15,
        noise=0.15,
        blur=0.8,
    ),
}


def augmentation(choice: bool | str | Augmentation) -> Augmentation:
    """The augmentation meant by True ("light"), False ("none"), the name of a preset, or itself.

    Raises:
        ValueError: If there is no such preset.
    """
    if isinstance(choice, Augmentation):
        return choice
    name = ("light" if choice else "none") if isinstance(choice, bool) else choice
    if name not in PRESETS:
        raise ValueError(f"unknown augmentation '{name}', choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
