"""`medspark predict`: a trained classifier on a folder of scans."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from medspark.cli.app import plain

if TYPE_CHECKING:
    from medspark.finetune.predict import PredictReport


def run(config: DictConfig) -> None:
    """Predicts every scan below `source` and says what became of the files."""
    from medspark.finetune.predict import predict

    options = {str(key): plain(value) for key, value in config.items()}
    print(describe(predict(**options)))


def describe(report: PredictReport) -> str:
    """What became of the files, as text."""
    count = Counter(scan.status for scan in report.scans)
    windows = sum(len(p) for p in report.probabilities)
    lines = [
        f"{count['ok']} scans predicted ({windows} windows), {count['refused']} refused, "
        f"{count['ignored']} without an image",
        *(f"  refused: {s.source}: {s.reason}" for s in report.scans if s.status == "refused"),
        *(f"note: {warning}" for warning in report.warnings),
        f"a row for each scan:   {report.table}",
        f"a row for each window: {report.windows}",
    ]
    return "\n".join(lines)
