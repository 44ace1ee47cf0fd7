"""ROC, reliability and confusion pictures of one split, readable without colour."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_roc

from medspark.finetune.metrics import (
    ReliabilityBins,
    check_predictions,
    classification_metrics,
    reliability_bins,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
# Okabe and Ito's colours, told apart with any colour vision, without their yellow, too pale for a
# line. Seven colours and markers against four dashes: 28 curves differ without any colour.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", "-.", ":")
_NAME_WIDTH, _NAME_LINES = 26, 3


def write_pictures(
    folder: str | os.PathLike[str],
    probabilities: Tensor,
    labels: Tensor,
    class_names: Sequence[str],
) -> list[Path]:
    """Writes `roc.png`, `reliability.png` and `confusion.png` and returns their paths.

    What cannot be drawn (no curve where one class is present, no sample at all) is said in the
    picture.

    Args:
        folder: made if it does not exist.
        probabilities: float [N, n_classes], each row sums to 1.
        labels: integer [N].
        class_names: one for each class.

    Raises:
        ValueError: as `classification_metrics`, or names that do not fit the classes.
    """
    figures = {
        "roc.png": roc_figure(probabilities, labels, class_names),
        "reliability.png": reliability_figure(probabilities, labels),
        "confusion.png": confusion_figure(probabilities, labels, class_names),
    }
    return [_write(Path(folder) / name, figure) for name, figure in figures.items()]


def roc_figure(probabilities: Tensor, labels: Tensor, class_names: Sequence[str]) -> Figure:
    """One curve of class 1 for two classes, else one-versus-rest curves of the classes present.

    Args:
        probabilities: float [N, n_classes].
        labels: integer [N].
        class_names: one for each class.

    Raises:
        ValueError: as `write_pictures`.
    """
    from matplotlib.figure import Figure

    scores, truth = check_predictions(probabilities, labels)
    names = _clean_names(class_names, scores.shape[1])
    counts = torch.bincount(truth, minlength=len(names)).tolist()
    present = [c for c, count in enumerate(counts) if count]
    drawn = [] if len(present) < 2 else [1] if len(names) == 2 else present
    figure = Figure()
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="0.45", lw=1.0, dashes=(1, 2), label="chance")
    for i, c in enumerate(drawn):
        false, true, auc = _curve(scores[:, c], truth == c)
        label = f"AUC {auc:.3f}"
        if len(drawn) > 1:
            label += f", n = {counts[c]}\n{wrap_name(names[c])}"
        axis.plot(false, true, label=label, **_curve_style(i, len(drawn)))
    _frame_roc(axis, _roc_title(scores, truth, names), len(drawn))
    if not drawn:
        _note(axis, _why_no_curve(present, names))
    absent = [name for name, count in zip(names, counts, strict=True) if not count]
    _arrange(figure, axis, len(drawn), absent if drawn else [])
    return figure


def reliability_figure(probabilities: Tensor, labels: Tensor) -> Figure:
    """Accuracy against top probability in the bins of the ECE, and how many samples each holds.

    Args:
        probabilities: float [N, n_classes].
        labels: integer [N].

    Raises:
        ValueError: as `classification_metrics`.
    """
    from matplotlib.figure import Figure

    bins = reliability_bins(probabilities, labels)
    n, n_bins = int(bins.counts.sum()), len(bins.counts)
    figure = Figure(figsize=(6.2, 7.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _draw_accuracy(upper, bins)
    _draw_counts(lower, bins)
    upper.set_title(
        f"Reliability: ECE {_number(bins.ece)}\nn = {n}, {n_bins} bins of width {1 / n_bins:.3f}",
        fontsize=11,
    )
    # Outside: inside, any corner can hold a bar.
    figure.legend(
        *upper.get_legend_handles_labels(), loc="outside lower center", fontsize=8, ncols=3
    )
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
    if not n:
        _note(upper, "no sample")
    return figure


def confusion_figure(probabilities: Tensor, labels: Tensor, class_names: Sequence[str]) -> Figure:
    """Counts of true against predicted class, coloured by their share of the true class.

    A class without a sample has a hatched row: it has no shares.

    Args:
        probabilities: float [N, n_classes].
        labels: integer [N].
        class_names: one for each class.

    Raises:
        ValueError: as `write_pictures`.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    scores, truth = check_predictions(probabilities, labels)
    names = _clean_names(class_names, scores.shape[1])
    counts = confusion_counts(scores, truth)
    totals = counts.sum(axis=1)
    share = counts / np.where(totals, totals, np.nan)[:, None]
    cell = max(0.42, min(1.1, 5.0 / len(names)))  # inches
    side = cell * len(names)
    figure = Figure(figsize=(side + 3.6, side + 3.0), layout="constrained")
    axis = figure.subplots()
    axis.patch.set(facecolor="white", hatch="///", edgecolor="0.7")
    blues = colormaps["Blues"].with_extremes(bad=(1, 1, 1, 0))
    picture = axis.imshow(share, cmap=blues, vmin=0, vmax=1, interpolation="nearest")
    _write_cells(axis, counts, share, percent=cell > 0.8)
    _write_classes(axis, names, totals.tolist(), roomy=cell > 0.8)
    metrics = classification_metrics(scores, truth)
    axis.set_title(
        f"Confusion, n = {len(truth)}\nbalanced accuracy "
        f"{_number(metrics['balanced_accuracy'])}, macro F1 {_number(metrics['macro_f1'])}",
        fontsize=11,
    )
    figure.colorbar(picture, ax=axis, label="share of the true class", shrink=0.8)
    return figure


