from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from medspark.data.crops import CropDataset, pad_with_air
from medspark.data.reader import DamagedVolume
from medspark.data.sampler import draw_visible
from medspark.data.store import Store
from medspark.data.windows import Intensity, Window

StoreMaker = Callable[..., Store]
# 1 HU apart at all values: a crop shows where it was cut.
PLAIN = Intensity(Window("plain", -1024, 31000), 0.0, 1.0)


@pytest.fixture
def ramp() -> np.ndarray:
    """Every voxel another value: `[20, 24, 28]`."""
    return np.arange(20 * 24 * 28, dtype=np.int16).reshape(20, 24, 28)


def dataset(
    store: Store, size: tuple[int, int, int] = (8, 9, 10), **options: object
) -> CropDataset:
    values = {"length": 50, "seed": 5, "body_share": 0.0} | options
    return CropDataset(store, store.records, size, PLAIN, **values)  # type: ignore[arg-type]


def test_crops_are_boxes_of_the_volume(make_store: StoreMaker, ramp: np.ndarray) -> None:
    crops = dataset(make_store({"a": ("p", ramp)}), flips=False)
    starts = set()
    for i in range(50):
        crop = crops.hu(i)
        z, y, x = np.unravel_index(int(crop[0, 0, 0]), ramp.shape)
        np.testing.assert_array_equal(crop, ramp[z : z + 8, y : y + 9, x : x + 10])
        starts.add((z, y, x))
    assert len(starts) > 45
    assert {z for z, _, _ in starts} == set(range(13))  # both ends are reached


def test_item_is_the_normalised_crop(make_store: StoreMaker, ramp: np.ndarray) -> None:
    store = make_store({"a": ("p", ramp)})
    intensity = Intensity(Window("w", 0, 10000), 0.25, 0.5)
    crops = CropDataset(store, store.records, (8, 9, 10), intensity, length=3, seed=5)
    item = crops[1]
    assert (item.dtype, tuple(item.shape)) == (torch.float32, (1, 8, 9, 10))
    expected = (np.clip(crops.hu(1), 0, 10000) / 10000 - 0.25) / 0.5
    np.testing.assert_allclose(item[0].numpy(), expected, atol=1e-5)


def test_flips_mirror_each_axis_half_the_time(make_store: StoreMaker, ramp: np.ndarray) -> None:
    store = make_store({"a": ("p", ramp)})
    plain, flipped = dataset(store, flips=False, length=300), dataset(store, length=300)
    counts = Counter[int]()
    for i in range(300):
        crop = flipped.hu(i)
        steps = [np.sign(np.diff(crop, axis=axis)).min() for axis in range(3)]
        mirrored = [axis for axis in range(3) if steps[axis] < 0]
        counts.update(mirrored)
        np.testing.assert_array_equal(np.flip(crop, mirrored), plain.hu(i))
    assert all(110 < counts[axis] < 190 for axis in range(3))


def test_any_worker_count_gives_the_same(make_store: StoreMaker, ramp: np.ndarray) -> None:
    crops = dataset(make_store({"a": ("p", ramp), "b": ("q", ramp[::-1])}), length=12)
    alone = torch.cat(list(DataLoader(crops, batch_size=4)))
    for workers in (1, 2):
        loader = DataLoader(crops, batch_size=4, num_workers=workers)
        assert torch.equal(torch.cat(list(loader)), alone)


def test_seed_and_index_decide(make_store: StoreMaker, ramp: np.ndarray) -> None:
    store = make_store({"a": ("p", ramp), "b": ("q", ramp[::-1])})
    first, longer = dataset(store), dataset(store, length=90)
    assert all(np.array_equal(first.hu(i), longer.hu(i)) for i in range(50))
    other = dataset(store, seed=6)
    assert sum(np.array_equal(first.hu(i), other.hu(i)) for i in range(50)) < 5
    shuffled = CropDataset(
        store, store.records[::-1], (8, 9, 10), PLAIN, length=50, seed=5, body_share=0.0
    )
    assert all(np.array_equal(first.hu(i), shuffled.hu(i)) for i in range(50))


