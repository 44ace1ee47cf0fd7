from __future__ import annotations

import os
import pickle
from collections.abc import Callable

import numpy as np
import pytest

from medspark.data.reader import DamagedVolume, VolumeReader
from medspark.data.store import Store, write_array

StoreMaker = Callable[..., Store]


@pytest.fixture
def volume() -> np.ndarray:
    """`[70, 80, 90]`: several chunks and blocks; smooth, so that it compresses."""
    z, y, x = np.ogrid[:70, :80, :90]
    return ((z * 31 + y * 17 + x * 5) % 2000 - 1000).astype(np.int16)


@pytest.fixture
def store(make_store: StoreMaker, volume: np.ndarray) -> Store:
    return make_store({"scan7": ("p", volume)})


def test_boxes_equal_slices(store: Store, volume: np.ndarray) -> None:
    reader, record = VolumeReader(store), store.records[0]
    rng = np.random.default_rng(0)
    for _ in range(40):
        size = [int(rng.integers(1, n + 1)) for n in volume.shape]
        start = [int(rng.integers(0, n - e + 1)) for n, e in zip(volume.shape, size, strict=True)]
        box = tuple(slice(b, b + e) for b, e in zip(start, size, strict=True))
        np.testing.assert_array_equal(reader.read(record, start, size), volume[box])
        np.testing.assert_array_equal(store.read("scan7", start, size), volume[box])


def test_reads_into_a_part_of_a_batch(store: Store, volume: np.ndarray) -> None:
    batch = np.full((3, 8, 9, 10), 7, np.int16)
    VolumeReader(store).read_into(batch[1], store.records[0], (60, 70, 80))
    np.testing.assert_array_equal(batch[1], volume[60:68, 70:79, 80:90])
    assert (batch[[0, 2]] == 7).all()


def test_a_replaced_array_is_opened_anew(store: Store, volume: np.ndarray) -> None:
    reader, record = VolumeReader(store), store.records[0]
    before = reader.read(record, (0, 0, 0), (8, 8, 8))
    assert reader.table(record).total == (volume > -500).sum()
    path = store.volume_path("scan7")
    write_array(path.with_name("new.b2nd"), volume[::-1])
    os.replace(path.with_name("new.b2nd"), path)
    after = reader.read(record, (0, 0, 0), (8, 8, 8))
    np.testing.assert_array_equal(after, volume[::-1][:8, :8, :8])
    assert not np.array_equal(before, after)
    assert reader.body_voxel(record, 0)  # a table of the new array


def test_open_arrays_do_not_travel(store: Store, volume: np.ndarray) -> None:
    reader = VolumeReader(store)
    reader.table(store.records[0])
    other = pickle.loads(pickle.dumps(reader))
    box = other.read(store.records[0], (1, 2, 3), (4, 5, 6))
    np.testing.assert_array_equal(box, volume[1:5, 2:7, 3:9])


def test_damage_is_named(store: Store) -> None:
    """Half of the file is overwritten: every read of it either works or names the volume."""
    path = store.volume_path("scan7")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 4 : len(raw) // 2] = b"\xff" * (len(raw) // 2 - len(raw) // 4)
    path.write_bytes(raw)
    with pytest.raises(DamagedVolume, match=r"volume 'scan7' \(source 'scan7.mha'\).*box") as info:
        VolumeReader(store).read(store.records[0], (0, 0, 0), store.records[0].size)
    assert "Run `medspark prepare` again with verify=true" in str(info.value)


@pytest.mark.parametrize("keep", [0, 10, 3000])
def test_a_truncated_file_is_named(store: Store, keep: int) -> None:
    path = store.volume_path("scan7")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DamagedVolume, match=r"scan7.*cannot be opened"):
        VolumeReader(store).read(store.records[0], (0, 0, 0), (8, 8, 8))


def test_a_missing_file_is_named(store: Store) -> None:
    store.volume_path("scan7").unlink()
    with pytest.raises(DamagedVolume, match=r"scan7.*No such file") as info:
        VolumeReader(store).read(store.records[0], (0, 0, 0), (8, 8, 8))
    assert str(info.value).count("scan7.mha") == 1  # told once


def test_another_array_is_named(store: Store) -> None:
    path = store.volume_path("scan7")
    path.unlink()
    write_array(path, np.zeros((70, 80, 91), np.int16))
    with pytest.raises(DamagedVolume, match=r"scan7.*no int16 array of \(70, 80, 90\)"):
        VolumeReader(store).read(store.records[0], (0, 0, 0), (8, 8, 8))


def test_table_of_another_volume_is_named(store: Store) -> None:
    reader, record = VolumeReader(store), store.records[0]
    table = reader.table(record)
    crowded = np.array(table.sums)
    crowded[1:, 1:, 1:] += 512
    object.__setattr__(table, "sums", crowded)
    with pytest.raises(DamagedVolume, match=r"scan7.*body table"):
        reader.body_voxel(record, int(crowded[1, 1, 1]) - 1)


def test_errors(store: Store) -> None:
    reader, record = VolumeReader(store), store.records[0]
    with pytest.raises(IndexError, match="leaves"):
        reader.read(record, (63, 0, 0), (8, 8, 8))
    with pytest.raises(IndexError, match="leaves"):
        reader.read(record, (-1, 0, 0), (8, 8, 8))
    with pytest.raises(ValueError, match="float32"):
        reader.read_into(np.empty((8, 8, 8), np.float32), record, (0, 0, 0))
    with pytest.raises(ValueError, match="contiguous"):
        reader.read_into(np.empty((8, 8, 8), np.int16)[:, :, ::2], record, (0, 0, 0))
