"""The loaders that bench_data compares: same volumes, same window, random crops and flips, float32.

Each is built inside a process of its own, which answers requests, so that memory and processor time
of one are not those of another.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

ENDLESS = 10**7
SEED = 1


@dataclass(frozen=True)
class Pipeline:
    """What to build: a name of `BUILDERS`, loader processes, crop edge, crops per batch."""

    name: str
    workers: int
    size: int
    batch: int


def tree() -> list[int]:
    """This process and its loaders."""
    return [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]


def counters() -> dict[str, float]:
    """Sums over this process and its loaders: seconds of processor, bytes read (all; from disk)."""
    total = {"cpu": 0.0, "bytes": 0.0, "disk": 0.0}
    for pid in tree():
        # The clock of another process, as clock_getcpuclockid makes it: /proc counts in 10 ms.
        total["cpu"] += time.clock_gettime((~pid << 3) | 2)
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
        io = {key: int(value) for key, value in (line.split(": ") for line in lines)}
        total["bytes"] += io["rchar"]
        total["disk"] += io["read_bytes"]
    return total


def memory_mb() -> float:
    """Proportional set size of this process and its loaders: shared pages count once."""
    total = 0
    for pid in tree():
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024


def _normalised(hu: np.ndarray) -> np.ndarray:
    """The values that every pipeline should give, in float64."""
    from medspark.data.windows import Intensity

    wide = Intensity.named("wide")
    unit = (np.clip(hu.astype(np.float64), -1000, 1000) + 1000) / 2000
    return (unit - wide.mean) / wide.std


def _crops(folder: Path, size: int) -> Any:
    from medspark.data.crops import CropDataset
    from medspark.data.store import Store
    from medspark.data.windows import Intensity

    store = Store(folder / "store")
    shape, grid = (size, size, size), (size // 16, size // 16, size // 16)
    return CropDataset(
        store, store.records, shape, Intensity.named("wide"), length=ENDLESS, seed=SEED,
        mask_grid=grid,
    )  # fmt: skip


def _crop_error(crops: Any) -> float:
    """Greatest difference of 8 finished crops from slices of whole volumes."""
    worst = 0.0
    for index in range(8):
        place = crops.place(index)
        box = tuple(slice(b, b + e) for b, e in zip(place.start, place.extent, strict=True))
        cut = crops.store.read(place.record.id)[box]
        cut = np.flip(cut, [axis for axis in range(3) if place.flips[axis]])
        worst = max(worst, float(np.abs(crops[index][0].numpy() - _normalised(cut)).max()))
    return worst


def _loader(device: str) -> Callable[[Pipeline, Path], tuple[Iterator[Any], float]]:
    def build(pipeline: Pipeline, folder: Path) -> tuple[Iterator[Any], float]:
        from medspark.data.loader import CropLoader

        crops = _crops(folder, pipeline.size)
        loader = CropLoader(crops, pipeline.batch, num_workers=pipeline.workers, device=device)
        return iter(loader), _crop_error(crops)

    return build


def _dataset(pipeline: Pipeline, folder: Path) -> tuple[Iterator[Any], float]:
    from torch.utils.data import DataLoader

    crops = _crops(folder, pipeline.size)
    loader = DataLoader(crops, pipeline.batch, num_workers=pipeline.workers)
    return iter(loader), _crop_error(crops)


def _monai(kind: str) -> Callable[[Pipeline, Path], tuple[Iterator[Any], float]]:
    def build(pipeline: Pipeline, folder: Path) -> tuple[Iterator[Any], float]:
        import monai.transforms as mt
        from monai import data
        from torch.utils.data import RandomSampler

        from medspark.data.windows import Intensity

        wide = Intensity.named("wide")
        transform = mt.Compose(
            [
                mt.LoadImaged("image", reader="NumpyReader"),
                mt.EnsureChannelFirstd("image", channel_dim="no_channel"),
                mt.ScaleIntensityRanged("image", -1000, 1000, 0, 1, clip=True),
                mt.NormalizeIntensityd("image", subtrahend=wide.mean, divisor=wide.std),
                mt.RandSpatialCropd("image", (pipeline.size,) * 3, random_size=False),
                *(mt.RandFlipd("image", prob=0.5, spatial_axis=axis) for axis in range(3)),
            ]
        )
        files = [{"image": str(path)} for path in sorted((folder / "npy").glob("*.npy"))]
        if kind != "persistent":
            dataset: Any = data.CacheDataset(
                files, transform, num_workers=0, progress=False, copy_cache=kind == "cache"
            )
        else:
            dataset = data.PersistentDataset(files, transform, folder / "persistent")
        sampler = RandomSampler(dataset, replacement=True, num_samples=ENDLESS)
        loader = data.DataLoader(
            dataset, batch_size=pipeline.batch, sampler=sampler, num_workers=pipeline.workers
        )
        fixed = mt.Compose(transform.transforms[:4])(files[0])["image"]
        error = np.abs(np.asarray(fixed)[0] - _normalised(np.load(files[0]["image"]))).max()
        return (batch["image"] for batch in loader), float(error)

    return build


BUILDERS: dict[str, Callable[[Pipeline, Path], tuple[Iterator[Any], float]]] = {
    "medspark loader, finish on device": _loader("cuda" if torch.cuda.is_available() else "meta"),
    "medspark loader, finish on CPU": _loader("cpu"),
    "medspark dataset in a DataLoader": _dataset,
    "MONAI CacheDataset": _monai("cache"),
    "MONAI CacheDataset, no copies": _monai("cache as it is"),
    "MONAI PersistentDataset": _monai("persistent"),
}


def serve(connection: Connection, pipeline: Pipeline, folder: Path) -> None:
    """Build a pipeline, then answer: a number is how many patches to measure, None ends.

    The first answer is about the pipeline; one with a "reason" is the last.
    """
    try:
        torch.set_num_threads(1)
        _import(pipeline.name)
        before = memory_mb()
        batches, error = BUILDERS[pipeline.name](pipeline, folder)
        first = next(batches)
        shape = tuple(getattr(first, "volume", first).shape)
        assert shape == (pipeline.batch, 1, *(pipeline.size,) * 3), shape
        for _ in range(3 + 3 * pipeline.workers):  # until memory has been touched once
            next(batches)
        connection.send({"max_error": error, "ram_mb": memory_mb(), "imports_mb": before})
        while (patches := connection.recv()) is not None:
            connection.send(_measure(batches, -(-patches // pipeline.batch), pipeline.batch))
        del batches  # ends its loaders in order
    except Exception as error:  # a row with status "error" says what happened
        connection.send({"reason": f"{type(error).__name__}: {error}".splitlines()[0]})


def _import(name: str) -> None:
    """Load the libraries, so that what they take is not counted as the pipeline's memory."""
    if name.startswith("MONAI"):
        import monai.data
        import monai.transforms  # noqa: F401
    else:
        import blosc2  # noqa: F401

        import medspark.data.loader  # noqa: F401


def _measure(batches: Iterator[Any], count: int, size: int) -> dict[str, float]:
    before, start = counters(), time.perf_counter()
    for _ in itertools.islice(batches, count):
        pass
    wall, after = time.perf_counter() - start, counters()
    patches = count * size
    return {
        "cpu_ms": (after["cpu"] - before["cpu"]) / patches * 1e3,
        "wall_ms": wall / patches * 1e3,
        "mb_read": (after["bytes"] - before["bytes"]) / patches / 1e6,
        "mb_disk": (after["disk"] - before["disk"]) / patches / 1e6,
    }