def test_patients_are_drawn_evenly(make_store: StoreMaker) -> None:
    """One patient with a large and a small volume, one with a small: 1/2 in all, 9 to 1 inside."""

    def flat(depth: int, value: int) -> np.ndarray:
        return np.full((depth, 4, 4), value, np.int16)

    store = make_store({"a": ("p", flat(36, 1)), "b": ("p", flat(4, 2)), "c": ("q", flat(4, 3))})
    crops = dataset(store, (2, 2, 2), length=1000)
    counts = Counter(int(crops.hu(i)[0, 0, 0]) for i in range(1000))
    assert counts[3] == pytest.approx(500, abs=60)
    assert counts[2] == pytest.approx(50, abs=25)


def test_small_volume_is_padded_with_air(make_store: StoreMaker) -> None:
    small = np.full((4, 20, 7), 40, np.int16)
    crop = dataset(make_store({"a": ("p", small)}), (8, 10, 10), flips=False).hu(0)
    assert (crop[2:6, :, 1:8] == 40).all()
    assert (crop == -1024).sum() == crop.size - 4 * 10 * 7


def test_pad_gives_the_far_side_more() -> None:
    padded = pad_with_air(np.ones((2, 3, 4), np.int16), (5, 3, 2))
    assert padded.shape == (5, 3, 4)
    assert padded[:, 0, 0].tolist() == [-1024, 1, 1, -1024, -1024]


def test_crops_look_for_body(make_store: StoreMaker) -> None:
    """A body in a tenth of the volume: asked for, it is in most crops; not asked for, in few."""
    air = np.full((40, 40, 40), -1000, np.int16)
    air[:, :, :8] = 50
    store = make_store({"a": ("p", air)})

    def share(min_body: float) -> float:
        crops = dataset(store, (8, 8, 8), min_body=min_body, length=200)
        return float(np.mean([(crops.hu(i) > -500).mean() >= 0.3 for i in range(200)]))

    assert share(0.0) < 0.3
    assert share(0.3) > 0.7


def test_best_try_is_taken(make_store: StoreMaker) -> None:
    air = np.full((16, 16, 64), -1000, np.int16)
    air[:, :, :4] = 50
    store = make_store({"a": ("p", air)})
    asked = dataset(store, (8, 8, 8), min_body=1.0, length=300)
    shares = [(asked.hu(i) > -500).mean() for i in range(300)]
    assert max(shares) == 0.5  # full is impossible
    assert np.mean(np.array(shares) > 0) > 0.3  # one random place has body in 0.07


@pytest.fixture
def tissue() -> np.ndarray:
    """`[40, 40, 40]` of air with 216 body voxels in two heaps, none near the border."""
    volume = np.full((40, 40, 40), -1000, np.int16)
    volume[12:17, 12:17, 12:17] = 30
    volume[20:27, 22:35, 25] = 60
    return volume


def test_share_of_crops_is_centred_on_body(make_store: StoreMaker, tissue: np.ndarray) -> None:
    """Every crop that says so has a body voxel in its middle, and each voxel is as likely."""
    crops = dataset(
        make_store({"a": ("p", tissue)}), (9, 8, 7), body_share=0.75, min_body=0, length=4000
    )
    places = [crops.place(i) for i in range(4000)]
    centred = [place for place in places if place.centred]
    assert len(centred) == pytest.approx(3000, abs=110)  # 4 standard deviations
    counts = Counter(tuple(np.add(place.start, (4, 4, 3)).tolist()) for place in centred)
    body = {(int(z), int(y), int(x)) for z, y, x in np.argwhere(tissue > -500)}
    assert set(counts) <= body
    expected = len(centred) / len(body)
    chi_square = sum((counts[voxel] - expected) ** 2 / expected for voxel in body)
    assert chi_square < 284  # 215 degrees of freedom, p = 0.001
    example = next(i for i in range(4000) if places[i].centred)
    straight = crops.hu(example)[tuple(slice(None, None, -1 if f else 1)
                                       for f in places[example].flips)]  # fmt: skip
    assert straight[4, 4, 3] > -500


def test_a_crop_at_the_border_is_moved_inside(make_store: StoreMaker) -> None:
    corner = np.full((20, 20, 20), -1000, np.int16)
    corner[0, 19, 19] = 0
    crops = dataset(make_store({"a": ("p", corner)}), (6, 6, 6), body_share=1.0)
    assert {crops.place(i).start for i in range(50)} == {(0, 14, 14)}


