"""What a training crop costs: medspark's loader against MONAI's CacheDataset and PersistentDataset.

All read the same volumes and give the same thing: random cubes of CT, windowed to -1000..1000 HU,
standardised and mirrored, float32. medspark also looks for body and draws the mask of each crop.

How to read the table
  per_core   patches per second of processor time, all processes of the pipeline together. With as
             many cores as processes this is what each core brings; other load hardly moves it.
  wall       patches per second that came out here, on this machine, with whatever else ran.
  mb_read    MB per patch that the pipeline asked the system for. A cube of 96 has 1.8 MB as int16,
             3.5 as float32; files are read in whole compressed blocks.
  mb_disk    MB per patch that came from the disk. 0 when warm; "cold" rows drop the files from
             the page cache before each round (posix_fadvise), as on the first pass over an archive.
  ram_mb     memory of the pipeline's processes (proportional set size), libraries included;
  imports_mb what the libraries alone had taken.
  max_error  greatest difference from a float64 computation on the whole volume.

"finish on device" leaves window and flips to the GPU, as in training on one. Without a GPU its device is
torch's "meta": the processor does what it would do beside a GPU, except copying to pinned memory.

MONAI's CacheDataset copies the whole cached volume for each crop unless told not to (copy_cache=False, which
its crops and flips allow): the row "no copies".

Examples
  python benchmarks/bench_data.py                      all, about ten minutes; writes a record
  python benchmarks/bench_data.py --quick              a first look, on phantoms
  python benchmarks/bench_data.py --only MONAI --sizes 96
  python benchmarks/bench_data.py --layouts            also other chunks, blocks, codecs and mmap
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from data_pipelines import BUILDERS, Pipeline, serve
from harness import chosen, parser, print_table, save

GOALS = {96: 300.0, 128: 130.0}  # patches per second and core
BATCH = {96: 8, 128: 4}
MEASURES = ("cpu_ms", "wall_ms", "mb_read", "mb_disk")
REAL = (
    "chest_lidc0314.nii.gz",
    "abdomen_totalseg_example.nii.gz",
    "heart_totalseg_cta_crop.nii.gz",
)
NOISE = 12.0  # HU; resampling smooths the noise away that makes CT hard to compress
COLD_PATCHES = 16


def make_volumes(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Store, .npy files and their sizes: three real CTs at 1 mm if there are any, else phantoms.

    A quick run takes small phantoms: reading and resampling real ones takes a minute.
    """
    from medspark.data.store import Record, Store, write_array

    volumes = _phantoms(160) if quick else _real(folder) or _phantoms(256)
    store = Store.create(folder / "store")
    (folder / "npy").mkdir()
    described, records = [], []
    for index, (name, hu) in enumerate(volumes):
        noise = np.random.default_rng(index).normal(0, NOISE, hu.shape)
        hu = np.clip(np.rint(hu + noise), -1024, 3071).astype(np.int16)
        write_array(store.volume_path(f"v{index}"), hu)
        np.save(folder / "npy" / f"v{index}.npy", hu)
        records.append(
            Record(f"v{index}", name, f"p{index}", size=hu.shape, spacing=(1.0, 1.0, 1.0))
        )
        compressed = store.volume_path(f"v{index}").stat().st_size / hu.nbytes
        described.append({"volume": name, "size": list(hu.shape), "stored_share": compressed})
    store.put(records)
    return described


def _real(folder: Path) -> list[tuple[str, np.ndarray]]:
    from medspark.data.ingest import prepare
    from medspark.data.store import Store

    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    data = Path(os.environ.get("MEDSPARK_DATA") or default) / "ct"
    if not all((data / name).is_file() for name in REAL):
        return []
    (folder / "source").mkdir()
    for name in REAL:
        shutil.copy(data / name, folder / "source")
    prepare(folder / "source", folder / "resampled", spacing=(1.0, 1.0, 1.0), progress=False)
    store = Store(folder / "resampled")
    return [(record.source, store.read(record.id)) for record in store.records]


