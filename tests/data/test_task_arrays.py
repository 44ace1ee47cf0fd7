from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medspark.data.task_arrays import load_arrays
from medspark.data.tasks import TaskDataset, load_task
from medspark.data.windows import Intensity

SOFT = Intensity.named("soft_tissue")


def arrays(*tail: int, n: int = 6, columns: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    found = {}
    for split in ("train", "val", "test"):
        found[f"{split}_images"] = rng.integers(0, 256, (n, *tail)).astype(np.uint8)
        labels = np.arange(n) % 3
        found[f"{split}_labels"] = labels[:, None] if columns else labels
    return found


def write(path: Path, **given: np.ndarray) -> Path:
    np.savez_compressed(path, **given)
    return path


def npy(shape: tuple[Any, ...], descr: str = "|u1", body: bytes = b"") -> bytes:
    """An npy member that promises a shape, whatever follows."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


def pack(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def member(array: np.ndarray) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue()


def test_values_labels_and_names(tmp_path: Path) -> None:
    given = arrays(28, 28, 28)
    task = load_task(write(tmp_path / "organ.npz", **given))
    assert (task.name, task.grey, task.dims, task.class_names) == ("organ", True, 3, list("012"))
    for split in ("train", "val", "test"):
        for i, sample in enumerate(task.split(split)):
            assert (sample.id, sample.label) == (f"{split}/{i:05d}", i % 3)
            voxels, spacing = task.read(sample)
            np.testing.assert_array_equal(voxels, given[f"{split}_images"][i])
            assert spacing == (1.0, 1.0, 1.0)
    assert len({s.patient for s in task.samples}) == 18
    assert any("no patients" in w for w in task.warnings)
    assert any("LIDC" in w for w in task.warnings)


@pytest.mark.parametrize(
    ("stored", "plain"),
    [
        ((8, 8, 8, 1), (8, 8, 8)),
        ((1, 8, 8, 8), (8, 8, 8)),
        ((8, 8), (8, 8)),
        ((8, 8, 1), (8, 8)),
        ((1, 8, 8), (8, 8)),
    ],
)
def test_channel_axis(tmp_path: Path, stored: tuple[int, ...], plain: tuple[int, ...]) -> None:
    given = arrays(*stored, columns=False)
    task = load_task(write(tmp_path / "a.npz", **given))
    assert task.dims == len(plain)
    sample = task.split("val")[4]
    np.testing.assert_array_equal(task.read(sample)[0], given["val_images"][4].reshape(plain))


def test_fortran_order(tmp_path: Path) -> None:
    given = arrays(5, 6, 7)
    task = load_task(
        write(tmp_path / "a.npz", **{k: np.asfortranarray(v) for k, v in given.items()})
    )
    np.testing.assert_array_equal(task.read(task.samples[2])[0], given["train_images"][2])


@pytest.mark.parametrize("tail", [(5, 6, 7), (6, 7)])
def test_grey_fills_the_window(tmp_path: Path, tail: tuple[int, ...]) -> None:
    """0 is the low end, 255 the high end, 51 a fifth of the way: then standardised as HU."""
    given = arrays(*tail)
    given["train_images"][0] = 51
    given["train_images"][0].flat[:2] = 0, 255
    task = load_task(write(tmp_path / "a.npz", **given))
    x, label, _ = TaskDataset(task, "train", SOFT, None)[0]
    assert tuple(x.shape) == (1, *tail)
    assert label == 0
    flat = SOFT.to_hu(x).flatten()
    np.testing.assert_allclose(flat[:3], [-160, 240, -160 + 400 / 5], atol=1e-3)
    assert x.flatten()[0].item() == pytest.approx((0 - SOFT.mean) / SOFT.std, abs=1e-5)


@pytest.mark.parametrize("tail", [(4, 4, 4), (4, 4)])
def test_resized(tmp_path: Path, tail: tuple[int, ...]) -> None:
    given = arrays(*tail)
    ramp = np.arange(4, dtype=np.uint8) * 60
    given["train_images"][0] = np.broadcast_to(ramp, tail)
    task = load_task(write(tmp_path / "a.npz", **given))
    size = (4,) * (len(tail) - 1) + (8,)
    x = TaskDataset(task, "train", SOFT, size)[0][0]
    assert tuple(x.shape) == (1, *size)
    grey = (SOFT.to_hu(x).reshape(-1, 8)[1] + 160) / 400 * 255
    expected = np.clip((np.arange(8) + 0.5) / 2 - 0.5, 0, 3) * 60
    np.testing.assert_allclose(grey, expected, atol=0.01)


def broken(path: Path, **changed: np.ndarray | None) -> Path:
    given: dict[str, Any] = arrays(4, 4, 4) | changed
    return write(path, **{k: v for k, v in given.items() if v is not None})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"val_labels": None}, "lacks the array val_labels"),
        ({"val_labels": np.zeros((6, 2), int)}, r"val_labels have the shape \(6, 2\) for 6"),
        ({"val_labels": np.zeros(5, int)}, r"val_labels have the shape \(5,\) for 6"),
        ({"val_labels": np.zeros(6)}, "val_labels holds float64 values"),
        ({"val_labels": np.full(6, -1)}, "val_labels go down to -1"),
        ({"val_labels": np.full(6, 7)}, r"labels are \[0, 1, 2, 7\]"),
        ({"val_images": np.zeros((6, 4, 4, 4), np.uint16)}, "val_images are uint16"),
        ({"val_images": np.zeros((6, 4, 4, 4))}, "val_images holds float64"),
        ({"val_images": np.zeros((6, 4, 4, 3), np.uint8)}, "are colour pictures"),
        ({"val_images": np.zeros((6, 4), np.uint8)}, r"have the shape \(6, 4\)"),
        ({"val_images": np.zeros((6, 4, 4, 4, 2), np.uint8)}, r"have the shape \(6, 4, 4, 4, 2\)"),
        ({"val_images": np.zeros((6, 4, 4), np.uint8)}, "pictures in one split and volumes in"),
        ({"val_images": np.zeros((0, 4, 4, 4), np.uint8)}, r"have the shape \(0,"),
    ],
)
def test_bad_arrays(tmp_path: Path, changed: dict[str, np.ndarray | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(broken(tmp_path / "a.npz", **changed))


def test_no_known_array(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no train_images"):
        load_task(write(tmp_path / "a.npz", images=np.zeros(3)))


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "sprung").touch, ())

    given = arrays(4, 4, 4)
    given["val_labels"] = np.array([Trap()] * 6, dtype=object)
    with pytest.raises(ValueError, match="val_labels holds object values"):
        load_task(write(tmp_path / "a.npz", **given))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["../x.npy", "/x.npy", "a\\x.npy", "a/../../x.npy"])
def test_names_that_leave(tmp_path: Path, name: str) -> None:
    members = {f"{k}.npy": member(v) for k, v in arrays(4, 4, 4).items()}
    with pytest.raises(ValueError, match="not trusted"):
        load_task(pack(tmp_path / "a.npz", members | {name: b"x"}))


def test_promises_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    """10^12 voxels; in the member's own header, and in the archive's as well."""
    labels = member(np.zeros((6, 1), np.int64))
    path = pack(
        tmp_path / "a.npz",
        {"train_images.npy": npy((10**6, 100, 100, 100)), "train_labels.npy": labels},
    )
    tracemalloc.start()
    with pytest.raises(ValueError, match="promises 10000000000"):
        load_task(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_header_and_archive_disagree(tmp_path: Path) -> None:
    """One image more, or one fewer, than there are bytes for."""
    for count in (5, 7):
        members = {f"{k}.npy": member(v) for k, v in arrays(4, 4, 4).items()}
        members["val_images.npy"] = npy((count, 4, 4, 4), body=b"\1" * (6 * 64))
        with pytest.raises(ValueError, match=r"val_images promises \d+ bytes, \d+ are packed"):
            load_task(pack(tmp_path / f"{count}.npz", members))


def test_forged_size_in_the_archive(tmp_path: Path) -> None:
    """The archive confirms 3 GiB of voxels: far more than its bytes can hold."""
    head = npy((3000, 100, 100, 100))
    body = b"\0" * 1000
    path = pack(
        tmp_path / "a.npz",
        {"train_images.npy": head + body, "train_labels.npy": member(np.zeros(3000, int))},
    )
    real = struct.pack("<I", len(head) + len(body))
    forged = struct.pack("<I", len(head) + 3 * 10**9)
    assert path.read_bytes().count(real) >= 2
    path.write_bytes(path.read_bytes().replace(real, forged))
    with pytest.raises(ValueError, match=r"promises 3000000\d+ bytes from \d+ packed ones"):
        load_task(path)


def test_bomb(tmp_path: Path) -> None:
    """Zeros that really unpack to 2 MB are refused where the limit is lower."""
    path = broken(tmp_path / "a.npz", train_images=np.zeros((6, 64, 64, 64), np.uint8))
    assert path.stat().st_size < 20_000
    with pytest.raises(ValueError, match=r"promises 0\.0 GiB, the limit is"):
        load_arrays(path, max_bytes=10**6)
    assert load_arrays(path).dims == 3


@pytest.mark.parametrize("shape", ["(-1, 4, 4, 4)", "(6, 4, 4, 'a')", "(2.5,)", "((((", "None"])
def test_impossible_headers(tmp_path: Path, shape: str) -> None:
    head = npy((6,)).replace(b"(6,)", shape.encode())
    text = head[10:]
    members = {f"{k}.npy": member(v) for k, v in arrays(4, 4, 4).items()}
    members["train_images.npy"] = head[:8] + struct.pack("<H", len(text)) + text
    with pytest.raises(ValueError, match=r"a\.npz'"):
        load_task(pack(tmp_path / "a.npz", members))


def test_damage_is_an_error_or_harmless(tmp_path: Path) -> None:
    """Bytes changed and files cut anywhere: a ValueError or a task, nothing else."""
    whole = write(tmp_path / "whole.npz", **arrays(4, 4, 4)).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(400):
        data = bytearray(whole if i % 4 else whole[: rng.integers(len(whole))])
        for at in rng.integers(0, max(1, len(data)), 4):
            if len(data):
                data[at] = rng.integers(256)
        path = tmp_path / f"{i}.npz"  # arrays are kept by path
        path.write_bytes(bytes(data))
        try:
            task = load_task(path)
            for sample in task.samples[::6]:
                assert task.read(sample)[0].dtype == np.uint8
        except ValueError:
            refused += 1
        path.unlink()
    assert refused > 200


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        load_task(tmp_path / "a.npz")
