"""`medspark prepare`: CT files into a store."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from medspark.cli.app import output_dir, plain, save_config

if TYPE_CHECKING:
    from medspark.data.ingest import PrepareReport


_SETTINGS = (
    "spacing",
    "body_margin",
    "uneven",
    "patients_csv",
    "salt_file",
    "hide_paths",
    "key_table",
    "exclude_files",
    "accept_files",
    "max_gib",
    "timeout",
    "verify",
    "workers",
    "progress",
)


def run(config: DictConfig) -> None:
    """Reads every CT below `source` into `store` and says what became of the files."""
    from medspark.data.ingest import prepare

    left_out = {str(name) for name in config.exclude_patients}
    held = config.exclude_from
    if held.csv is not None:
        left_out |= patients_of_splits(Path(held.csv), list(held.splits))
    save_config(without_names(config), output_dir())
    settings = {key: plain(config[key]) for key in _SETTINGS}
    report = prepare(config.source, config.store, exclude_patients=sorted(left_out), **settings)
    print(describe(report, Path(config.store)))
    if left_out and not people_left_out(report):
        raise ValueError(
            f"none of the {len(left_out)} patients to leave out was recognised in "
            f"{config.source}, so the store may hold them; run again with patients_csv=TABLE, "
            "which says whose files are whose"
        )


def without_names(config: DictConfig) -> DictConfig:
    """The configuration for the run's folder: how many patients were left out, not who."""
    count = len(config.exclude_patients)
    shown = [f"{count} patients, not written down"] if count else []
    return OmegaConf.merge(config, {"exclude_patients": shown})  # type: ignore[return-value]


def people_left_out(report: PrepareReport) -> int:
    """How many patients were left out by name."""
    named = [r for r in report.rows if r.status == "excluded" and r.reason == "patient excluded"]
    return len({record.patient for record in named})


def describe(report: PrepareReport, store: Path) -> str:
    """What became of the files, as text."""
    people = len({record.patient for record in report.rows if record.status == "ok"})
    lines = [
        f"{store}: {report.ok} volumes of {people} patients, {report.quarantined} refused, "
        f"{report.skipped} left out ({people_left_out(report)} patients by name), "
        f"{report.reused} unchanged and not read again"
    ]
    for record in report.rows:
        if record.status == "quarantined":
            lines.append(f"  refused: {record.source}: {record.reason}")
    return "\n".join(lines)


def patients_of_splits(labels: Path, splits: Sequence[str]) -> set[str]:
    """The patients of some splits of a labelled task.

    Args:
        labels: CSV with the columns `patient` and `split`.
        splits: names of the splits.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column or one of the splits is missing.
    """
    with labels.open(newline="") as file:
        rows = list(csv.DictReader(file))
    missing = {"patient", "split"} - set(rows[0] if rows else ())
    if missing:
        raise ValueError(f"{labels} has no column {' and no column '.join(sorted(missing))}")
    absent = sorted(set(splits) - {row["split"] for row in rows})
    if absent:
        found = ", ".join(sorted({row["split"] for row in rows}))
        raise ValueError(f"{labels} has no split {', '.join(absent)}; it has {found}")
    return {row["patient"] for row in rows if row["split"] in splits}