def _phantoms(edge: int) -> list[tuple[str, np.ndarray]]:
    from medspark.data.phantom import make_phantom

    return [(f"phantom {seed}", make_phantom(seed, (edge,) * 3).hu) for seed in range(3)]


def drop_from_cache(folder: Path) -> None:
    """Make the system forget the volumes, so that the next read comes from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)  # only clean pages are dropped
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


class Child:
    """A pipeline in a process of its own, and the rows that it fills."""

    def __init__(self, pipeline: Pipeline, folder: Path) -> None:
        self.pipeline = pipeline
        context = multiprocessing.get_context("spawn")
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, pipeline, folder))
        self.process.start()
        theirs.close()
        self.about = self._receive()
        self.rounds: dict[str, list[dict[str, float]]] = {"warm": [], "cold": []}

    def _receive(self) -> dict[str, Any]:
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            return {"reason": f"the process ended with code {self.process.exitcode}"}

    def measure(self, cache: str, patches: int) -> None:
        if "reason" in self.about:
            return
        self.connection.send(patches)
        answer = self._receive()
        if "reason" in answer:
            self.about = answer
        else:
            self.rounds[cache].append(answer)

    def end(self) -> list[dict[str, Any]]:
        if "reason" not in self.about:
            self.connection.send(None)
        self.process.join()
        kept = [cache for cache, rounds in self.rounds.items() if rounds or cache == "warm"]
        return [self._row(cache) for cache in kept]

    def _row(self, cache: str) -> dict[str, Any]:
        p, rounds = self.pipeline, self.rounds[cache]
        row: dict[str, Any] = {
            "pipeline": p.name, "workers": p.workers, "size": p.size, "batch": p.batch,
            "cache": cache,
        }  # fmt: skip
        if "reason" in self.about:
            return row | {"status": "error", "reason": self.about["reason"]}
        row |= {key: statistics.median(r[key] for r in rounds) for key in MEASURES}
        row |= {"per_core": 1e3 / row["cpu_ms"], "wall": 1e3 / row["wall_ms"]}
        row |= {"goal": GOALS.get(p.size), "rounds": rounds, **self.about}
        times = [r["cpu_ms"] for r in rounds]
        row["relative_spread"] = (max(times) - min(times)) / row["cpu_ms"]
        return row | {"status": "ok"}


def measure(
    size: int, workers: list[int], folder: Path, rounds: int, patches: int, pipelines: list[str]
) -> list[Any]:
    """Rows of one crop size; pipelines take turns, round by round, the others waiting."""
    batch = BATCH.get(size, 4)
    children = [
        Child(Pipeline(name, count, size, batch), folder) for name in pipelines for count in workers
    ]
    for _ in range(rounds):
        for child in children:
            child.measure("warm", patches)
        for child in children:
            # With loaders of its own a pipeline has read ahead before the cache is dropped, and
            # MONAI's cache is memory.
            if child.pipeline.workers == 0 and "MONAI Cache" not in child.pipeline.name:
                drop_from_cache(folder)
                child.measure("cold", COLD_PATCHES)
    return [row for child in children for row in child.end()]


def measure_layouts(sizes: list[int], folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Reading alone, one thread, warm: chunks, blocks, codecs, filters, file or memory map."""
    import blosc2

    hu = np.load(folder / "npy" / "v0.npy")
    c, f = blosc2.Codec, blosc2.Filter
    layouts: dict[str, Any] = {}
    for codec, level, filters, chunk, block in (
        (c.LZ4HC, 5, [f.BITSHUFFLE], 64, 32), (c.LZ4HC, 5, [f.BITSHUFFLE], 64, 16),
        (c.LZ4HC, 5, [f.BITSHUFFLE], 96, 24), (c.LZ4HC, 5, [f.BITSHUFFLE], 128, 32),
        (c.LZ4HC, 5, [f.BITSHUFFLE], 32, 32), (c.LZ4HC, 5, [f.SHUFFLE], 64, 32),
        (c.LZ4HC, 5, [f.SHUFFLE, f.BYTEDELTA], 64, 32), (c.LZ4, 5, [f.BITSHUFFLE], 64, 32),
        (c.ZSTD, 1, [f.BITSHUFFLE], 64, 32), (c.ZSTD, 5, [f.SHUFFLE], 64, 32),
    ):  # fmt: skip
        name = f"{codec.name} {level} {'+'.join(x.name for x in filters)} {chunk}/{block}"
        path = folder / f"{name.replace(' ', '-').replace('/', '-')}.b2nd"
        blosc2.asarray(
            hu, urlpath=str(path), mode="w", chunks=(chunk,) * 3, blocks=(block,) * 3,
            cparams={"codec": codec, "clevel": level, "filters": filters, "nthreads": 1},
        )  # fmt: skip
        layouts[name] = (path, blosc2.open(str(path), mode="r", dparams={"nthreads": 1}))
    first = next(iter(layouts))
    path = layouts[first][0]
    layouts[f"{first} mmap"] = (path, blosc2.open(str(path), mode="r", mmap_mode="r"))
    layouts[f"{first} 2 threads"] = (
        path, blosc2.open(str(path), mode="r", dparams={"nthreads": 2}),
    )  # fmt: skip
    return [row for size in sizes for row in _time_layouts(layouts, hu, size, rounds)]


