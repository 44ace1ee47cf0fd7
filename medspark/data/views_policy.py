"""What contrastive views of a CT may differ in, and by how much."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

Triple = tuple[float, float, float]
_AXES = 3


@dataclass(frozen=True)
class ViewPolicy:
    """How the views of one place in one scan are drawn; the default changes nothing.

    Axes are (z, y, x), lengths mm, intensities HU. Unless said otherwise a size is drawn uniformly
    between none and the stated value, an angle or shift symmetrically about 0. A share is the
    probability that a view gets the change at all.

    Off in every preset, because no scan looks like it: mirroring along z (organs upside down) and
    along y (gravity: fluid levels, dependent lung and the table lie at the back), solarising, hue,
    greyscale, large rotations. A body mirrored left to right exists; off where the side matters.

    Attributes:
        dims: 3 for volumes, 2 for single axial slices, which all views of a sample share.
        size: Voxels of a view (d, h, w); d is 1 for slices.
        edge_mm: Least and greatest length of a view's longest edge, drawn evenly on a log scale.
        n_global: Large views, 1 or 2.
        n_local: Small views (multi-crop, arXiv 2006.09882).
        local_size: Voxels of a small view.
        local_edge_mm: As `edge_mm`, of the small views; they must fit into every large one.
        voxel: Proportions of a view's voxel; (1, 1, 1) for cubic ones, (3, 1, 1) for thick slices.
        aspect: Greatest factor by which each edge differs from those proportions, at least 1.
        min_overlap: Least share of the smaller of two upright boxes that lies in the other, for
            each view against each large view of the sample (rotation comes on top).
        shift: How much of the room that `min_overlap` leaves is used: 1 all, 0 puts all views
            about the same centre.
        min_body: Wanted share of body (above -500 HU) in each view: one that strays too far into the
            air moves back until it has that much, as far as the place allows. Lung counts through
            its walls and vessels only, so keep it low.
        flips: Axes that are mirrored with probability 1/2.
        rotate: Largest rotation in degrees about z, y and x; in mm, so that shapes stay true.
        level: Largest shift of the window as a share of its width.
        width: Greatest factor on the window's width, at least 1; as often its inverse.
        contrast: Largest change of the factor on positive HU. Air and water keep theirs at every
            tube voltage; bone and contrast medium do not.
        brightness: Largest shift in HU, as from a badly calibrated scanner.
        window_cap: Brightness and noise stay below this share of the run's window, so that a window
            of 80 HU keeps its anatomy under strengths that suit one of 2000.
        noise: Largest SD of Gaussian noise in HU, at the voxels of the view.
        noise_share: Share of views with noise.
        blur_mm: Largest SD of a Gaussian blur (smooth reconstruction kernels).
        blur_share: Share of views with blur; views take the entries in turn, as the two of BYOL
            differ (arXiv 2006.07733).
        thickness_mm: Least and greatest thickness of simulated slices: means over the volume's z,
            then interpolated. Thinner than the stored slices changes nothing.
        thickness_share: Share of views with thicker slices.
        cutouts: Greatest number of boxes that are cut out, uniform from 0. They hold 0, the run's
            value of what is absent: no tissue, while air would imitate gas.
        cutout_edge: Least and greatest edge of such a box as a share of the view's.
    """

    dims: int = 3
    size: tuple[int, int, int] = (64, 64, 64)
    edge_mm: tuple[float, float] = (128.0, 128.0)
    n_global: int = 2
    n_local: int = 0
    local_size: tuple[int, int, int] = (32, 32, 32)
    local_edge_mm: tuple[float, float] = (64.0, 64.0)
    voxel: Triple = (1.0, 1.0, 1.0)
    aspect: float = 1.0
    min_overlap: float = 0.0
    shift: float = 0.0
    min_body: float = 0.0
    flips: tuple[bool, bool, bool] = (False, False, False)
    rotate: Triple = (0.0, 0.0, 0.0)
    level: float = 0.0
    width: float = 1.0
    contrast: float = 0.0
    brightness: float = 0.0
    window_cap: float = 1.0
    noise: float = 0.0
    noise_share: float = 0.0
    blur_mm: float = 0.0
    blur_share: tuple[float, ...] = (0.0,)
    thickness_mm: tuple[float, float] = (2.0, 6.0)
    thickness_share: float = 0.0
    cutouts: int = 0
    cutout_edge: tuple[float, float] = (0.15, 0.35)

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be drawn; the message names the setting."""
        for rules in (self._shape_rules, self._strength_rules, self._fit_rules):
            for need, told in rules():
                if not need:
                    raise ValueError(f"views: {told}")

    def _shape_rules(self) -> list[tuple[bool, str]]:
        triples = (self.size, self.local_size, self.voxel, self.flips, self.rotate)
        ranges = (self.edge_mm, self.local_edge_mm, self.thickness_mm, self.cutout_edge)
        if any(len(t) != _AXES for t in triples) or any(len(r) != 2 for r in ranges):
            return [(False, "sizes, voxel, flips and rotate need (z, y, x), ranges (least, most)")]
        ordered = all(0 < low <= high < math.inf for low, high in ranges)
        sizes = (*self.size, *self.local_size)
        return [
            (self.dims in (2, 3), f"dims is 2 or 3, not {self.dims}"),
            (min(sizes) >= 1 and min(self.voxel) > 0, "size, local_size, voxel must be positive"),
            (ordered, "ranges must be positive and finite, the least before the most"),
            (self.n_global in (1, 2), f"n_global is 1 or 2, not {self.n_global}"),
            (self.n_local >= 0 and self.cutouts >= 0, "n_local and cutouts must not be negative"),
            (len(self.blur_share) > 0, "blur_share needs a value"),
            (
                self.dims == 3 or (self.size[0] == 1 and self.local_size[0] == 1),
                f"slices have depth 1, not size {self.size} and local_size {self.local_size}",
            ),
            (self.dims == 3 or not any(self.rotate[1:]), "a slice can be rotated about z only"),
        ]

    def _strength_rules(self) -> list[tuple[bool, str]]:
        strengths = (*self.rotate, self.level, self.brightness, self.noise, self.blur_mm)
        shares = (self.shift, self.min_body, self.window_cap, self.noise_share)
        return [
            (
                all(0 <= s < math.inf for s in strengths),
                "rotate, level, brightness, noise and blur_mm must be finite and not negative",
            ),
            (
                all(0 <= s <= 1 for s in (*shares, self.thickness_share, *self.blur_share)),
                "shift, min_body, window_cap and shares must lie between 0 and 1",
            ),
            (0 <= self.contrast < 1, f"contrast {self.contrast} must lie in [0, 1)"),
            (1 <= min(self.aspect, self.width) < math.inf, "aspect and width are at least 1"),
            (self.cutout_edge[1] <= 1, "a cut-out is at most as large as the view"),
        ]

    def _fit_rules(self) -> list[tuple[bool, str]]:
        # Two boxes about one centre share at least aspect^(-8/3) of the smaller: the worst case
        # has two edges at opposite limits, the third making up for the volume.
        most = self.aspect ** (-8 / 3)
        small = self.edges(self.local_edge_mm[1], local=True) * self.aspect
        large = self.edges(self.edge_mm[0]) / self.aspect
        inside = self.n_local == 0 or bool((small[self.free] <= large[self.free] + 1e-9).all())
        return [
            (
                0 <= self.min_overlap <= most + 1e-9,
                f"min_overlap {self.min_overlap} must lie between 0 and {most:.3g}, more is out of "
                f"reach with aspect {self.aspect}",
            ),
            (
                inside,
                f"small views of up to {small.round(1).tolist()} mm (z, y, x) do not fit into "
                f"large ones of {large.round(1).tolist()} mm: lower local_edge_mm[1]",
            ),
        ]

    @property
    def free(self) -> slice:
        """The axes in which views differ: all, or (y, x) for slices."""
        return slice(_AXES - self.dims, _AXES)

    @property
    def n_views(self) -> int:
        """Views of a sample, the large ones first."""
        return self.n_global + self.n_local

    def size_of(self, view: int) -> tuple[int, int, int]:
        """Voxels (d, h, w) of view number `view`."""
        return self.size if view < self.n_global else self.local_size

    def edges(self, longest: float, *, local: bool = False) -> np.ndarray:
        """Edges in mm (z, y, x) of a view by its longest; a slice counts as 1 mm thick."""
        size = np.array(self.local_size if local else self.size) * np.array(self.voxel)
        edges = longest * size / size[self.free].max()
        edges[: _AXES - self.dims] = 1.0
        return edges

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for checkpoints and configurations."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ViewPolicy:
        """Inverse of `as_dict`; what is missing keeps its default.

        Raises:
            ValueError: For an unknown setting or one that makes no sense.
        """
        known = [field.name for field in fields(cls)]
        strange = sorted(set(values) - set(known))
        if strange:
            raise ValueError(f"views: no setting {', '.join(strange)}; there are {known}")
        settings: dict[str, Any] = {
            k: tuple(v) if isinstance(v, Sequence) else v for k, v in values.items()
        }
        return cls(**settings)
