"""Where views lie and what is drawn for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import combinations

import numpy as np
import pytest

from medspark.data.crops import CropDataset
from medspark.data.store import Store, split_patients
from medspark.data.views import PRESETS, Shot, ViewDataset, ViewPolicy, view_policy
from medspark.data.views_draw import draw_shots
from medspark.data.windows import WINDOWS, Intensity, Window

StoreMaker = Callable[..., Store]
PLAIN = Intensity(Window("plain", -1024, 31000), 0.0, 1.0)
LARGE_VOLUME = (400.0, 380.0, 360.0)


def dataset(
    store: Store, policy: ViewPolicy, crop: tuple[int, int, int], **more: object
) -> ViewDataset:
    values = {"length": 40, "seed": 3, "flips": False} | more
    records = values.pop("records", store.records)
    crops = CropDataset(store, records, crop, PLAIN, **values)  # type: ignore[arg-type]
    return ViewDataset(crops, policy)


def draws(policy: ViewPolicy, n: int = 300, volume: tuple[float, ...] = LARGE_VOLUME,
          centre: tuple[float, ...] | None = None) -> list[list[Shot]]:  # fmt: skip
    middle = centre or tuple(v / 2 for v in volume)
    return [draw_shots(policy, 7, i, middle, volume, WINDOWS["wide"]) for i in range(n)]


def shared(a: Shot, b: Shot) -> float:
    """Share of the smaller box that lies in the larger, axis by axis."""
    common, least = 1.0, min(np.prod(a.edges), np.prod(b.edges))
    for ca, ea, cb, eb in zip(a.centre, a.edges, b.centre, b.edges, strict=True):
        common *= max(0.0, min(ca + ea / 2, cb + eb / 2) - max(ca - ea / 2, cb - eb / 2))
    return common / least


@pytest.mark.parametrize("size", [(40, 41, 42), (9, 30, 33), (5, 7, 50)])
def test_without_changes_a_view_is_the_crop(make_store: StoreMaker, size: tuple[int, ...]) -> None:
    """Voxels of 2 x 1 x 1 mm; volumes that are smaller than the crop too, by odd numbers."""
    hu = np.random.default_rng(1).integers(-1000, 1000, size).astype(np.int16)
    store = make_store({"a": ("p", hu)})
    policy = ViewPolicy(size=(8, 12, 14), voxel=(2, 1, 1), edge_mm=(16, 16))
    views = dataset(store, policy, (8, 12, 14))
    for i in range(12):
        expected = views.crops.hu(i)
        first, second = (PLAIN.to_hu(view)[0].numpy() for view in views[i])
        np.testing.assert_allclose(first, expected, atol=0.05)
        assert np.array_equal(first, second)


def test_without_changes_a_slice_is_the_crop(make_store: StoreMaker) -> None:
    hu = np.random.default_rng(1).integers(-1000, 1000, (30, 41, 42)).astype(np.int16)
    policy = ViewPolicy(dims=2, size=(1, 20, 20), local_size=(1, 8, 8), edge_mm=(20, 20))
    views = dataset(make_store({"a": ("p", hu)}), policy, (1, 20, 20))
    for i in range(12):
        for view in views[i]:
            assert view.shape == (1, 20, 20)
            np.testing.assert_allclose(PLAIN.to_hu(view)[0], views.crops.hu(i)[0], atol=0.05)


def test_slices_of_a_sample_share_their_plane(make_store: StoreMaker) -> None:
    """Every plane has its own HU; at the first and last plane too, and with thicker slices."""
    hu = np.broadcast_to(np.arange(30, dtype=np.int16)[:, None, None] * 10, (30, 60, 60)).copy()
    calm = {"contrast": 0.0, "brightness": 0.0, "noise_share": 0.0, "level": 0.0, "width": 1.0}
    policy = replace(PRESETS["swav_2d"], size=(1, 32, 32), local_size=(1, 12, 12), **calm,
                     edge_mm=(30, 50), local_edge_mm=(15, 25), rotate=(0, 0, 0),
                     thickness_share=0.0)  # fmt: skip
    views = dataset(make_store({"a": ("p", hu)}), policy, (1, 40, 40), length=50)
    seen = set()
    for i in range(50):
        plane = views.crops.place(i).start[0]
        for view in views[i]:
            np.testing.assert_allclose(PLAIN.to_hu(view), plane * 10, atol=0.05)
        seen.add(plane)
    assert {0, 29} <= seen
    thick = replace(policy, thickness_share=1.0, thickness_mm=(5.0, 9.0))
    views = dataset(views.crops.store, thick, (1, 40, 40), length=50)
    for i in range(50):
        for view in views[i]:  # half a slab of 9 mm is 2.25 planes
            assert abs(PLAIN.to_hu(view).mean() - views.crops.place(i).start[0] * 10) <= 22.6


@pytest.mark.parametrize("name", ["simclr", "swav", "swav_2d"])
@pytest.mark.parametrize("volume", [LARGE_VOLUME, (40.0, 150.0, 330.0), (90.0, 60.0, 70.0)])
def test_views_overlap_as_stated(name: str, volume: tuple[float, ...]) -> None:
    """Each with each large one: in volumes that are large, thin, or smaller than the views."""
    policy = PRESETS[name]
    rng = np.random.default_rng(2)
    shares = []
    for i in range(120):
        centre = rng.uniform(0, 1, 3) * volume
        shots = draw_shots(policy, 7, i, centre.tolist(), volume, WINDOWS["wide"])
        pairs = [(a, b) for a, b in combinations(shots, 2) if a.view < policy.n_global]
        shares += [shared(a, b) for a, b in pairs]
    assert min(shares) >= policy.min_overlap - 1e-6
    if volume == LARGE_VOLUME:
        assert min(shares) < policy.min_overlap + 0.03  # all the room is used
        assert np.mean(np.array(shares) > 0.95) < 0.75


def test_overlap_can_be_asked_for() -> None:
    for wanted in (0.0, 0.2, 0.85):
        shots = draws(replace(PRESETS["moco_v2"], min_overlap=wanted), 200)
        least = min(shared(a, b) for a, b in shots)
        assert wanted <= least + 1e-9
        assert least < wanted + 0.05


def test_views_lie_in_the_volume_where_they_fit() -> None:
    volume = np.array([190.0, 200.0, 186.0])
    for shots in draws(PRESETS["swav"], 100, tuple(volume), (5.0, 190.0, 85.0)):
        for shot in shots:
            low = np.array(shot.centre) - np.array(shot.edges) / 2
            high = np.array(shot.centre) + np.array(shot.edges) / 2
            assert (low >= -1e-9).all()
            assert (high <= volume + 1e-9).all()


def test_everything_within_its_limits_and_up_to_them() -> None:
    policy = replace(PRESETS["simclr"], cutouts=2)
    shots = [shot for pair in draws(policy, 1200) for shot in pair]
    window = WINDOWS["wide"]

    def column(name: str) -> np.ndarray:
        return np.array([getattr(shot, name) for shot in shots])

    def spans(values: np.ndarray, low: float, high: float) -> bool:
        near = 0.02 * (high - low)
        return bool(low <= values.min() < low + near and high - near < values.max() <= high)

    low, high = column("window").T
    assert spans((low + high) / 2, window.level - 100, window.level + 100)  # 0.05 x 2000 HU
    assert spans(np.log((high - low) / window.width), -np.log(1.25), np.log(1.25))
    assert spans(column("contrast"), 0.85, 1.15)
    assert spans(column("brightness"), -25, 25)
    for axis, limit in enumerate((12, 6, 6)):
        assert spans(column("angles")[:, axis], -limit, limit)
    edges = column("edges")
    assert spans(np.log(edges[:, 0]), np.log(90 / 1.05), np.log(160 * 1.05))
    assert (edges.max(1) / edges.min(1) <= 1.05**2 + 1e-9).all()
    for name, share, most in (("noise", 0.5, 15), ("blur", 0.5, 1.5)):
        values = column(name)
        assert np.mean(values > 0) == pytest.approx(share, abs=0.04)
        assert spans(values, 0, most)
    thick = column("thickness")
    assert np.mean(thick > 0) == pytest.approx(0.3, abs=0.035)
    assert spans(thick[thick > 0], 3, 6)
    assert not column("flips")[:, :2].any()
    assert column("flips")[:, 2].mean() == pytest.approx(0.5, abs=0.04)
    counts = np.bincount([len(shot.cutouts) for shot in shots], minlength=3) / len(shots)
    np.testing.assert_allclose(counts, 1 / 3, atol=0.04)
    boxes = np.array([box for shot in shots for box in shot.cutouts])
    assert boxes.min() == 0
    assert boxes.max() == 64
    assert set((boxes[:, 1] - boxes[:, 0]).ravel()) == set(range(10, 23))  # 0.15 to 0.35 of 64
    assert len({shot.key for shot in shots}) == len(shots)


def test_narrow_windows_keep_their_anatomy() -> None:
    brain = WINDOWS["brain"]  # 80 HU: at most 4 HU of shift and noise
    shots = [s for i in range(200) for s in
             draw_shots(PRESETS["byol"], 0, i, (200,) * 3, LARGE_VOLUME, brain)]  # fmt: skip
    assert 3.8 < max(abs(shot.brightness) for shot in shots) <= 4
    assert 3.8 < max(shot.noise for shot in shots) <= 4
    assert all(abs(sum(shot.window) / 2 - 40) <= 4 for shot in shots)


def test_byol_blurs_its_views_unequally() -> None:
    pairs = draws(PRESETS["byol"], 400)
    assert np.mean([first.blur > 0 for first, _ in pairs]) > 0.99
    assert np.mean([second.blur > 0 for _, second in pairs]) == pytest.approx(0.1, abs=0.05)


def test_a_view_depends_on_seed_sample_and_view_alone() -> None:
    policy = PRESETS["swav"]
    again = draws(policy, 20)
    assert draws(policy, 20) == again
    fewer = draws(replace(policy, n_local=2), 20)
    assert [shots[:4] for shots in again] == fewer
    flat = [str(replace(shot, view=0)) for shots in again for shot in shots]
    assert len(set(flat)) == len(flat)
    other = [draw_shots(policy, 8, i, (200,) * 3, LARGE_VOLUME, WINDOWS["wide"]) for i in range(20)]
    assert all(a != b for a, b in zip(again, other, strict=True))


@pytest.mark.parametrize(
    ("off", "touched"),
    [
        ({"noise_share": 0.0}, {"noise"}),
        ({"rotate": (0.0, 0.0, 0.0)}, {"angles"}),
        ({"flips": (False, False, False)}, {"flips"}),
        ({"thickness_share": 0.0}, {"thickness"}),
        ({"blur_share": (0.0,)}, {"blur"}),
        ({"contrast": 0.0, "brightness": 0.0}, {"contrast", "brightness"}),
        ({"level": 0.0, "width": 1.0}, {"window"}),
        ({"cutouts": 0}, {"cutouts"}),
    ],
)
def test_switching_one_change_off_moves_no_other(off: dict[str, object], touched: set[str]) -> None:
    changed = set()
    policy = PRESETS["simclr"]
    for before, after in zip(draws(policy, 30), draws(replace(policy, **off), 30), strict=True):
        for a, b in zip(before, after, strict=True):
            changed |= {name for name in asdict(a) if getattr(a, name) != getattr(b, name)}
    assert changed == touched


def body_store(make_store: StoreMaker, names: str) -> Store:
    """Each scan has one HU of its own; two scans for each patient."""
    return make_store({
        name: (f"p{n // 2}", np.full((40, 60, 60), 100 + 50 * n, np.int16))
        for n, name in enumerate(names)
    })  # fmt: skip


CALM = {"contrast": 0.0, "brightness": 0.0, "noise_share": 0.0, "level": 0.0, "width": 1.0,
        "cutouts": 0, "rotate": (0.0, 0.0, 0.0)}  # fmt: skip
SMALL = {"size": (16, 16, 16), "edge_mm": (30.0, 50.0), "local_size": (8, 8, 8),
         "local_edge_mm": (15.0, 25.0)}  # fmt: skip


def test_positives_come_from_one_scan_and_none_from_validation(make_store: StoreMaker) -> None:
    store = body_store(make_store, "abcdefgh")
    train, held = split_patients(store, 0.25, seed=1)
    values = {record.id: 100 + 50 * n for n, record in enumerate(store.records)}
    policy = replace(PRESETS["swav"], **CALM, **SMALL)
    views = dataset(store, policy, (16, 24, 24), records=train, length=60)
    seen = set()
    for i in range(60):
        found = {float(hu) for view in views[i] for hu in PLAIN.to_hu(view).round().unique()}
        assert len(found) == 1
        seen |= found
        assert found == {values[views.sample(i).record.id]}
    assert seen == {values[record.id] for record in train}
    assert held
    assert not seen & {values[record.id] for record in held}


def test_views_that_stray_into_air_come_back(make_store: StoreMaker) -> None:
    """A body of 60 x 30 x 30 mm, and places in it."""
    hu = np.full((80, 160, 160), -1000, np.int16)
    hu[:, 60:90, 60:90] = 40
    store = make_store({"a": ("p", hu)})
    policy = replace(PRESETS["simclr"], **CALM, size=(16, 16, 16), edge_mm=(30.0, 40.0),
                     min_overlap=0.1, thickness_share=0.0, blur_share=(0.0,))  # fmt: skip

    def shares(least: float) -> np.ndarray:
        views = dataset(store, replace(policy, min_body=least), (16, 24, 24), body_share=1.0,
                        length=100)  # fmt: skip
        return np.array(
            [(PLAIN.to_hu(v) > -500).float().mean() for i in range(100) for v in views[i]]
        )

    assert np.mean(shares(0.0) < 0.2) > 0.05
    assert np.mean(shares(0.3) < 0.2) == 0


def test_slices_need_flat_crops(make_store: StoreMaker) -> None:
    store = body_store(make_store, "ab")
    with pytest.raises(ValueError, match="one voxel deep"):
        dataset(store, PRESETS["simclr_2d"], (16, 24, 24))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dims": 1}, "dims is 2 or 3"),
        ({"size": (64, 64)}, r"\(z, y, x\)"),
        ({"size": (0, 64, 64)}, "size"),
        ({"edge_mm": (160.0, 80.0)}, "least before"),
        ({"n_global": 3}, "n_global is 1 or 2"),
        ({"n_local": -1}, "n_local"),
        ({"blur_share": ()}, "blur_share"),
        ({"dims": 2}, "depth 1"),
        ({"dims": 2, "size": (1, 8, 8), "local_size": (1, 8, 8)}, "about z only"),
        ({"noise": -1.0}, "noise"),
        ({"shift": 2.0}, "shift"),
        ({"contrast": 1.0}, "contrast"),
        ({"width": 0.5}, "width"),
        ({"cutout_edge": (0.5, 1.5)}, "cut-out"),
        ({"aspect": 1.5, "min_overlap": 0.9}, "out of reach"),
        ({"n_local": 2, "local_edge_mm": (64.0, 120.0)}, "do not fit"),
    ],
)
def test_impossible_policies_say_why(change: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        replace(PRESETS["simclr"], **change)


def test_policies_by_name_and_by_setting() -> None:
    assert view_policy("byol") is PRESETS["byol"]
    assert view_policy(PRESETS["swav"]) is PRESETS["swav"]
    for policy in PRESETS.values():
        assert view_policy(policy.as_dict()) == policy
    assert view_policy({"noise": 3.0}) == replace(PRESETS["none"], noise=3.0)
    with pytest.raises(ValueError, match="unknown views 'simclrr', choose one of none, simclr"):
        view_policy("simclrr")
    with pytest.raises(ValueError, match="no setting rotation"):
        view_policy({"rotation": 3})