def _time_layouts(
    layouts: dict[str, Any], hu: np.ndarray, size: int, rounds: int
) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    out, times = np.empty((size,) * 3, np.int16), {name: [] for name in layouts}
    for _ in range(rounds):
        starts = [[int(rng.integers(0, n - size + 1)) for n in hu.shape] for _ in range(20)]
        for name, (_, array) in layouts.items():
            before = time.process_time()
            for start in starts:
                array.get_slice_numpy(out, (start, [s + size for s in start]))
            times[name].append((time.process_time() - before) / len(starts) * 1e3)
            box = tuple(slice(s, s + size) for s in starts[-1])
            assert np.array_equal(out, hu[box]), name
    return [
        {"layout": name, "size": size, "cpu_ms": statistics.median(times[name]),
         "stored_share": path.stat().st_size / hu.nbytes, "times_ms": times[name], "status": "ok"}
        for name, (path, _) in layouts.items()
    ]  # fmt: skip


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    add = options.add_argument
    add("--sizes", type=int, nargs="+", default=[96, 128], help="edges of the cube")
    add("--workers", type=int, nargs="+", default=[0, 2], help="loader processes")
    add("--rounds", type=int, default=5, help="turns of each pipeline")
    add("--patches", type=int, default=192, help="patches per turn")
    add("--layouts", action="store_true", help="also time layouts of the store")
    add("--folder", type=Path, help="on which disk to put 1.5 GB for a while")
    args = options.parse_args()
    if args.quick:
        args.sizes, args.workers, args.rounds, args.patches = [96], [0], 1, 48
        args.only = args.only or ["medspark loader", "MONAI CacheDataset, no copies"]
    return args


def main() -> None:
    args = arguments()
    pipelines = [name for name in BUILDERS if chosen(name, args.only)]
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        rows: list[dict[str, Any]] = make_volumes(folder, args.quick)
        print_table(rows, ["volume", "size", "stored_share"])
        for size in args.sizes:
            found = measure(size, args.workers, folder, args.rounds, args.patches, pipelines)
            columns = ["pipeline", "workers", "size", "cache", "per_core", "goal", "wall"]
            columns += ["mb_read", "mb_disk", "ram_mb", "imports_mb", "max_error", "status"]
            print_table(found, columns)
            rows += found
        if args.layouts:
            found = measure_layouts(args.sizes, folder, args.rounds)
            print_table(found, ["layout", "size", "cpu_ms", "stored_share", "status"])
            rows += found
    fields = ("pipeline", "workers", "size", "cache", "layout", "volume")
    save(args, "data", rows, identity=fields)


if __name__ == "__main__":
    main()
