"""One page about a run: settings, curves and pictures in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medspark.pretrain.checkpoints import write_whole
from medspark.pretrain.export import load_checkpoint
from medspark.pretrain.schedule import OPTIM_DEFAULTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

History = dict[str, dict[int, float]]

_STYLE = """body{font:15px/1.45 system-ui,sans-serif;color:#222}
body{max-width:1080px;margin:24px auto;padding:0 16px}
h1{font-size:22px}h2{font-size:17px;margin-top:28px}img{max-width:100%}
table{border-collapse:collapse}td,th{padding:2px 14px 2px 0;text-align:left;vertical-align:top}
td:first-child{color:#666}figure{margin:12px 0}figcaption{color:#666}"""


def read_history(out: Path) -> History:
    """Every logged value: name -> step -> value, over all resumed parts of a run.

    A part that was resumed from step s replaces what an earlier one logged from s on.
    """
    history: History = {}
    for path in sorted((out / "csv").glob("from_step_*/metrics.csv")):
        start = int(path.parent.name.removeprefix("from_step_"))
        for values in history.values():
            for step in [s for s in values if s >= start]:
                del values[step]
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        history.setdefault(name, {})[int(row["step"])] = float(value)
    return history


def write_summary(out: Path) -> Path:
    """Writes ``<out>/summary.html`` from the logs, panels and last checkpoint of a run."""
    history = read_history(out)
    content = load_checkpoint(out / "checkpoints" / "last.ckpt")
    panels = sorted((out / "panels").glob("step_*.png"))
    body = [
        "<h1>Pre-training: SparK</h1>",
        _headline(content, history),
        "<h2>Curves</h2>",
        _image(_curves(history), "Curves of the run; steps count optimiser updates."),
        "<h2>Time of a step</h2>",
        _times(history),
        "<h2>Reconstructions of an unseen crop</h2>",
        *(_image(p.read_bytes(), _caption(p)) for p in _chosen(panels)),
        "<h2>Settings</h2>",
        _table(_settings(content)),
    ]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Pre-training summary</title>'
        f"<style>{_STYLE}</style>{''.join(body)}</html>\n"
    )
    return write_whole(out / "summary.html", lambda file: file.write(page.encode()))


def _headline(content: dict[str, Any], history: History) -> str:
    rows = {"optimiser steps": f"{content.get('global_step', 0)}"}
    loss, constant = history.get("val/loss", {}), history.get("val/constant", {})
    if loss:
        best, last = min(loss, key=lambda step: loss[step]), max(loss)
        rows["loss on unseen patients"] = (
            f"{loss[last]:.4f} at the end, best {loss[best]:.4f} after step {best + 1}"
        )
        rows["a constant guess has"] = f"{constant[last]:.4f} on the same masks"
        rows["ratio"] = (
            f"{loss[last] / constant[last]:.3f} (below 1: the network has learnt structure)"
        )
    rows["samples per step"] = f"{content.get('samples_per_step', 'unknown')}"
    return _table(rows)


def _settings(content: dict[str, Any]) -> dict[str, str]:
    found = dict(content.get("hyper_parameters", {}))
    found["optim"] = OPTIM_DEFAULTS | found.get("optim", {})
    rows: dict[str, str] = {}
    for name in ("spec", "optim", "intensity"):
        for key, value in (found.pop(name, None) or {}).items():
            rows[f"{name}.{key}"] = str(value)
    rows |= {key: str(value) for key, value in found.items()}
    plan = content.get("plan", {})
    return rows | {key: str(plan.get(key)) for key in ("medspark_version", "commit")}


def _times(history: History) -> str:
    total = list(history.get("time/step", {}).values())
    if not total:
        return "<p>No step was timed: log_every is larger than the run.</p>"
    # The first timed steps warm up caches and compile kernels: the median does not mind.
    rows = {
        name: f"{_median(list(history[f'time/{name}'].values())) * 1000:.1f} ms"
        for name in ("step", "data", "encoder", "decoder", "optimiser")
    }
    return _table(rows) + "<p>Medians of the logged steps; encoder and decoder with backward.</p>"


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def _curves(history: History) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 5.6), layout="constrained")
    axes = figure.subplots(2, 3)
    _draw(axes[0, 0], history, "loss", ("train/loss", "val/loss", "val/constant"))
    _draw(axes[0, 1], history, "loss / constant guess", ("val/ratio",))
    _draw(axes[0, 2], history, "gradient norm before clipping", ("train/grad_norm",), log=True)
    _draw(axes[1, 0], history, "learning rate", ("train/lr",))
    _draw(axes[1, 1], history, "weight decay", ("train/weight_decay",))
    _times_of_steps(axes[1, 2], history)
    for axis in axes[1]:
        axis.set_xlabel("step")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _draw(
    axis: Axes, history: History, title: str, names: Sequence[str], *, log: bool = False
) -> None:
    axis.set_title(title, fontsize=10)
    for name in names:
        values = history.get(name, {})
        steps = sorted(values)
        few = "o" if len(steps) <= 30 else ""
        axis.plot(steps, [values[s] for s in steps], marker=few, ms=3, lw=1.2, label=name)
    if len(names) > 1:
        axis.legend(fontsize=8)
    if log and any(v > 0 for name in names for v in history.get(name, {}).values()):
        axis.set_yscale("log")
    axis.grid(alpha=0.3)


def _times_of_steps(axis: Axes, history: History) -> None:
    parts = ("data", "encoder", "decoder", "optimiser")
    steps = sorted(history.get("time/step", {}))
    axis.set_title("time of a step / ms", fontsize=10)
    if steps:
        heights = [[history[f"time/{p}"][s] * 1000 for s in steps] for p in parts]
        axis.stackplot(steps, heights, labels=parts, alpha=0.85)
        axis.set_ylim(0, 1.45 * max(map(sum, zip(*heights, strict=True))))  # room for the legend
        axis.legend(fontsize=8, loc="upper right", ncols=2)


def _chosen(panels: Sequence[Path]) -> list[Path]:
    """First, middle and last."""
    places = sorted({0, len(panels) // 2, len(panels) - 1})
    return [panels[i] for i in places] if panels else []


def _caption(panel: Path) -> str:
    return f"After step {int(panel.stem.removeprefix('step_'))}."


def _image(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    text = html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _table(rows: dict[str, str]) -> str:
    lines = (
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in rows.items()
    )
    return f"<table>{''.join(lines)}</table>"
