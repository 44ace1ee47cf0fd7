from __future__ import annotations

import csv
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import blosc2
import numpy as np
import pytest

from medspark.data.store import (
    Record,
    Store,
    hash_text,
    split_patients,
    write_array,
    write_atomically,
)

StoreMaker = Callable[..., Store]


@pytest.fixture
def big() -> np.ndarray:
    return np.random.default_rng(1).integers(-1024, 3071, (70, 130, 66)).astype(np.int16)


def test_round_trip(make_store: StoreMaker, big: np.ndarray) -> None:
    store = make_store({"a": ("p", big)})
    whole = store.read("a")
    assert whole.dtype == np.int16
    np.testing.assert_array_equal(whole, big)
    part = store.read("a", (3, 60, 1), (66, 9, 64))
    np.testing.assert_array_equal(part, big[3:69, 60:69, 1:65])
    np.testing.assert_array_equal(store.read("a", start=(69, 0, 0)), big[69:])


def test_layout_on_disk(make_store: StoreMaker, big: np.ndarray) -> None:
    store = make_store({"a": ("p", big)})
    array = blosc2.open(str(store.volume_path("a")), mode="r")
    assert (array.chunks, array.blocks) == ((64, 64, 64), (32, 32, 32))
    assert array.cparams.codec == blosc2.Codec.LZ4HC
    assert array.cparams.clevel == 5
    assert blosc2.Filter.BITSHUFFLE in array.cparams.filters
    assert array.dtype == np.int16


def test_thin_volume(make_store: StoreMaker) -> None:
    thin = np.arange(3 * 5 * 700, dtype=np.int16).reshape(3, 5, 700)
    np.testing.assert_array_equal(make_store({"a": ("p", thin)}).read("a"), thin)


@pytest.mark.parametrize(
    ("start", "size"),
    [((0, 0, 0), (71, 1, 1)), ((-1, 0, 0), (1, 1, 1)), ((0, 130, 0), (1, 1, 1)),
     ((0, 0, 0), (0, 1, 1))],
)  # fmt: skip
def test_box_outside(
    make_store: StoreMaker, big: np.ndarray, start: tuple[int, ...], size: tuple[int, ...]
) -> None:
    with pytest.raises(IndexError, match="leaves volume"):
        make_store({"a": ("p", big)}).read("a", start, size)


def test_unknown_volume(make_store: StoreMaker) -> None:
    with pytest.raises(KeyError, match="no volume 'b'"):
        make_store({}).read("b")


def test_manifest_round_trip(tmp_path: Path) -> None:
    record = Record(
        id="1", source="a, \"b\"/c.nii", patient="p", series="s", size=(1, 2, 3),
        spacing=(0.5, 1.25, 3.0), orientation="RAS", hu_min=-1024, hu_max=99,
        voxels_sha256="ab", status="quarantined", reason="line, with commas",
        warnings=("one", "two; three"), fingerprint="f",
    )  # fmt: skip
    Store.create(tmp_path / "s").put([record, Record(id="2", source="b")])
    store = Store(tmp_path / "s")
    assert store.all_records == [record, Record(id="2", source="b")]
    assert store.quarantined == [record]
    assert [r.id for r in store.records] == ["2"]
    assert len(store) == 1
    with (tmp_path / "s/manifest.csv").open() as file:
        assert next(csv.DictReader(file))["size"] == "1x2x3"


def test_names_in_any_script(tmp_path: Path) -> None:
    """The manifest is UTF-8 whatever the locale."""
    record = Record(id="1", source="\u00fcbung/\u80f8\u90e8.nii.gz")
    Store.create(tmp_path / "s").put([record])
    assert Store(tmp_path / "s").all_records == [record]
    assert record.source.encode() in (tmp_path / "s/manifest.csv").read_bytes()


def test_put_replaces_by_id(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "s")
    store.put([Record(id="1", source="a"), Record(id="2", source="b")])
    store.put([Record(id="1", source="a", status="excluded")])
    assert [(r.id, r.status) for r in Store(store.path).all_records] == [
        ("1", "excluded"),
        ("2", "ok"),
    ]


def test_failed_write_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.csv"
    write_atomically(path, "old")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no volume store"):
        Store(tmp_path)
    (tmp_path / "thesis.doc").touch()
    with pytest.raises(FileExistsError, match="no volume store"):
        Store.create(tmp_path)


def test_other_version(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "s")
    (store.path / "store.json").write_text('{"format": "medspark-store", "version": 99}')
    with pytest.raises(ValueError, match="another format"):
        Store(store.path)


def test_damaged_manifest(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "s")
    (store.path / "manifest.csv").write_text("id,source\n1,a\n")
    with pytest.raises(ValueError, match="damaged"):
        Store(store.path)


def test_create_opens_what_is_there(make_store: StoreMaker, big: np.ndarray) -> None:
    store = make_store({"a": ("p", big)})
    assert len(Store.create(store.path)) == 1


def test_spacing(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "s")
    assert store.spacing is None
    store.put([Record(id=n, source=n, spacing=(2.0, 1.5, 1.5)) for n in "ab"])
    assert store.spacing == (2.0, 1.5, 1.5)
    store.put([Record(id="c", source="c", spacing=(2.5, 1.5, 1.5))])
    assert store.spacing is None


def test_pickles(make_store: StoreMaker, big: np.ndarray) -> None:
    store = pickle.loads(pickle.dumps(make_store({"a": ("p", big)})))
    np.testing.assert_array_equal(store.read("a"), big)


def test_write_array_makes_int16(tmp_path: Path) -> None:
    write_array(tmp_path / "a.b2nd", np.ones((4, 4, 4), np.int64))
    assert blosc2.open(str(tmp_path / "a.b2nd"), mode="r").dtype == np.int16


def patients(tmp_path: Path, count: int) -> Store:
    store = Store.create(tmp_path / "s")
    store.put(
        Record(id=f"{p}-{v}", source=f"{p}-{v}", patient=f"p{p}")
        for p in range(count)
        for v in range(1 + p % 3)
    )
    store.put([Record(id="bad", source="bad", patient="bad", status="quarantined")])
    return store


def test_split_is_by_patient_and_complete(tmp_path: Path) -> None:
    store = patients(tmp_path, 20)
    train, val = split_patients(store, 0.25, seed=3)
    assert {r.patient for r in train}.isdisjoint({r.patient for r in val})
    assert len({r.patient for r in val}) == 5
    assert {r.id for r in train + val} == {r.id for r in store.records}
    assert split_patients(Store(store.path), 0.25, seed=3) == (train, val)
    assert split_patients(store, 0.25, seed=4)[1] != val


def test_split_of_two(tmp_path: Path) -> None:
    for fraction in (0.01, 0.99):
        train, val = split_patients(patients(tmp_path, 2), fraction, seed=0)
        assert train
        assert val


def test_larger_fraction_keeps_the_smaller_one(tmp_path: Path) -> None:
    store = patients(tmp_path, 20)
    small, large = (split_patients(store, f, seed=0)[1] for f in (0.2, 0.4))
    assert {r.id for r in small} < {r.id for r in large}


def test_split_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least two"):
        split_patients(patients(tmp_path, 1), 0.5, seed=0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_patients(patients(tmp_path, 3), 1.0, seed=0)


def test_hash_text() -> None:
    assert hash_text("abc") == "ba7816bf8f01cfea"
    assert hash_text("abc", 4) == "ba78"