def confusion_counts(probabilities: Tensor, labels: Tensor) -> np.ndarray:
    """Samples of true class i that were predicted as j, [n_classes, n_classes]."""
    n_classes = probabilities.shape[1]
    pairs = labels * n_classes + probabilities.argmax(dim=1)
    counts: np.ndarray = torch.bincount(pairs, minlength=n_classes**2).numpy()
    return counts.reshape(n_classes, n_classes)


def _curve(scores: Tensor, positive: Tensor) -> tuple[np.ndarray, np.ndarray, float]:
    false, true, _ = binary_roc(scores, positive.long())
    area = float(torch.trapezoid(true.double(), false.double()))
    return false.numpy(), true.numpy(), area


def _curve_style(i: int, total: int) -> dict[str, Any]:
    style: dict[str, Any] = {"color": _COLOURS[i % len(_COLOURS)], "lw": 1.6 if total < 11 else 1.2}
    if total > 1:
        # Markers are spaced along the curve and shifted from one to the next, to keep apart.
        style |= {"ls": _DASHES[i % len(_DASHES)], "marker": _MARKERS[i % len(_MARKERS)]}
        style |= {"markevery": (0.02 * (i % len(_MARKERS)), 0.16), "ms": 5}
    return style | {"clip_on": False, "zorder": 3}


def _roc_title(scores: Tensor, truth: Tensor, names: Sequence[str]) -> str:
    n = len(truth)
    if len(names) == 2:
        positive = int((truth == 1).sum())
        return f"ROC of {wrap_name(names[1], 40, 2)}\n{positive} of {n} samples are positive"
    metrics = classification_metrics(scores, truth)
    classes = f"{int(metrics['classes_present'])} of {len(names)} classes"
    return (
        f"ROC, each class against the rest\nmean AUC {_number(metrics['auc'])}, {classes}, n = {n}"
    )


def _frame_roc(axis: Axes, title: str, curves: int) -> None:
    axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axis.set_xlabel("false positive rate (1 - specificity)")
    axis.set_ylabel("true positive rate (sensitivity)")
    axis.set_title(title, fontsize=11)
    axis.grid(alpha=0.3)
    if curves < 2:
        axis.legend(loc="lower right", fontsize=9)


def _arrange(figure: Figure, axis: Axes, curves: int, absent: Sequence[str]) -> None:
    """Axes of a fixed size; the figure grows by what the legend and the absent classes need.

    In inches: matplotlib's own layouts cut labels of axes of equal aspect beside a long legend.
    """
    side, left, below, above = 4.8, 0.8, 0.6, 0.75
    width, height = left + side + 0.3, below + side + above
    if curves > 1:
        w, h = _side_legend(figure, axis, columns=1 if curves < 11 else 2)
        width, height = width + w, max(height, h + 0.2)
    if absent:
        text = wrap_name(f"No sample, so no curve: {', '.join(absent)}", 80, 6)
        lines = 0.17 * (text.count("\n") + 1)
        below, height = below + lines, height + lines
        figure.text(0.15 / width, 0.1 / height, text, fontsize=8, va="bottom")
    figure.set_size_inches(width, height)
    spare = height - below - side - above  # where the legend is the taller one
    axis.set_position((left / width, (below + spare / 2) / height, side / width, side / height))


def _side_legend(figure: Figure, axis: Axes, columns: int) -> tuple[float, float]:
    """Puts the legend at the right edge of the figure and returns its size in inches."""
    legend = figure.legend(
        *axis.get_legend_handles_labels(),
        loc="center right",
        fontsize=8 if columns == 1 else 7,
        ncols=columns,
        handlelength=4,
    )
    figure.draw_without_rendering()
    box = legend.get_window_extent()
    return box.width / figure.dpi, box.height / figure.dpi


