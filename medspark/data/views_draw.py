"""The numbers of each view: where it lies and what is done to it, from (seed, sample, view) alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from medspark.data.sampler import uniforms
from medspark.data.views_place import Body, places, with_body
from medspark.data.views_policy import Triple, ViewPolicy
from medspark.data.windows import Window

VIEW = 16  # purpose of the numbers of view 0; places and masks have smaller ones
_WORDS = 27  # before the cut-outs, six for each
Corners = tuple[tuple[int, int, int], tuple[int, int, int]]


@dataclass(frozen=True)
class Shot:
    """One view, all drawn. Axes (z, y, x); mm from the outer face of the volume's first voxels.

    Attributes:
        view: Its number in the sample.
        size: Voxels of the view.
        centre: mm.
        edges: mm of the box before rotation.
        angles: Degrees by which the content is turned about z, y and x.
        flips: Axes mirrored in the end.
        thickness: mm of simulated slices, 0 for none.
        phase: Where the first of them begins, as a share of its thickness.
        blur: SD in mm, 0 for none.
        contrast: Factor on positive HU.
        brightness: HU added after that.
        window: Lowest and highest HU that is told apart.
        noise: SD in HU, 0 for none.
        key: Two 32-bit words, the key of the noise.
        cutouts: First voxel and end of each box that is cut out, in the finished view.
    """

    view: int
    size: tuple[int, int, int]
    centre: Triple
    edges: Triple
    angles: Triple = (0.0, 0.0, 0.0)
    flips: tuple[bool, bool, bool] = (False, False, False)
    thickness: float = 0.0
    phase: float = 0.0
    blur: float = 0.0
    contrast: float = 1.0
    brightness: float = 0.0
    window: tuple[float, float] = (-1000.0, 1000.0)
    noise: float = 0.0
    key: tuple[int, int] = (0, 0)
    cutouts: tuple[Corners, ...] = ()

    @property
    def pitch(self) -> np.ndarray:
        """Edges of a voxel of the view in mm."""
        return np.array(self.edges) / self.size


def draw_shots(
    policy: ViewPolicy,
    seed: int,
    index: int,
    centre: Sequence[float],
    volume_mm: Sequence[float],
    window: Window,
    body: Body | None = None,
) -> list[Shot]:
    """The views of sample `index`, the large ones first.

    Each decision has its own place in the row of numbers of its view, so that switching one change
    off alters no other.

    Args:
        policy: What may be drawn.
        seed: Seed of the run.
        index: Number of the sample.
        centre: mm (z, y, x) of the place about which the views lie.
        volume_mm: Edges of the volume; views are moved inside, or cover it where it is smaller.
        window: The run's window.
        body: Share of body in the box of a centre and edges in mm; needed for `min_body`.
    """
    shots: list[Shot] = []
    volume = np.array(volume_mm, float)
    for view in range(policy.n_views):
        words = _WORDS + 6 * policy.cutouts
        u = iter(uniforms(seed, VIEW + view, index, words).tolist())
        local = view >= policy.n_global
        edges = _edges(policy, u, local)
        strays = _three(u)
        large = [(shot.centre, shot.edges) for shot in shots[: policy.n_global]]
        found = places(policy, large, np.array(centre, float), edges, strays, volume)
        place = with_body(found, edges, policy.min_body, body)
        shots.append(_finish(policy, view, place, edges, u, window))
    return shots


def _three(u: Iterator[float]) -> np.ndarray:
    """Three numbers in [-1, 1)."""
    return np.array([2 * next(u) - 1 for _ in range(3)])


def _edges(policy: ViewPolicy, u: Iterator[float], local: bool) -> np.ndarray:
    low, high = policy.local_edge_mm if local else policy.edge_mm
    edges = policy.edges(low * (high / low) ** next(u), local=local)
    factors = policy.aspect ** _three(u)
    edges[policy.free] *= factors[policy.free]
    return edges


def _finish(
    policy: ViewPolicy,
    view: int,
    centre: np.ndarray,
    edges: np.ndarray,
    u: Iterator[float],
    window: Window,
) -> Shot:
    """The rest of a view, in the order of the numbers."""
    size = policy.size_of(view)
    angles = triple(_three(u) * policy.rotate)
    flips = [next(u) < 0.5 and on for on in policy.flips]
    thickness = _chance(u, policy.thickness_share) * _between(policy.thickness_mm, next(u))
    phase = next(u)
    blur = _chance(u, policy.blur_share[view % len(policy.blur_share)]) * next(u) * policy.blur_mm
    contrast, brightness = 1 + policy.contrast * (2 * next(u) - 1), 2 * next(u) - 1
    level = window.level + (2 * next(u) - 1) * policy.level * window.width
    half = window.width / 2 * policy.width ** (2 * next(u) - 1)
    cap = policy.window_cap * window.width
    noise = _chance(u, policy.noise_share) * next(u) * min(policy.noise, cap)
    key = int(next(u) * 2**32), int(next(u) * 2**32)
    cutouts = [_box(policy, size, u) for _ in range(int(next(u) * (policy.cutouts + 1)))]
    return Shot(
        view=view,
        size=size,
        centre=triple(centre),
        edges=triple(edges),
        angles=angles,
        flips=(flips[0], flips[1], flips[2]),
        thickness=thickness,
        phase=phase,
        blur=blur,
        contrast=contrast,
        brightness=brightness * min(policy.brightness, cap),
        window=(level - half, level + half),
        noise=noise,
        key=key,
        cutouts=tuple(cutouts),
    )


def triple(values: np.ndarray) -> Triple:
    """Three plain numbers."""
    z, y, x = (float(v) for v in values)
    return z, y, x


def _chance(u: Iterator[float], share: float) -> int:
    return int(next(u) < share)


def _between(limits: tuple[float, float], u: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * u


def _box(policy: ViewPolicy, size: tuple[int, int, int], u: Iterator[float]) -> Corners:
    """A box inside the view, at least one voxel along each axis."""
    start, end = [], []
    for n in size:
        edge = max(1, round(n * _between(policy.cutout_edge, next(u))))
        first = math.floor(next(u) * (n - edge + 1))
        start.append(first)
        end.append(first + edge)
    return (start[0], start[1], start[2]), (end[0], end[1], end[2])
