"""Batches of views: the same for any workers, processes, resume and path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from medspark.data.crops import CropDataset
from medspark.data.reader import DamagedVolume
from medspark.data.store import Store
from medspark.data.views import PRESETS, ViewDataset, ViewPolicy
from medspark.data.views_loader import ViewBatch, ViewLoader
from medspark.data.windows import Intensity

StoreMaker = Callable[..., Store]
POLICY = replace(
    PRESETS["swav"],
    size=(12, 14, 16),
    local_size=(6, 8, 8),
    edge_mm=(24.0, 40.0),
    local_edge_mm=(12.0, 18.0),
    n_local=2,
    cutouts=1,
    thickness_share=0.5,
)


@pytest.fixture
def views(make_store: StoreMaker) -> ViewDataset:
    """24 samples of three volumes, one of them thin."""
    rng = np.random.default_rng(1)

    def noise(*shape: int) -> np.ndarray:
        return rng.integers(-1024, 2000, shape).astype(np.int16)

    store = make_store(
        {"a": ("p", noise(40, 41, 42)), "b": ("q", noise(33, 5, 80)), "c": ("q", noise(20, 30, 40))}
    )
    return dataset(store, POLICY, (8, 16, 16))


def dataset(store: Store, policy: ViewPolicy, crop: tuple[int, int, int]) -> ViewDataset:
    crops = CropDataset(store, store.records, crop, Intensity.named("wide"), length=24, seed=11)
    return ViewDataset(crops, policy)


def assert_equal(batch: ViewBatch, other: ViewBatch) -> None:
    assert torch.equal(batch.indices, other.indices)
    assert len(batch.views) == len(other.views) == 4
    for view, same in zip(batch.views, other.views, strict=True):
        assert torch.equal(view, same)


def test_batches_hold_the_views_of_the_dataset(views: ViewDataset) -> None:
    batches = list(ViewLoader(views, 5))
    assert [b.indices.tolist() for b in batches] == [list(range(k, k + 5)) for k in range(0, 20, 5)]
    for batch in batches:
        assert [tuple(v.shape[1:]) for v in batch.views] == [(1, 12, 14, 16)] * 2 + [
            (1, 6, 8, 8)
        ] * 2
        for row, index in enumerate(batch.indices.tolist()):
            for view, alone in zip(batch.views, views[index], strict=True):
                assert torch.equal(view[row], alone)


def test_a_device_makes_the_same_views(views: ViewDataset, device: torch.device) -> None:
    """Whole batches at once; values of 2000 HU differ by less than 4, most by nothing."""
    for batch, made in zip(
        ViewLoader(views, 6), ViewLoader(views, 6, device=device, batched=True), strict=True
    ):
        for view, other in zip(batch.views, made.views, strict=True):
            assert other.device.type == device.type
            difference = (view - other.cpu()).abs() * 0.24 * 2000
            assert difference.max() < 4
            assert difference.mean() < 0.05


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same(
    views: ViewDataset, workers: int, batched: bool
) -> None:
    """All batches are kept to the end: none lies in memory that a later one overwrites."""
    alone = list(ViewLoader(views, 3, batched=batched))
    shared = list(ViewLoader(views, 3, num_workers=workers, prefetch=1, batched=batched))
    assert len(alone) == len(shared) == 8
    for batch, other in zip(alone, shared, strict=True):
        assert_equal(batch, other)


def test_two_processes_read_the_joint_batch(views: ViewDataset) -> None:
    joint = list(ViewLoader(views, 6))
    ranks = [ViewLoader(views, 3, rank=r, world=2) for r in range(2)]
    assert [len(loader) for loader in ranks] == [4, 4]
    for whole, first, second in zip(joint, *ranks, strict=True):
        both = [torch.cat(pair) for pair in zip(first.views, second.views, strict=True)]
        assert_equal(whole, ViewBatch(both, torch.cat([first.indices, second.indices])))


def test_resume_in_the_middle_is_exact(views: ViewDataset) -> None:
    """Stopped after three batches of four, continued by two processes with a worker."""
    whole = list(ViewLoader(views, 4))
    ranks = [iter(ViewLoader(views, 2, start=12, rank=r, world=2, num_workers=1)) for r in range(2)]
    for expected in whole[3:]:
        first, second = (next(rank) for rank in ranks)
        both = [torch.cat(pair) for pair in zip(first.views, second.views, strict=True)]
        assert_equal(expected, ViewBatch(both, torch.cat([first.indices, second.indices])))


def test_each_pass_starts_at_the_start(views: ViewDataset) -> None:
    loader = ViewLoader(views, 4, start=7, stop=20)
    first, second = list(loader), list(loader)
    assert first[0].indices.tolist() == [7, 8, 9, 10]
    assert len(first) == len(loader) == 3
    for batch, other in zip(first, second, strict=True):
        assert_equal(batch, other)


@pytest.mark.parametrize("batched", [False, True])
def test_slices_have_no_depth(views: ViewDataset, batched: bool) -> None:
    flat = replace(POLICY, dims=2, size=(1, 14, 16), local_size=(1, 8, 8), rotate=(9.0, 0.0, 0.0))
    slices = dataset(views.crops.store, flat, (1, 16, 16))
    batch = next(iter(ViewLoader(slices, 3, batched=batched)))
    assert [tuple(v.shape) for v in batch.views] == [(3, 1, 14, 16)] * 2 + [(3, 1, 8, 8)] * 2
    for view, alone in zip(batch.views, slices[2], strict=True):
        np.testing.assert_allclose(view[2], alone, atol=8e-3)


def test_memory_holds_every_box(make_store: StoreMaker) -> None:
    """Fine and coarse volumes, all presets: no box is larger than the memory for it."""
    rng = np.random.default_rng(0)
    store = make_store({"a": ("p", rng.integers(-100, 100, (90, 160, 170)).astype(np.int16))})
    for policy in PRESETS.values():
        many = dataset(store, policy, (1, 40, 40) if policy.dims == 2 else (40, 40, 40))
        for i in range(24):
            for number, frame in enumerate(many.sample(i).frames):
                assert all(n <= m for n, m in zip(frame.memory, many.box_size(number), strict=True))
                assert max(many.box_size(number)) <= 171


@pytest.mark.parametrize("workers", [0, 1])
def test_no_other_random_numbers_are_used(views: ViewDataset, workers: int) -> None:
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    next(iter(ViewLoader(views, 2, num_workers=workers)))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numbers)  # noqa: NPY002


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_is_named(views: ViewDataset, workers: int) -> None:
    views.crops.store.volume_path("a").write_bytes(b"nothing")
    with pytest.raises(DamagedVolume, match="volume 'a'"):
        list(ViewLoader(views, 4, num_workers=workers))


def test_errors(views: ViewDataset) -> None:
    with pytest.raises(ValueError, match="stop 25"):
        ViewLoader(views, 4, stop=25)
    with pytest.raises(ValueError, match="num_workers -1"):
        ViewLoader(views, 4, num_workers=-1)
    with pytest.raises(ValueError, match="prefetch 0"):
        ViewLoader(views, 4, prefetch=0)
    with pytest.raises(IndexError, match="24 of 24"):
        views[24]
