from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from medspark.data.body import BODY, CELL, BodyTable, load_table, signature
from medspark.data.reader import VolumeReader
from medspark.data.store import Store, write_array

SIZE = (70, 19, 24)  # more than a slab, no multiple of the cell, one that is


@pytest.fixture
def volume() -> np.ndarray:
    """A third of the voxels is body, more of it at high x."""
    rng = np.random.default_rng(3)
    body = rng.random(SIZE) < np.linspace(0, 2 / 3, SIZE[2])
    return np.where(body, 40, -1000).astype(np.int16)


def count(volume: np.ndarray) -> BodyTable:
    return BodyTable.count(volume.shape, lambda a, b: volume[a:b])


def test_sums_count_the_voxels_of_whole_cells(volume: np.ndarray) -> None:
    table = count(volume)
    assert table.total == (volume > BODY).sum()
    assert table.sums.shape == (10, 4, 4)
    for z, y, x in [(0, 0, 0), (1, 1, 1), (9, 3, 3), (5, 2, 1)]:
        part = volume[: z * CELL, : y * CELL, : x * CELL]
        assert table.sums[z, y, x] == (part > BODY).sum()


def test_threshold_is_above_500() -> None:
    edge = np.full((8, 8, 8), BODY, np.int16)
    edge[0, 0, 0] = BODY + 1
    assert count(edge).total == 1


def test_boxes_of_whole_cells_are_exact(volume: np.ndarray) -> None:
    table = count(volume)
    for start, extent in [((0, 0, 0), SIZE), ((8, 0, 16), (16, 19, 8)), ((64, 16, 0), (6, 3, 24))]:
        box = tuple(slice(b, b + e) for b, e in zip(start, extent, strict=True))
        assert table.voxels_in(start, extent) == pytest.approx((volume[box] > BODY).sum())


def test_boxes_through_cells_are_near(volume: np.ndarray) -> None:
    table, solid = count(volume), count(np.zeros(SIZE, np.int16))
    rng = np.random.default_rng(0)
    for _ in range(50):
        start = [int(rng.integers(0, n - 9)) for n in SIZE]
        box = tuple(slice(b, b + 10) for b in start)
        assert solid.voxels_in(start, (10, 10, 10)) == pytest.approx(1000)
        assert table.voxels_in(start, (10, 10, 10)) == pytest.approx(
            (volume[box] > BODY).sum(), abs=90
        )


def test_every_body_voxel_has_one_number(
    volume: np.ndarray, make_store: Callable[..., Store]
) -> None:
    store = make_store({"a": ("p", volume[:12])})
    reader, record = VolumeReader(store), store.records[0]
    total = reader.table(record).total
    found = [reader.body_voxel(record, n) for n in range(total)]
    assert sorted(map(list, found)) == np.argwhere(volume[:12] > BODY).tolist()
    with pytest.raises(IndexError, match=f"{total} of {total}"):
        reader.body_voxel(record, total)


def _refuse(start: int, stop: int) -> np.ndarray:
    raise AssertionError(f"planes {start} to {stop} were read")


@pytest.fixture
def array(tmp_path: Path, volume: np.ndarray) -> Path:
    path = tmp_path / "store" / "volumes" / "a.b2nd"
    path.parent.mkdir(parents=True)
    write_array(path, volume)
    return path


def test_table_is_kept(array: Path, volume: np.ndarray) -> None:
    first = load_table(array, SIZE, lambda a, b: volume[a:b])
    again = load_table(array, SIZE, _refuse)
    np.testing.assert_array_equal(again.sums, first.sums)
    assert isinstance(again.sums, np.memmap)
    kept = [path.name for path in (array.parent.parent / "body").iterdir()]
    assert kept == [f"a-{signature(array)}.npy"]


def test_a_copied_store_keeps_its_tables(array: Path, volume: np.ndarray, tmp_path: Path) -> None:
    load_table(array, SIZE, lambda a, b: volume[a:b])
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    load_table(tmp_path / "copy" / "volumes" / "a.b2nd", SIZE, _refuse)


def test_a_new_array_is_counted_anew(array: Path, volume: np.ndarray) -> None:
    load_table(array, SIZE, lambda a, b: volume[a:b])
    other = volume[:, :, ::-1]
    array.unlink()
    write_array(array, other)
    table = load_table(array, SIZE, lambda a, b: other[a:b])
    np.testing.assert_array_equal(table.sums, count(other).sums)
    assert len(list((array.parent.parent / "body").iterdir())) == 1  # the old one is gone


@pytest.mark.parametrize("damage", [b"", b"not a table", None])
def test_a_damaged_table_is_counted_anew(
    array: Path, volume: np.ndarray, damage: bytes | None
) -> None:
    load_table(array, SIZE, lambda a, b: volume[a:b])
    (kept,) = (array.parent.parent / "body").iterdir()
    kept.write_bytes(kept.read_bytes()[:-100] if damage is None else damage)
    table = load_table(array, SIZE, lambda a, b: volume[a:b])
    np.testing.assert_array_equal(table.sums, count(volume).sums)
    load_table(array, SIZE, _refuse)


def test_a_store_that_cannot_be_written_warns(array: Path, volume: np.ndarray) -> None:
    (array.parent.parent / "body").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="body table of volume 'a' cannot be kept"):
        table = load_table(array, SIZE, lambda a, b: volume[a:b])
    assert table.total == (volume > BODY).sum()
