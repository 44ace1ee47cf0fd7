from __future__ import annotations

import numpy as np
import pytest

from medspark.data import anatomy
from medspark.data.anatomy import LABELS, TEXTURE, Body, vessel_tree


def test_labels_and_textures_match() -> None:
    assert LABELS.index("liver") == anatomy.LIVER
    assert LABELS.index("lesion") == anatomy.LESION
    assert LABELS[0] == "air"
    assert len(TEXTURE) == len(LABELS)
    assert TEXTURE[anatomy.AIR] == 0


def test_people_differ_and_hang_together() -> None:
    """Fat people are deeper, and organs take up contrast only where blood has it."""
    people = [Body.draw(np.random.default_rng(seed)) for seed in range(200)]
    fat, depth = [p.fat for p in people], [p.depth for p in people]
    assert np.corrcoef(fat, depth)[0, 1] > 0.3
    assert all(p.organ(50) == 50 for p in people if p.blood == 45)
    assert all(50 < p.organ(50) < p.blood + 50 for p in people if p.blood > 45)
    assert 0.2 < np.mean([p.blood == 45 for p in people]) < 0.5


def test_cavity_lies_inside() -> None:
    body = Body.draw(np.random.default_rng(0))
    assert body.cavity[0] == pytest.approx(0.96 - body.fat - body.wall)
    assert 0 < body.cavity[1] < body.depth


def test_vessel_tree() -> None:
    """Connected, forks as often as asked, and gets thinner outwards."""
    segments = vessel_tree((0, 0, 0), (1, 0, 0), 0.2, 0.04, 4, np.random.default_rng(0))
    assert len(segments) == 2**5 - 1
    ends = {end for _, end, _, _ in segments} | {(0, 0, 0)}
    assert all(start in ends for start, *_ in segments)
    radius_at = {end: thin for _, end, _, thin in segments}
    assert all(r <= radius_at.get(start, 0.04) for start, _, r, _ in segments)
    start, end, *_ = segments[0]
    np.testing.assert_allclose(np.subtract(end, start), (0.2, 0, 0))
