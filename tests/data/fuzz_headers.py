"""Mutated headers: every one must end as a volume or as a clear refusal.

Run at length with `python tests/data/fuzz_headers.py --cases 100000 --workers 2`; a small share runs
in the test suite. Each case is made from its number alone, so any can be repeated with --first N
--cases 1. Cases are read in worker processes of 2 GiB address space and 20 s a case: a crash, a hang
or a huge allocation is told with its number.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from medspark.data.headers import UnreadableVolume
from medspark.data.io import read_volume
from medspark.data.sources import find_sources
from medspark.data.workers import Failure, run_isolated

MEMORY, SECONDS = 2 << 30, 20.0
_EXTREME = [0, 1, -1, 2, 7, 127, 128, 255, 256, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1,
            2**63 - 1, 2**64 - 1]  # fmt: skip
_WORDS = [b"0", b"-1", b"1e999", b"nan", b"inf", b"99999999999999999999", b"65536", b"2147483648",
          b"../../x", b"LIST", b"%d", b"", b"\xff\xfe", b"raw", b"gzip", b"double", b"1 1 1 1 1 1",
          b"data file: x", b"ElementDataFile = x\n", b"\n\n", b"=", b"(1,0,0)", b"none", b"\\"]  # fmt: skip


def write_seeds(folder: Path) -> list[Path]:
    """Sound small files of every format; a case starts from one of them."""
    import SimpleITK as sitk

    folder.mkdir(parents=True)
    hu = np.random.default_rng(0).integers(-1000, 1500, (6, 10, 12)).astype(np.int16)
    paths = []
    for name, array, packed in (
        ("a.nii", hu, False), ("b.nii", hu.astype(np.float32), False), ("c.nii.gz", hu, True),
        ("d.nrrd", hu, False), ("e.nrrd", hu.astype(np.float32), True), ("f.mha", hu, False),
        ("g.mha", hu, True), ("h.mhd", hu, False),
    ):  # fmt: skip
        image = sitk.GetImageFromArray(array)
        image.SetSpacing((1.0, 2.0, 3.0))
        paths.append(folder / name)
        sitk.WriteImage(image, str(paths[-1]), useCompression=packed)
    for name, compressor in (("i.dcm", None), ("j.dcm", "JPEG2000"), ("k.dcm", "JPEG")):
        paths.append(folder / name)
        _write_slice(sitk, paths[-1], hu[:1], compressor)
    # As a script this file is in no package; its neighbours lie beside it.
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from dicom_files import enhanced, plain_slice, rle

    positions = [(0.0, 0.0, 3.0 * z) for z in range(6)]
    stored = (hu + 1024).astype(np.uint16)
    paths.append(enhanced(folder / "l.dcm", stored, positions, [(1, -1024)] * 6))
    syntax = "1.2.840.10008.1.2.5"
    paths.append(plain_slice(folder / "n.dcm", stored[0], 0.0, syntax=syntax))
    data = paths[-1].read_bytes()
    paths[-1].write_bytes(data[: data.index(b"\xe0\x7f\x10\x00")] + rle(stored[0]))
    raw = paths[0].read_bytes()
    second = bytearray(540) + b"\0" * 4 + raw[352:]  # NIfTI-2
    struct.pack_into("<i4s4s2h", second, 0, 540, b"n+2\0", b"\r\n\x1a\n", 4, 16)
    struct.pack_into("<8q", second, 16, 3, 12, 10, 6, 1, 1, 1, 1)
    struct.pack_into("<8d", second, 104, 1, 1, 2, 3, 1, 1, 1, 1)
    struct.pack_into("<q2d", second, 168, 544, 1.0, 0.0)
    paths.append(folder / "m.nii")
    paths[-1].write_bytes(second)
    return paths


def _write_slice(sitk, path: Path, plane: np.ndarray, compressor: str | None) -> None:
    image = sitk.GetImageFromArray(plane)
    for tag, value in {
        "0008|0016": "1.2.840.10008.5.1.4.1.1.2", "0008|0060": "CT", "0010|0020": "someone",
        "0020|000e": "1.2.3", "0020|0032": "0\\0\\0", "0020|0037": "1\\0\\0\\0\\1\\0",
        "0028|1052": "-1024", "0028|1053": "1",
    }.items():  # fmt: skip
        image.SetMetaData(tag, value)
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(path))
    writer.KeepOriginalImageUIDOn()
    if compressor:
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
    writer.Execute(image)


def header_end(data: bytes) -> int:
    """About where the header ends; most mutations fall before."""
    for mark in (b"\n\n", b"ElementDataFile", b"\xe0\x7f\x10\x00"):
        at = data.find(mark)
        if at > 0:
            return min(len(data), at + 160)
    return min(len(data), 600)


def _flip(data: bytearray, end: int, rng: np.random.Generator) -> None:
    data[int(rng.integers(end))] ^= 1 << int(rng.integers(8))


def _byte(data: bytearray, end: int, rng: np.random.Generator) -> None:
    data[int(rng.integers(end))] = int(rng.integers(256))


def _number(data: bytearray, end: int, rng: np.random.Generator) -> None:
    width = int(rng.choice([1, 2, 4, 8]))
    at = int(rng.integers(max(1, end - width)))
    value = _EXTREME[int(rng.integers(len(_EXTREME)))] % (1 << (8 * width))
    order = "little" if rng.random() < 0.8 else "big"
    data[at : at + width] = value.to_bytes(width, order)


def _float(data: bytearray, end: int, rng: np.random.Generator) -> None:
    at = int(rng.integers(max(1, end - 4)))
    value = rng.choice([np.nan, np.inf, -np.inf, 0.0, -1.0, 1e38, 1e-40, 3e9])
    data[at : at + 4] = struct.pack("<f", value)


def _digits(data: bytearray, end: int, rng: np.random.Generator) -> None:
    """Replace one run of digits in a text header by a word."""
    runs = list(re.finditer(rb"[-+0-9.e]+", bytes(data[:end])))
    if runs:
        run = runs[int(rng.integers(len(runs)))]
        data[run.start() : run.end()] = _WORDS[int(rng.integers(len(_WORDS)))]


def _insert(data: bytearray, end: int, rng: np.random.Generator) -> None:
    at = int(rng.integers(end))
    data[at:at] = _WORDS[int(rng.integers(len(_WORDS)))]


def _delete(data: bytearray, end: int, rng: np.random.Generator) -> None:
    at = int(rng.integers(end))
    del data[at : at + int(rng.integers(1, 40))]


def _copy(data: bytearray, end: int, rng: np.random.Generator) -> None:
    start, length, at = int(rng.integers(end)), int(rng.integers(1, 80)), int(rng.integers(end))
    data[at:at] = data[start : start + length]


def _cut(data: bytearray, end: int, rng: np.random.Generator) -> None:
    del data[int(rng.integers(len(data) if rng.random() < 0.5 else end)) :]


_MUTATIONS: list[Callable[[bytearray, int, np.random.Generator], None]] = [
    _flip, _byte, _number, _number, _float, _digits, _digits, _insert, _delete, _copy, _cut,
]  # fmt: skip


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four mutations, of the unpacked bytes where the file is gzip."""
    zipped = data[:2] == b"\x1f\x8b" and rng.random() < 0.8
    changed = bytearray(gzip.decompress(data) if zipped else data)
    for _ in range(int(rng.integers(1, 5))):
        end = header_end(changed) if rng.random() < 0.9 else len(changed)
        if len(changed) > 8:
            _MUTATIONS[int(rng.integers(len(_MUTATIONS)))](changed, max(4, end), rng)
    return gzip.compress(bytes(changed), 1, mtime=0) if zipped else bytes(changed)


