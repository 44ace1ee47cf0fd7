"""Where views lie: as far apart as a policy allows, and with enough in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from medspark.data.views_policy import Triple, ViewPolicy

_STEPS = 12  # in which a view moves back until it overlaps enough
_BACK = 0.8
_TOLERANCE = 1e-9

Vector = Sequence[float] | np.ndarray
Body = Callable[[np.ndarray, np.ndarray], float]
Box = tuple[Triple, Triple]  # centre and edges in mm


def overlap(centre: Vector, edges: Vector, other: Vector, size: Vector) -> float:
    """Share of the smaller of two upright boxes that lies in the other.

    Args:
        centre: mm of the first.
        edges: mm of the first.
        other: Centre of the second.
        size: Edges of the second.
    """
    low, high = _common(centre, edges, other, size)
    return float(np.clip(high - low, 0, None).prod() / min(np.prod(edges), np.prod(size)))


def _common(
    centre: Vector, edges: Vector, other: Vector, size: Vector
) -> tuple[np.ndarray, np.ndarray]:
    a, ea, b, eb = (np.array(v, float) for v in (centre, edges, other, size))
    return np.maximum(a - ea / 2, b - eb / 2), np.minimum(a + ea / 2, b + eb / 2)


def places(
    policy: ViewPolicy,
    large: Sequence[Box],
    centre: np.ndarray,
    edges: np.ndarray,
    strays: np.ndarray,
    volume: np.ndarray,
) -> Iterator[np.ndarray]:
    """Centres for a view that overlap enough: the one drawn, then back step by step.

    The first view strays from the place by up to a quarter of its edges, the others from what the
    large ones have in common. About that centre they overlap as much as `min_overlap` asks for:
    a box inside the large ones shares with their common part at least what they share.
    """
    reach = edges / 4
    if large:
        # The first and the last are the same where there is one.
        one, two = large[0], large[-1]
        low, high = _common(one[0], one[1], two[0], two[1])
        centre, common = (low + high) / 2, high - low
        reach = (edges + common) / 2 - policy.min_overlap * np.minimum(edges, common)
    move = np.zeros(3)
    move[policy.free] = (strays * reach * policy.shift)[policy.free]
    for step in range(_STEPS + 1):
        back = _BACK**step if step < _STEPS else 0.0
        place = _inside(policy, centre + move * back, edges, volume)
        if all(overlap(place, edges, *box) >= policy.min_overlap - _TOLERANCE for box in large):
            yield place


def with_body(
    candidates: Iterable[np.ndarray], edges: np.ndarray, wanted: float, body: Body | None
) -> np.ndarray:
    """The first place with as much body as wanted, else the one with most."""
    best, most = None, -1.0
    for place in candidates:
        share = body(place, edges) if wanted and body is not None else wanted
        if share > most:
            best, most = place, share
        if share >= wanted:
            break
    assert best is not None  # about the centre of what the large views share, all overlap enough
    return best


def _inside(
    policy: ViewPolicy, centre: np.ndarray, edges: np.ndarray, volume: np.ndarray
) -> np.ndarray:
    """Moved by the least so that the box lies in the volume, or covers it."""
    low, high = np.minimum(edges / 2, volume - edges / 2), np.maximum(edges / 2, volume - edges / 2)
    moved = np.clip(centre, low, high)
    return np.concatenate([centre[: policy.free.start], moved[policy.free]])
