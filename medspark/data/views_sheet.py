"""A contact sheet of views: what a network is asked to call the same."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from medspark.data.views import ViewDataset
from medspark.data.views_draw import Shot
from medspark.data.windows import Intensity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
_BARS_MM = (1, 2, 5, 10, 20, 50, 100, 200)
_COLUMN, _ROW, _HEAD = 1.75, 2.3, 0.6  # inches
_GREEN = "#4fd17a"  # no grey value is mistaken for it


def view_sheet(
    views: ViewDataset, samples: Sequence[int] | Iterable[int], title: str = ""
) -> Figure:
    """Rows are samples; the plain crop, then its views, each a middle axial slice in its window.

    Front at the top and the patient's right on the left, unless a view is mirrored. Views have the
    same printed size; the bar in each has the length written beside it.

    Args:
        views: The samples.
        samples: Their numbers; an iterable may show progress.
        title: Line on top.
    """
    from matplotlib.figure import Figure

    numbers, rows = [], []
    for index in samples:
        sample = views.sample(index)
        shown = [views.view(sample, number) for number in range(views.policy.n_views)]
        numbers.append((index, sample))
        rows.append((views.crops[index], shown))
    columns = 1 + views.policy.n_views
    figure = Figure(figsize=(_COLUMN * columns, _ROW * len(rows) + _HEAD), facecolor="white")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (index, sample), (crop, shown) in zip(axes, numbers, rows, strict=True):
        intensity, record = views.crops.intensity, sample.record
        _picture(line[0], crop, record.spacing, intensity)
        _caption(line[0], _plain_words(index, record.id, views))
        for axis, shot, view in zip(line[1:], sample.shots, shown, strict=True):
            _picture(axis, view, shot.pitch.tolist(), intensity)
            _caption(axis, describe(shot, sample.centre, local=shot.view >= views.policy.n_global))
    height = figure.get_figheight()
    wrapped = "\n".join(textwrap.wrap(title, 21 * columns))
    figure.suptitle(wrapped, fontsize=7, y=1 - 0.1 / height)
    figure.subplots_adjust(0.01, 0.55 / height, 0.99, 1 - _HEAD / height, 0.06, 0.45)
    return figure


def save_sheet(figure: Figure, path: Path | str) -> Path:
    """Write a sheet as PNG under a temporary name in the same folder, then rename it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=DPI)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def describe(shot: Shot, centre: Sequence[float], *, local: bool = False) -> str:
    """What was done to a view, in a few short lines.

    Args:
        shot: The view.
        centre: mm (z, y, x) of the plain crop's centre.
        local: Whether it is a small view.
    """
    low, high = shot.window
    edge = max(shot.edges)
    first = (
        f"{'small' if local else 'large'} {edge:.0f} mm, W{high - low:.0f} L{(low + high) / 2:.0f}"
    )
    angles = "/".join(f"{round(a):d}" for a in shot.angles)
    mirrored = "".join(name for name, on in zip("zyx", shot.flips, strict=True) if on)
    moved = "/".join(f"{a - b:+.0f}" for a, b in zip(shot.centre, centre, strict=True))
    second = f"moved {moved} mm, turned {angles}°" + (f", mirror {mirrored}" if mirrored else "")
    third = f"HU+ x{shot.contrast:.2f} {shot.brightness:+.0f}" + (
        f", noise {shot.noise:.0f}" if shot.noise else ""
    )
    extras = [
        f"slices {shot.thickness:.1f} mm" if shot.thickness else "",
        f"blur {shot.blur:.1f} mm" if shot.blur else "",
        f"{len(shot.cutouts)} cut out" if shot.cutouts else "",
    ]
    return "\n".join([first, second, third, ", ".join(filter(None, extras))])


def _plain_words(index: int, name: str, views: ViewDataset) -> str:
    window = views.crops.intensity.window
    return f"sample {index}\nvolume {name[:12]}\nW{window.width:.0f} L{window.level:.0f}\n"


def _picture(axis: Axes, volume: Tensor, mm: Sequence[float], intensity: Intensity) -> None:
    """The middle slice of `[1, D, H, W]` or `[1, H, W]` with a scale bar."""
    values = volume[0].numpy()
    plane = values[len(values) // 2] if values.ndim == 3 else values
    grey = np.clip(plane * intensity.std + intensity.mean, 0, 1)
    axis.imshow(grey, cmap="gray", vmin=0, vmax=1, aspect=mm[1] / mm[2], interpolation="nearest")
    axis.set_axis_off()
    height, width = plane.shape
    bar = max([b for b in _BARS_MM if b <= 0.4 * width * mm[2]], default=_BARS_MM[0])
    left, y = 0.05 * width - 0.5, 0.94 * height - 0.5
    axis.plot([left, left + bar / mm[2]], [y, y], color=_GREEN, linewidth=1.5)
    axis.text(left, y - 0.03 * height, f"{bar} mm", color=_GREEN, fontsize=6, weight="bold")


def _caption(axis: Axes, text: str) -> None:
    place = {"ha": "left", "va": "top", "fontsize": 5, "linespacing": 1.15}
    axis.text(0.0, -0.02, text, transform=axis.transAxes, **place)  # type: ignore[arg-type]