def read_case(job: tuple[str, int]) -> str:
    """Read one mutated file; how it ended, in one word or a reason."""
    folder, number = Path(job[0]), job[1]
    rng = np.random.default_rng([2024, number])
    seeds = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix != ".raw")
    seed = seeds[int(rng.integers(len(seeds)))]
    work = folder / f"work-{os.getpid()}"
    work.mkdir(exist_ok=True)
    path = work / seed.name
    path.write_bytes(mutate(seed.read_bytes(), rng))
    raw = seed.with_suffix(".raw")
    if seed.suffix == ".mhd":
        (work / raw.name).write_bytes(raw.read_bytes())
    try:
        found = find_sources(work)
        if any(s.status == "ok" for s in found):
            volume = read_volume(path, min_slices=1)
            assert volume.hu.dtype == np.int16 and volume.hu.size <= 1 << 24
            return f"{seed.suffix}: read"
        return f"{seed.suffix}: refused"
    except UnreadableVolume as error:
        if str(folder) in error.reason or "\n" in error.reason or len(error.reason) > 400:
            raise AssertionError(f"bad reason {error.reason!r}") from error
        return f"{seed.suffix}: refused"
    finally:
        for file in work.iterdir():
            file.unlink()


def run(first: int, cases: int, workers: int) -> tuple[Counter[str], list[str]]:
    """How the cases ended, and those that ended wrongly."""
    ended: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        seeds = Path(folder, "seeds")
        write_seeds(seeds)
        jobs = [(str(seeds), number) for number in range(first, first + cases)]
        results = run_isolated(read_case, jobs, workers=workers, timeout=SECONDS, memory=MEMORY)
        for (_, number), result in zip(jobs, results, strict=True):
            if isinstance(result, Failure):
                wrong.append(f"case {number}: {result.reason}")
                print(wrong[-1], flush=True)
            else:
                ended[result] += 1
            if (done := number + 1 - first) % 10_000 == 0:
                print(f"... {done} cases, {len(wrong)} wrong", flush=True)
    return ended, wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args(arguments)
    start = time.monotonic()
    ended, wrong = run(options.first, options.cases, options.workers)
    for how, count in sorted(ended.items()):
        print(f"{how}: {count}")
    print(f"{options.cases} cases, {len(wrong)} wrong, {time.monotonic() - start:.0f} s")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