def _why_no_curve(present: Sequence[int], names: Sequence[str]) -> str:
    if not present:
        return "no sample"
    return f"No curve, AUC undefined:\nevery sample is\n{wrap_name(names[present[0]])}"


def _note(axis: Axes, text: str) -> None:
    box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "black"}
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", bbox=box)


def _draw_accuracy(axis: Axes, bins: ReliabilityBins) -> None:
    axis.bar(bins.edges[:-1], bins.accuracy, color="#9ecae1", label="accuracy", **_bars(bins))
    axis.plot([0, 1], [0, 1], color="black", lw=1.2, ls="--", label="perfectly calibrated")
    axis.vlines(bins.confidence, bins.accuracy, bins.confidence, color="#D55E00", lw=2.0)
    style: dict[str, Any] = {"color": "#D55E00", "mec": "black", "ms": 6}
    label = "at mean probability; line: gap"
    axis.plot(bins.confidence, bins.accuracy, "o", label=label, **style)
    axis.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="share of right predictions")


def _draw_counts(axis: Axes, bins: ReliabilityBins) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.bar(bins.edges[:-1], bins.counts, color="0.75", **_bars(bins))
    above: dict[str, Any] = {"xytext": (0, 2), "textcoords": "offset points"}
    for left, right, count in zip(bins.edges[:-1], bins.edges[1:], bins.counts, strict=True):
        if count:
            place = ((left + right) / 2, count)
            axis.annotate(f"{count}", place, ha="center", fontsize=8, **above)
    axis.set(xlabel="probability of the predicted class", ylabel="samples")
    axis.set_ylim(0, max(1, int(bins.counts.max())) * 1.25)
    axis.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))


def _bars(bins: ReliabilityBins) -> dict[str, Any]:
    width = 1 / len(bins.counts)
    return {"width": width, "align": "edge", "edgecolor": "black", "linewidth": 0.8}


def _write_cells(axis: Axes, counts: np.ndarray, share: np.ndarray, *, percent: bool) -> None:
    for (row, column), count in np.ndenumerate(counts):
        part = share[row, column]
        text = f"{count}\n{part:.0%}" if percent and not math.isnan(part) else f"{count}"
        colour = "0.55" if not count else "white" if part > 0.55 else "black"
        style: dict[str, Any] = {"fontsize": 9 if percent else 7, "color": colour}
        if not math.isnan(part):
            axis.text(column, row, text, ha="center", va="center", **style)


def _write_classes(axis: Axes, names: list[str], totals: list[int], *, roomy: bool) -> None:
    width, lines = (_NAME_WIDTH, _NAME_LINES) if roomy else (44, 1)
    shown = [wrap_name(name, width, lines) for name in names]
    between = "\n" if roomy else " "
    rows = [f"{name}{between}(n = {n})" for name, n in zip(shown, totals, strict=True)]
    size = 9 if roomy else 8
    axis.set_yticks(range(len(names)), rows, fontsize=size)
    axis.set_xticks(range(len(names)), shown, fontsize=size, rotation=0 if _fits(shown) else 90)
    axis.set(xlabel="predicted class", ylabel="true class")


def _fits(shown: Sequence[str]) -> bool:
    """Whether names can stand upright side by side, in cells of about an inch."""
    longest = max(len(line) for name in shown for line in name.split("\n"))
    return longest <= (16 if len(shown) <= 4 else 11 if len(shown) <= 5 else 3)


def _clean_names(class_names: Sequence[str], n_classes: int) -> list[str]:
    if len(class_names) != n_classes:
        raise ValueError(f"{len(class_names)} class names for {n_classes} classes")
    return [" ".join(str(name).split()) for name in class_names]


def wrap_name(name: str, width: int = _NAME_WIDTH, lines: int = _NAME_LINES) -> str:
    """Text for a picture, broken after blanks, `_`, `-` and `/` and, where it must be, anywhere.

    What does not fit ends with an ellipsis. Dollar signs are escaped, for they start formulas.
    """
    filled = [""]
    for word in re.findall(r"[^ _/-]*[ _/-]?", name):
        if filled[-1] and len(filled[-1]) + len(word.rstrip()) > width:
            filled.append("")
        filled[-1] += word
        while len(filled[-1].rstrip()) > width:
            filled[-1:] = [filled[-1][:width], filled[-1][width:]]
    if len(filled) > lines:
        filled[lines - 1 :] = [f"{filled[lines - 1][: width - 1].rstrip()}…"]
    return "\n".join(line.rstrip() for line in filled).replace("$", r"\$")


def _number(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.3f}"


def _write(path: Path, figure: Figure) -> Path:
    """Writes a PNG under a temporary name in the same folder, then gives it its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=DPI)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
