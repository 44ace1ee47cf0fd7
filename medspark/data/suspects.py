"""Series that are no scan of one body though every header is right: montages, stitched stacks.

The honest 3D part of figure separation: what can be told from the voxels alone is told, with the
measured numbers, and nothing else. Panels of one row by two are left alone (two legs look so).
"""

from __future__ import annotations

from itertools import product

import numpy as np

_THUMB = 24  # pixels of a reduced slice or panel
_PANEL_LIKENESS = 0.75  # correlation of neighbouring panels of a montage
_REPEAT_LIKENESS = 0.985
_MIN_RUN = 4
_JUMP = 3.0  # times the usual difference of neighbouring slices
_JUMP_HU = 80.0


def suspicions(hu: np.ndarray) -> list[str]:
    """What speaks against a volume being one scan of one body.

    Args:
        hu: int16 `[z, y, x]`, axes towards S, P, L.

    Returns:
        One line for each suspicion, beginning "montage:" or "stitched:"; none for a sound volume.
    """
    thumbs = _thumbs(hu)
    return [*_montage(hu), *_repeated(thumbs), *_jumps(thumbs)]


def _reduce(plane: np.ndarray, size: int) -> np.ndarray:
    """Means over about `size` x `size` boxes."""
    rows = np.linspace(0, plane.shape[0], min(size, plane.shape[0]) + 1).astype(int)[:-1]
    columns = np.linspace(0, plane.shape[1], min(size, plane.shape[1]) + 1).astype(int)[:-1]
    sums = np.add.reduceat(np.add.reduceat(plane.astype(np.float64), rows, 0), columns, 1)
    counts = np.outer(np.diff([*rows, plane.shape[0]]), np.diff([*columns, plane.shape[1]]))
    return sums / counts


def _thumbs(hu: np.ndarray) -> np.ndarray:
    return np.stack([_reduce(plane, _THUMB) for plane in hu])


def _likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation; 0 where one of the two is flat."""
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / scale if scale > 1e-6 * a.size else 0.0


def _montage(hu: np.ndarray) -> list[str]:
    """Whether slices are sheets of panels: at least 2 x 2 or 1 x 3 that look alike."""
    picked = hu[np.linspace(0, len(hu) - 1, min(5, len(hu))).astype(int)]
    best, layout = 0.0, (0, 0)
    for rows, columns in product(range(1, 7), repeat=2):
        if max(rows, columns) < 3 and rows * columns < 4:
            continue
        if hu.shape[1] // rows < 16 or hu.shape[2] // columns < 16:
            continue
        score = float(np.median([_panel_likeness(plane, rows, columns) for plane in picked]))
        # Whole rows of panels look alike too: the finest layout counts.
        if score >= _PANEL_LIKENESS and rows * columns > layout[0] * layout[1]:
            best, layout = score, (rows, columns)
    if not best:
        return []
    return [f"montage: slices look like {layout[0]} x {layout[1]} panels (likeness {best:.2f})"]


def _panel_likeness(plane: np.ndarray, rows: int, columns: int) -> float:
    """Lowest correlation of neighbouring panels, 0 if a third of them are empty."""
    height, width = plane.shape[0] // rows, plane.shape[1] // columns
    panels = {
        (r, c): _reduce(plane[r * height : (r + 1) * height, c * width : (c + 1) * width], _THUMB)
        for r, c in product(range(rows), range(columns))
    }
    filled = {place for place, panel in panels.items() if panel.std() > 60}
    if len(filled) < 3 or 3 * len(filled) < 2 * len(panels):
        return 0.0
    pairs = [
        _likeness(panels[r, c], panels[other])
        for r, c in filled
        for other in ((r, c + 1), (r + 1, c))
        if other in filled
    ]
    return min(pairs) if len(pairs) >= 2 else 0.0


def _repeated(thumbs: np.ndarray) -> list[str]:
    """Whether a run of slices comes again further up: two phases in one stack."""
    n = len(thumbs)
    if n < 2 * _MIN_RUN:
        return []
    flat = thumbs.reshape(n, -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(flat, axis=1, keepdims=True)
    like = (flat @ flat.T) / np.maximum(norm * norm.T, 1e-6)
    best, at = 0.0, 0
    for period in range(_MIN_RUN, n // 2 + 1):
        again = np.diagonal(like, period)
        # A body that hardly changes is like itself everywhere; a repeat is unlike half-way.
        between = np.diagonal(like, max(1, period // 2))[: len(again)]
        found = (again > _REPEAT_LIKENESS) & (again > between + 0.01)
        if found.mean() > 0.8 and len(again) >= _MIN_RUN and again.mean() > best:
            best, at = float(again.mean()), period
    if not best:
        return []
    return [f"stitched: slices repeat after {at} (likeness {best:.3f}), as phases in one stack do"]


def _jumps(thumbs: np.ndarray) -> list[str]:
    """Whether two neighbouring slices differ as slices of one body do not."""
    if len(thumbs) < 2 * _MIN_RUN:
        return []
    steps = np.abs(np.diff(thumbs, axis=0)).mean(axis=(1, 2))
    for at in range(_MIN_RUN - 1, len(steps) - _MIN_RUN + 1):
        near = np.delete(steps[max(0, at - 5) : at + 6], min(at, 5))
        if steps[at] > _JUMP_HU and steps[at] > _JUMP * float(near.max()):
            return [
                f"stitched: slices {at + 1} and {at + 2} differ by {steps[at]:.0f} HU on average, "
                f"{steps[at] / float(near.max()):.0f} times as much as their neighbours"
            ]
    return []
