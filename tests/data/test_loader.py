from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from medspark.data.crops import CropDataset
from medspark.data.ingest import prepare
from medspark.data.loader import CropBatch, CropLoader
from medspark.data.reader import DamagedVolume
from medspark.data.store import Store
from medspark.data.windows import Intensity

StoreMaker = Callable[..., Store]
SIZE = (8, 12, 16)


@pytest.fixture
def crops(make_store: StoreMaker) -> CropDataset:
    """64 crops of three volumes, one of them smaller than the crop."""
    rng = np.random.default_rng(1)

    def noise(*shape: int) -> np.ndarray:
        return rng.integers(-1024, 2000, shape).astype(np.int16)

    store = make_store(
        {"a": ("p", noise(40, 41, 42)), "b": ("q", noise(33, 5, 80)), "c": ("q", noise(20, 30, 40))}
    )
    return CropDataset(store, store.records, SIZE, Intensity.named("wide"), length=64, seed=11,
                       mask_grid=(2, 3, 4))  # fmt: skip


def assert_equal(batch: CropBatch, other: CropBatch) -> None:
    assert batch.visible is not None
    assert other.visible is not None
    assert torch.equal(batch.indices, other.indices)
    assert torch.equal(batch.volume, other.volume)
    assert torch.equal(batch.visible, other.visible)


def test_batches_hold_the_crops_of_the_dataset(crops: CropDataset, device: torch.device) -> None:
    """Same numbers as one crop at a time on the CPU, whatever the device."""
    batches = list(CropLoader(crops, 5, device=device))
    assert [b.indices.tolist() for b in batches] == [list(range(k, k + 5)) for k in range(0, 60, 5)]
    for batch in batches:
        assert batch.volume.device.type == device.type
        assert (batch.volume.dtype, batch.volume.shape) == (torch.float32, (5, 1, *SIZE))
        for sample, cells, index in zip(
            batch.volume.cpu(), batch.visible, batch.indices.tolist(), strict=True
        ):  # type: ignore[arg-type]
            assert torch.equal(sample, crops[index])
            expected = crops.intensity.normalise(crops.hu(index))
            np.testing.assert_array_equal(sample[0].numpy(), expected)
            np.testing.assert_array_equal(cells.numpy(), crops.visible(index))


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same(crops: CropDataset, workers: int) -> None:
    """All batches are kept to the end: none lies in memory that a later one overwrites."""
    alone = list(CropLoader(crops, 4))
    shared = list(CropLoader(crops, 4, num_workers=workers, prefetch=1))
    assert len(alone) == len(shared) == 16
    for batch, other in zip(alone, shared, strict=True):
        assert_equal(batch, other)


@pytest.mark.parametrize("workers", [0, 1])
def test_two_processes_read_the_joint_batch(crops: CropDataset, workers: int) -> None:
    joint = list(CropLoader(crops, 8))
    ranks = [CropLoader(crops, 4, rank=r, world=2, num_workers=workers) for r in range(2)]
    assert [len(loader) for loader in ranks] == [8, 8]
    for whole, first, second in zip(joint, *ranks, strict=True):
        both = (torch.cat([first.visible, second.visible]),  # type: ignore[list-item]
                torch.cat([first.indices, second.indices]))  # fmt: skip
        assert_equal(whole, CropBatch(torch.cat([first.volume, second.volume]), *both))


def test_resume_in_the_middle_is_exact(crops: CropDataset) -> None:
    """Stopped after three batches by two processes, continued by one with workers."""
    whole = torch.cat([batch.volume for batch in CropLoader(crops, 2)])
    before = [iter(CropLoader(crops, 2, rank=r, world=2)) for r in range(2)]
    parts = [torch.cat([next(before[0]).volume, next(before[1]).volume]) for _ in range(3)]
    after = CropLoader(crops, 2, start=12, num_workers=2)
    assert len(after) == 26
    parts += [batch.volume for batch in after]
    assert torch.equal(torch.cat(parts), whole)


def test_each_pass_starts_at_the_start(crops: CropDataset) -> None:
    loader = CropLoader(crops, 4, start=7, stop=20)
    first, second = list(loader), list(loader)
    assert first[0].indices.tolist() == [7, 8, 9, 10]
    assert len(first) == len(loader) == 3
    for batch, other in zip(first, second, strict=True):
        assert_equal(batch, other)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_other_random_numbers_are_used(crops: CropDataset, workers: int) -> None:
    """A resumed run makes another number of loaders: they must not move anybody's generator."""
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    next(iter(CropLoader(crops, 2, num_workers=workers)))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numbers)  # noqa: NPY002


def test_no_mask_without_a_grid(crops: CropDataset) -> None:
    crops.mask_grid = None
    assert next(iter(CropLoader(crops, 2, num_workers=1))).visible is None


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_is_named(crops: CropDataset, workers: int) -> None:
    crops.store.volume_path("a").write_bytes(b"nothing")
    with pytest.raises(DamagedVolume, match="volume 'a'"):
        list(CropLoader(crops, 4, num_workers=workers))


def test_real_ct_equals_the_array(real_data: Path, tmp_path: Path) -> None:
    """Crops of a chest CT against slices of the whole array, taken as the places say."""
    (tmp_path / "source").mkdir()
    for name in ("chest_cip_ct64.nrrd", "chest_elastix_lung_small.mha"):
        shutil.copy(real_data / "ct" / name, tmp_path / "source")
    prepare(tmp_path / "source", tmp_path / "store", spacing=None, progress=False)
    store = Store(tmp_path / "store")
    assert len(store) == 2
    crops = CropDataset(store, store.records, (32, 48, 40), Intensity.named("lung"), length=24,
                        seed=3)  # fmt: skip
    whole = {record.id: store.read(record.id) for record in store.records}
    seen = set()
    for batch in CropLoader(crops, 4, num_workers=2):
        for sample, index in zip(batch.volume[:, 0], batch.indices.tolist(), strict=True):
            place = crops.place(index)
            assert place.extent == (32, 48, 40)
            cut = whole[place.record.id][
                tuple(slice(b, b + e) for b, e in zip(place.start, place.extent, strict=True))
            ]
            cut = np.flip(cut, [axis for axis in range(3) if place.flips[axis]])
            expected = (np.clip(cut, -1350, 150) + 1350) / 1500
            np.testing.assert_allclose(sample.numpy(), (expected - 0.7) / 0.3, atol=2e-6)
            seen.add(place.record.id)
    assert len(seen) == 2


def test_errors(crops: CropDataset) -> None:
    with pytest.raises(ValueError, match="stop 65"):
        CropLoader(crops, 4, stop=65)
    with pytest.raises(ValueError, match="num_workers -1"):
        CropLoader(crops, 4, num_workers=-1)
    with pytest.raises(ValueError, match="prefetch 0"):
        CropLoader(crops, 4, prefetch=0)
