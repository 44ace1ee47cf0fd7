"""The report of `medspark demo`: a table, a page of text, one picture."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from medspark.cli.finetune import mean_sd, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# "<mode>, <start>" -> seed -> split -> metric -> value
Runs = dict[str, dict[int, dict[str, dict[str, float]]]]

# Below this part of a constant guess's loss the pre-training has learned something.
_LEARNED = 0.95


@dataclass(frozen=True)
class Demo:
    """What the demo found.

    Attributes:
        synthetic: whether the pre-training saw synthetic scans.
        steps: of the pre-training.
        loss: of the network on validation crops, at the end.
        constant: of a constant guess on the same masks.
        runs: metrics of the fine-tuning.
        seconds: from start to end.
    """

    synthetic: bool
    steps: int
    loss: float
    constant: float
    runs: Runs
    seconds: float


def write_report(demo: Demo, panel: Path, out: Path) -> str:
    """Writes `summary.md` and `overview.png` to `out`; returns what to print."""
    curves = read_curves(out / "pretrain" / "csv")
    draw_overview(demo, curves, panel, out / "overview.png")
    rows = table(demo.runs)
    text = summary(demo, rows)
    partial = out / f".summary.md.{os.getpid()}"
    partial.write_text(text)
    os.replace(partial, out / "summary.md")
    part = demo.loss / demo.constant
    return (
        f"\nmasked loss on unseen patients: {demo.loss:.3f}, {part:.0%} of a constant guess\n\n"
        f"{rows}\n\n{_caveat(demo)}\n\n"
        f"{demo.seconds:.0f} s in all. Look at {out / 'overview.png'}, read {out / 'summary.md'}."
    )


def table(runs: Runs) -> str:
    """Test AUC of each mode, start and seed, as text."""
    seeds = list(next(iter(runs.values())))
    head = f"{'test AUC':<22}" + "".join(f"{f'seed {s}':>10}" for s in seeds)
    lines = [head + f"{'mean':>10}{'SD':>10}"]
    for name, by_seed in runs.items():
        values = [metrics["test"]["auc"] for metrics in by_seed.values()]
        lines.append(f"{name:<22}" + "".join(number(v, 10) for v in [*values, *mean_sd(values)]))
    return "\n".join(lines)


def _caveat(demo: Demo) -> str:
    n = int(next(iter(next(iter(demo.runs.values())).values()))["test"]["n"])
    scans = "synthetic scans" if demo.synthetic else "your scans"
    learned = demo.loss < _LEARNED * demo.constant
    finding = "it learns to fill in hidden cells" if learned else "it was too short to learn from"
    return (
        f"What this means: the chain runs, and {finding}. It says nothing about patients: "
        f"{demo.steps} steps of a tiny network on {scans}, and a toy task of {n} synthetic test "
        "patches (lesion or not), too few to rank the rows."
    )


def summary(demo: Demo, rows: str) -> str:
    """The text of `summary.md`."""
    source = "synthetic CTs" if demo.synthetic else "the CTs of your folder"
    return f"""# medspark demo

Pre-training: {demo.steps} steps of masked modelling on {source}. On patients that were
not trained on, the loss is {demo.loss:.3f}; a constant guess on the same masks has
{demo.constant:.3f}.

Fine-tuning: is there a lesion in a synthetic 48 mm cube? The same network from the pre-trained
weights and from scratch; "full" trains all of it, "linear" only a linear classifier on its frozen
features (random ones from scratch). Each run was tested once:

```
{rows}
```

{_caveat(demo)}

* `overview.png`: reconstruction, loss, AUC
* `panel.png`: the reconstruction in full size. Left to right: input, what the network saw, what
  it filled in (mean and contrast of a hidden cell are given, as in SparK's pictures), error
* `pretrain/checkpoints/best.ckpt`: for `medspark export`, `finetune` and `reconstruct`
* `finetune/*/predictions.csv`: every prediction
* `config.yaml`: every setting

Took {demo.seconds:.0f} s.
"""


def read_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Losses by step, from the CSV files that the pre-training logged."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(folder.glob("*/metrics.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name in ("train/loss", "val/loss", "val/constant"):
                    if row.get(name):
                        curves.setdefault(name, []).append((int(row["step"]), float(row[name])))
    return curves


def draw_overview(
    demo: Demo, curves: Mapping[str, list[tuple[int, float]]], panel: Path, target: Path
) -> None:
    """One picture: the panel, the loss, the test AUC."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    figure = Figure(figsize=(15, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[2.1, 1])
    picture = figure.add_subplot(grid[:, 0])
    picture.imshow(imread(panel))
    picture.axis("off")
    _draw_losses(figure.add_subplot(grid[0, 1]), curves)
    _draw_aucs(figure.add_subplot(grid[1, 1]), demo.runs)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    figure.savefig(partial, format="png", dpi=110)
    os.replace(partial, target)


def _draw_losses(axes: Axes, curves: Mapping[str, list[tuple[int, float]]]) -> None:
    styles = {"train/loss": ("0.6", "-"), "val/loss": ("C0", "o-"), "val/constant": ("k", "--")}
    names = ("training", "unseen patients", "constant guess")
    for (key, (colour, style)), name in zip(styles.items(), names, strict=True):
        if key in curves:
            axes.plot(*zip(*curves[key], strict=True), style, color=colour, label=name, ms=4)
    axes.set_title("pre-training: loss on hidden cells")
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    axes.legend()


def _draw_aucs(axes: Axes, runs: Runs) -> None:
    for place, by_seed in enumerate(runs.values()):
        values = [metrics["test"]["auc"] for metrics in by_seed.values()]
        axes.bar(place, mean_sd(values)[0], color=("C0", "0.7")[place % 2], width=0.6)
        axes.plot([place] * len(values), values, "k.", ms=9)
    axes.axhline(0.5, color="k", ls=":", lw=1)
    axes.set_xticks(range(len(runs)), [name.replace(", ", "\n") for name in runs])
    axes.set_ylim(0, 1)
    axes.set_ylabel("test AUC")
    axes.set_title("fine-tuning on synthetic lesions (dots: seeds)")