def test_air_alone_has_no_body_to_centre_on(make_store: StoreMaker) -> None:
    air = np.full((20, 20, 20), -1000, np.int16)
    crops = dataset(make_store({"a": ("p", air)}), (6, 6, 6), body_share=1.0)
    places = [crops.place(i) for i in range(50)]
    assert not any(place.centred for place in places)
    assert len({place.start for place in places}) > 45


def test_positions_are_uniform(make_store: StoreMaker, ramp: np.ndarray) -> None:
    crops = dataset(make_store({"a": ("p", ramp)}), (18, 20, 25), min_body=0.0, length=6000)
    counts = Counter(crops.place(i).start for i in range(6000))
    assert len(counts) == 3 * 5 * 4
    chi_square = sum((n - 100) ** 2 / 100 for n in counts.values())
    assert chi_square < 98.3  # 59 degrees of freedom, p = 0.001


def test_options_change_nothing_else(make_store: StoreMaker, tissue: np.ndarray) -> None:
    """Flips, mask and share are drawn apart: switching one on moves no crop of the others."""
    store = make_store({"a": ("p", tissue)})
    plain = dataset(store, flips=False, min_body=0.0)
    mixed = dataset(store, body_share=0.5, min_body=0.0, mask_grid=(2, 3, 5))
    same = 0
    for i in range(50):
        place = mixed.place(i)
        if not place.centred:
            same += place.start == plain.place(i).start
    assert same == sum(not mixed.place(i).centred for i in range(50)) > 10


def test_mask_is_drawn_with_the_crop(make_store: StoreMaker, ramp: np.ndarray) -> None:
    store = make_store({"a": ("p", ramp)})
    crops = dataset(store, (8, 9, 10), mask_grid=(4, 3, 5), mask_ratio=0.7)
    masks = [crops.visible(i) for i in range(50)]
    assert all(m is not None and m.shape == (4, 3, 5) and m.sum() == 18 for m in masks)
    np.testing.assert_array_equal(masks[9], draw_visible(5, 9, (4, 3, 5), 0.7))
    assert dataset(store).visible(0) is None


def test_damage_reaches_the_caller(make_store: StoreMaker, ramp: np.ndarray) -> None:
    """From a worker process too, with the volume's name."""
    store = make_store({"a": ("p", ramp)})
    store.volume_path("a").write_bytes(b"nothing")
    crops = dataset(store)
    with pytest.raises(DamagedVolume, match="volume 'a'"):
        crops[0]
    with pytest.raises(DamagedVolume, match="volume 'a'"):
        next(iter(DataLoader(crops, num_workers=1)))


def test_places_never_change(make_store: StoreMaker, tissue: np.ndarray) -> None:
    """Pinned, so that a run of an earlier version can be continued with the same crops."""
    store = make_store({"a": ("p", tissue), "b": ("q", tissue[:, ::-1])})
    crops = dataset(store, (9, 8, 7), body_share=0.5, seed=2026)
    found = [crops.place(i) for i in (0, 1, 2, 49)]
    assert [(p.record.id, p.start, p.flips, p.centred) for p in found] == [
        ("a", (9, 10, 10), (False, False, False), True),
        ("b", (8, 21, 11), (False, False, True), True),
        ("b", (23, 13, 23), (False, True, True), False),
        ("a", (3, 8, 16), (False, False, True), False),
    ]


def test_errors(make_store: StoreMaker, ramp: np.ndarray) -> None:
    store = make_store({"a": ("p", ramp)})
    with pytest.raises(ValueError, match="no volumes"):
        CropDataset(store, [], (8, 8, 8), PLAIN, length=1, seed=0)
    with pytest.raises(ValueError, match="crop_size"):
        dataset(store, (8, 0, 8))
    with pytest.raises(ValueError, match="min_body"):
        dataset(store, min_body=2.0)
    with pytest.raises(IndexError, match="crop 50 of 50"):
        dataset(store)[50]
    with pytest.raises(ValueError, match=r"body_share -0.1"):
        dataset(store, body_share=-0.1)
    with pytest.raises(ValueError, match="seed -1"):
        dataset(store, seed=-1)
    with pytest.raises(ValueError, match="mask_grid"):
        dataset(store, mask_grid=(3, 3, 5))
    with pytest.raises(ValueError, match="memory for one"):
        dataset(store).read_into(np.empty((8, 9, 9), np.int16), 0)
