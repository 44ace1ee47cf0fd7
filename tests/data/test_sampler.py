from __future__ import annotations

import numpy as np
import pytest

from medspark.data.sampler import MASK, PLACE, CounterBatches, draw_visible, uniforms

_WORD = (1 << 64) - 1


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x64-10 as in the paper, table 2: ten rounds of two multiplications."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [second >> 64 ^ c[1] ^ k[0], second & _WORD, first >> 64 ^ c[3] ^ k[1], first & _WORD]
        k = [k[0] + 0x9E3779B97F4A7C15 & _WORD, k[1] + 0xBB67AE8584CAA73B & _WORD]
    return c


@pytest.mark.parametrize(("seed", "index"), [(0, 0), (5, 123456789), (_WORD, _WORD)])
def test_uniforms_are_philox(seed: int, index: int) -> None:
    """The same bits as the published generator: no version of numpy changes a run."""
    words = [w for n in (1, 2, 3) for w in philox((seed, PLACE), (n, index, 0, 0))]
    expected = [(word >> 11) / 2**53 for word in words]
    assert uniforms(seed, PLACE, index, 12).tolist() == expected


def test_uniforms_are_uniform_and_unrelated() -> None:
    table = np.array([uniforms(3, PLACE, i, 6) for i in range(4000)])
    assert ((table >= 0) & (table < 1)).all()
    counts = np.stack([np.histogram(column, 10, (0, 1))[0] for column in table.T])
    chi_square = ((counts - 400) ** 2 / 400).sum(1)
    assert (chi_square < 27.9).all()  # 9 degrees of freedom, p = 0.001
    others = np.array([uniforms(3, MASK, i, 6) for i in range(4000)])
    moved = np.array([uniforms(4, PLACE, i, 6) for i in range(4000)])
    columns = np.corrcoef(np.hstack([table, others, moved, np.roll(table, 1, 0)]).T)
    assert np.abs(columns - np.eye(24)).max() < 0.07  # 4.4 standard errors


def test_longer_draw_starts_with_the_shorter() -> None:
    assert uniforms(1, PLACE, 7, 30)[:5].tolist() == uniforms(1, PLACE, 7, 5).tolist()


def test_mask_hides_the_ratio_and_every_cell_as_often() -> None:
    masks = np.stack([draw_visible(2, i, (2, 3, 4), 0.6) for i in range(3000)])
    assert masks.shape == (3000, 2, 3, 4)
    assert (masks.sum((1, 2, 3)) == 10).all()  # round(24 * 0.4)
    expected = 3000 * 10 / 24
    chi_square = ((masks.sum(0) - expected) ** 2 / expected).sum() / (1 - 10 / 24)
    assert chi_square < 49.7  # 23 degrees of freedom, p = 0.001
    assert len(np.unique(masks.reshape(3000, -1), axis=0)) > 2900
    assert np.array_equal(masks[17], draw_visible(2, 17, (2, 3, 4), 0.6))


@pytest.mark.parametrize(("ratio", "kept"), [(0.0, 24), (1.0, 0), (0.75, 6)])
def test_mask_keeps_what_spark_keeps(ratio: float, kept: int) -> None:
    assert draw_visible(0, 0, (2, 3, 4), ratio).sum() == kept


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_the_joint_batch(world: int) -> None:
    parts = [list(CounterBatches(4, 10, 60, rank=r, world=world)) for r in range(world)]
    assert {len(part) for part in parts} == {50 // (4 * world)}
    joint = [[i for part in parts for i in part[step]] for step in range(len(parts[0]))]
    assert joint == [list(batch) for batch in CounterBatches(4 * world, 10, 60)]


def test_resume_goes_on_where_it_ended() -> None:
    whole = [i for batch in CounterBatches(4, 0, 40) for i in batch]
    rest = [i for batch in CounterBatches(4, 12, 40) for i in batch]
    assert whole == list(range(40))
    assert rest == whole[12:]
    assert list(CounterBatches(4, 40, 40)) == []
    assert len(CounterBatches(4, 37, 40)) == 0


def test_errors() -> None:
    with pytest.raises(ValueError, match="seed -1"):
        uniforms(-1, PLACE, 0, 1)
    with pytest.raises(ValueError, match="index 18446744073709551616"):
        uniforms(0, PLACE, 1 << 64, 1)
    with pytest.raises(ValueError, match="mask_ratio"):
        draw_visible(0, 0, (2, 2, 2), 1.5)
    with pytest.raises(ValueError, match="rank 2 below world 2"):
        CounterBatches(1, 0, 1, rank=2, world=2)
    with pytest.raises(ValueError, match="batch_size 0"):
        CounterBatches(0, 0, 1)
