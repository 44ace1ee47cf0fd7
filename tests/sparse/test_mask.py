"""BlockMask: the draw, the tables, the coarse rules, the errors."""

from __future__ import annotations

import pytest
import torch

from medspark.sparse import BlockMask


def test_random_keeps_the_same_number_per_sample_and_follows_the_generator() -> None:
    draw = [BlockMask.random(5, (3, 4, 2), 0.6, torch.Generator().manual_seed(7)) for _ in range(2)]
    assert (draw[0].visible.flatten(1).sum(1) == round(24 * 0.4)).all()
    assert draw[0].equals(draw[1])
    order = torch.rand(5, 24, generator=torch.Generator().manual_seed(7)).argsort(1)
    expected = torch.zeros(5, 24, dtype=torch.bool).scatter(1, order[:, :10], True)
    assert torch.equal(draw[0].visible.flatten(1), expected)


def test_official_grid_keeps_twenty_of_forty_nine() -> None:
    assert BlockMask.random(1, (7, 7), 0.6).visible.sum() == 20


def test_tables_are_inverse_to_each_other(ragged_mask) -> None:
    level = ragged_mask((2, 3, 2)).level((8, 6, 2))
    assert level.block == (4, 2, 1)
    flat = level.cells.flatten()
    for block, cell in enumerate(level.blocks.tolist()):
        assert flat[cell] == block
    assert (flat >= 0).sum() == level.n_blocks
    assert torch.equal(level.cells >= 0, level.visible)
    assert level.first_block.diff().tolist() == level.visible.flatten(1).sum(1).tolist()
    assert torch.equal(level.sample_of_block(), level.visible.nonzero()[:, 0])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("any", [1, 1, 1, 0]),
        ("all", [0, 0, 1, 0]),
        ("majority", [0, 1, 1, 0]),
        ("every", [1, 1, 1, 1]),
    ],
)
def test_coarse_rules(rule, expected) -> None:
    visible = torch.zeros(1, 1, 2, 8, dtype=torch.bool)
    visible[0, 0, 0, 0:2] = True  # 2 of 4: no majority
    visible[0, 0, 0, 2:4] = visible[0, 0, 1, 2] = True  # 3 of 4
    visible[0, 0, :, 4:6] = True  # 4 of 4
    level = BlockMask(visible).level((1, 1, 4), rule)
    assert level.visible.flatten().int().tolist() == expected
    assert level.block == (1, 1, 1)


def test_levels_of_one_grid_share_their_tables(ragged_mask) -> None:
    mask = ragged_mask((2, 2, 2))
    fine, coarse = mask.level((8, 8, 8)), mask.level((4, 4, 4))
    assert fine.cells is coarse.cells
    assert fine.block != coarse.block
    assert mask.level((8, 8, 8)) is fine


def test_invert_and_equals(ragged_mask) -> None:
    mask = ragged_mask((2, 2, 2))
    assert torch.equal(mask.invert().visible, ~mask.visible)
    assert mask.equals(BlockMask(mask.visible.clone()))
    assert not mask.equals(mask.invert())


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(TypeError, match="boolean"):
        BlockMask(torch.ones(1, 2, 2, 2))
    with pytest.raises(ValueError, match="at least one cell"):
        BlockMask(torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="ratio"):
        BlockMask.random(1, (2, 2, 2), 1.5)
    mask = BlockMask(torch.ones(1, 4, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="does not map onto"):
        mask.level((6, 8, 8))
    with pytest.raises(ValueError, match="does not map onto"):
        mask.level((8, 8))
    with pytest.raises(ValueError, match="unknown coarse rule"):
        mask.level((2, 2, 2), "some")  # type: ignore[arg-type]
