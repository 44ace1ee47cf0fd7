"""A trained classifier on a folder of scans: a row for each, and one for each window."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medspark.data.pseudonyms import Pseudonyms
from medspark.data.sources import read_patients
from medspark.data.store import write_atomically
from medspark.data.windows import Intensity
from medspark.finetune.classifier import Classifier, load_classifier
from medspark.finetune.scans import Reading, Scan, list_scans, read_scans

_SPREAD = 1.1  # training patches that differ more in size are worth a word


@dataclass(frozen=True)
class PredictReport:
    """What `predict` did.

    Attributes:
        scans: every source, in the order of the folder.
        probabilities: of each, [windows, n_classes]; no rows where it was not read.
        table: CSV with a row for each scan.
        windows: CSV with a row for each window.
        warnings: what is doubtful about all of it.
    """

    scans: list[Scan]
    probabilities: list[np.ndarray]
    table: Path
    windows: Path
    warnings: list[str]


def predict(
    checkpoint: str | Path,
    source: str | Path,
    out: str | Path,
    *,
    patches: bool = False,
    overlap: float = 0.5,
    min_body: float = 0.1,
    batch_size: int = 16,
    patients_csv: str | Path | None = None,
    salt_file: str | Path | None = None,
    hide_paths: bool = False,
    uneven: bool = False,
    max_gib: float = 4,
    timeout: float | None = 600,
    workers: int = 1,
    accelerator: str = "auto",
    progress: bool = True,
) -> PredictReport:
    """Classifies every scan or patch below a folder.

    A volume whose edges are each 0.8 to 1.25 times those of the training patches is a patch: it is
    resampled as a whole and gets one prediction, the same as in fine-tuning. Any other is resampled
    to the classifier's voxel size and cut into windows as large as a training patch; those with
    enough body are predicted one by one, and the scan gets mean and maximum of each class over
    them. An axis that is shorter than a window is filled up with air.

    Args:
        checkpoint: best.ckpt of `medspark finetune`.
        source: folder, searched with its subfolders as by `medspark prepare`.
        out: CSV to write; the windows go to <out>_windows.csv beside it.
        patches: see `Reading`.
        overlap: see `Reading`.
        min_body: see `Reading`.
        batch_size: windows at once.
        patients_csv: table with the columns file (relative to `source`) and patient; without it a file
            without an id of its own counts as a person.
        salt_file: secret with which patient ids are hashed; that of `prepare` gives its ids.
        hide_paths: hash every part of the paths.
        uneven: see `Reading`.
        max_gib: refuse volumes whose voxels need more memory.
        timeout: seconds for one volume, then it is refused.
        workers: processes that read; 0 reads in this process.
        accelerator: "auto", "cpu" or "gpu".
        progress: show a progress bar.

    Raises:
        FileNotFoundError: no such checkpoint or folder.
        ValueError: the checkpoint is no classifier, or one of images or grey values.
    """
    classifier = load_classifier(checkpoint)
    reading = reading_of(
        classifier.plan,
        patches=patches,
        overlap=overlap,
        min_body=min_body,
        uneven=uneven,
        max_bytes=int(max_gib * 2**30),
    )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    patients = read_patients(Path(patients_csv)) if patients_csv is not None else None
    listed = list_scans(Path(source), Pseudonyms.from_file(salt_file, hide_paths), patients)
    if not listed:
        raise ValueError(f"no CT found in {source}: no DICOM, NIfTI, NRRD, MHA or MHD file")
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    device = _device(accelerator)
    classifier.network.to(device)
    scans, found = [], []
    results = read_scans(listed, reading, workers=workers, timeout=timeout)
    for scan in _progress(results, len(listed), progress):
        scans.append(scan)
        found.append(_predicted(scan, classifier, reading, batch_size, device))
    windows = target.with_name(f"{target.stem}_windows.csv")
    names = classifier.plan["class_names"]
    _write(windows, _window_rows(scans, found, names))
    _write(target, _scan_rows(scans, found, names))
    return PredictReport(scans, found, target, windows, _doubts(classifier.plan))


def reading_of(plan: dict[str, Any], **options: Any) -> Reading:
    """How scans have to be read for a classifier.

    Raises:
        ValueError: it is none of CT volumes.
    """
    if plan["grey"] or plan["dims"] != 3:
        kind = "2D images" if plan["dims"] != 3 else "grey values without a unit"
        raise ValueError(f"this classifier was trained on {kind}; predict reads CT volumes in HU")
    if plan["patch_mm"] is None or len(plan["patch_mm"]) != 3 or len(plan["size"]) != 3:
        raise ValueError("this classifier does not say how large a training patch was")
    if not (min(plan["patch_mm"]) > 0 and min(plan["size"]) > 0 and max(plan["size"]) <= 1024):
        raise ValueError(f"impossible patch: {plan['patch_mm']} mm, {plan['size']} voxels")
    z, y, x = (float(mm) for mm in plan["patch_mm"])
    d, h, w = (int(n) for n in plan["size"])
    return Reading((z, y, x), (d, h, w), **options)


def _doubts(plan: dict[str, Any]) -> list[str]:
    low, high = plan["patch_mm_low"], plan["patch_mm_high"]
    if low is None or high is None or all(b <= _SPREAD * a for a, b in zip(low, high, strict=True)):
        return []
    low, high, edges = (" x ".join(f"{mm:.0f}" for mm in v) for v in (low, high, plan["patch_mm"]))
    return [
        f"the training patches measured {low} to {high} mm; windows have the median, {edges} mm"
    ]


def _device(accelerator: str) -> torch.device:
    if accelerator not in ("auto", "cpu", "gpu"):
        raise ValueError(f"accelerator must be auto, cpu or gpu, not {accelerator!r}")
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("accelerator=gpu, but torch sees no CUDA device")
    cuda = accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def _predicted(
    scan: Scan, classifier: Classifier, reading: Reading, batch_size: int, device: torch.device
) -> np.ndarray:
    if scan.status != "ok":
        return np.zeros((0, len(classifier.plan["class_names"])))
    hu = scan.voxels()
    intensity = Intensity.from_dict(classifier.plan["intensity"])
    parts = []
    for first in range(0, len(scan.starts), batch_size):
        batch = [
            _window(hu, start, reading.size, intensity, whole=scan.whole)
            for start in scan.starts[first : first + batch_size]
        ]
        x = torch.stack(batch)[:, None].to(device)
        parts.append(classifier.probabilities(x).cpu().numpy())
    return np.concatenate(parts).astype(np.float64)


def _window(
    hu: np.ndarray,
    start: Sequence[int],
    size: Sequence[int],
    intensity: Intensity,
    *,
    whole: bool,
) -> Tensor:
    """One input [D, H, W] of the network; a whole volume is resampled as fine-tuning does it."""
    if not whole:
        hu = hu[tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))]
    x = intensity.normalise(torch.from_numpy(np.array(hu)))
    if tuple(x.shape) == tuple(size):
        return x
    resized = torch.nn.functional.interpolate(
        x[None, None], size=tuple(size), mode="trilinear", align_corners=False
    )
    return resized[0, 0]


def _scan_rows(
    scans: Sequence[Scan], found: Sequence[np.ndarray], names: Sequence[str]
) -> Iterator[Sequence[Any]]:
    head = ["id", "source", "patient", "status", "reason", "method", "windows", "predicted"]
    values = [f"{kind}_{name}" for kind in ("mean", "max") for name in names]
    yield [*head, *values, "warnings"]
    for scan, p in zip(scans, found, strict=True):
        told = [scan.id, scan.source, scan.patient, scan.status, scan.reason]
        if scan.status != "ok":
            yield [*told, "", 0, "", *[""] * len(values), "; ".join(scan.warnings)]
            continue
        mean, highest = p.mean(axis=0), p.max(axis=0)
        method = "whole" if scan.whole else "windows"
        numbers = [f"{v:.6g}" for v in (*mean, *highest)]
        best = names[int(mean.argmax())]
        yield [*told, method, len(p), best, *numbers, "; ".join(scan.warnings)]


def _window_rows(
    scans: Sequence[Scan], found: Sequence[np.ndarray], names: Sequence[str]
) -> Iterator[Sequence[Any]]:
    places = ["voxel_z", "voxel_y", "voxel_x", "mm_x", "mm_y", "mm_z"]
    yield ["id", "source", "window", *places, *(f"prob_{name}" for name in names)]
    for scan, p in zip(scans, found, strict=True):
        for number, row in enumerate(p):
            where = [f"{v:.1f}" for v in (*scan.centres[number], *scan.points[number])]
            yield [scan.id, scan.source, number, *where, *(f"{v:.6g}" for v in row)]


def _write(target: Path, rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomically(target, text.getvalue())


def _progress(scans: Iterator[Scan], total: int, show: bool) -> Iterable[Scan]:
    if not show:
        return scans
    from rich.progress import track

    # On stdout: while a volume is read, stderr belongs to the readers and is thrown away.
    return track(scans, total=total, description="predict", transient=False)
