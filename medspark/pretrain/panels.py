"""Three-plane pictures: input, masked input, reconstruction, error."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
from torch import Tensor

from medspark.pretrain.blind import blind_reconstruction

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HIDDEN = "#2b3f63"  # hidden cells: a blue that no grey value can be taken for
_PLANES = ("axial", "coronal", "sagittal")
_SCALE_BARS_MM = (1, 2, 5, 10, 20, 50, 100, 200)


@dataclass(frozen=True)
class Display:
    """How values are shown: ``value * scale + offset`` in ``unit``, between the ends of ``window``.

    Without a window, the 0.5 and 99.5 percentiles of the input are its ends.
    """

    scale: float = 1.0
    offset: float = 0.0
    window: tuple[float, float] | None = None
    unit: str = "normalised"


def make_panel(
    volume: Tensor,
    reconstruction: Tensor,
    visible: Tensor,
    *,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    display: Display | None = None,
    position: Sequence[int] | None = None,
    title: str = "",
    blind: Tensor | None = None,
) -> Figure:
    """Rows axial, coronal, sagittal; columns input, masked input, reconstruction, absolute error.

    With ``blind`` there are two reconstructions: with mean and SD of the true patches, whose error is
    shown, and without them.

    Slices are shown as in a reading room if z runs to the head, y to the back and x to the
    patient's left: front at the top, head at the top, patient's right on the left.

    Args:
        volume: [D, H, W], input.
        reconstruction: [D, H, W], in the same units.
        visible: bool [Gz, Gy, Gx] or [D, H, W], True = visible.
        spacing: mm per voxel (z, y, x).
        display: units and window.
        position: voxel (z, y, x) that the three planes go through; default the centre of a hidden
            cell close to the middle.
        title: above the picture.
        blind: [D, H, W], reconstruction that knows nothing of hidden voxels.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    from matplotlib.figure import Figure

    show = display or Display()
    image, rebuilt, seen = _arrays(volume, reconstruction, visible, show)
    low, high = show.window or tuple(np.percentile(image, [0.5, 99.5]))
    high = high if high > low else low + 1.0
    error = np.abs(rebuilt - image)
    limit = max(float(np.percentile(error[~seen], 99)) if (~seen).any() else 0.0, (high - low) / 20)
    where = _position(seen) if position is None else tuple(int(p) for p in position)
    columns = [
        ("input", image, "gray", low, high),
        ("visible", np.ma.masked_array(image, ~seen), "gray", low, high),
        ("reconstruction", rebuilt, "gray", low, high),
        ("|error|", error, "magma", 0.0, limit),
    ]
    if blind is not None:
        guess, _ = _arrays(volume, blind, visible, show)[1:]
        columns[2] = ("reconstruction,\ntrue mean and SD", rebuilt, "gray", low, high)
        columns[3] = ("|error|,\ntrue mean and SD", error, "magma", 0.0, limit)
        columns.insert(3, ("reconstruction,\nmean and SD of neighbours", guess, "gray", low, high))
    extents = [s * n for s, n in zip(spacing, image.shape, strict=True)]
    heights = [extents[1], extents[0], extents[0]]
    widest = max(extents[2], extents[1])
    size = (3.0 * len(columns), 3.0 * sum(heights) / widest + 1.1)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(3, len(columns), squeeze=False, height_ratios=heights)
    for row, plane in enumerate(_PLANES):
        for column, (name, array, cmap, vmin, vmax) in enumerate(columns):
            axis = axes[row, column]
            picture = _draw(axis, _slice(array, plane, where), plane, spacing, cmap, vmin, vmax)
            if row == 0:
                axis.set_title(name, fontsize=10)
            if column == 0:
                axis.set_ylabel(f"{plane}, {'zyx'[row]} = {where[row]}", fontsize=9)
            if row == 2 and column in (0, len(columns) - 1):
                figure.colorbar(
                    picture,
                    ax=axes[:, column],
                    location="bottom",
                    label=show.unit,
                    shrink=0.8,
                    aspect=30,
                    pad=0.02,
                )
        _scale_bar(
            axes[row, 0], _slice(image, plane, where).shape[1], spacing[1 if row == 2 else 2]
        )
    figure.suptitle(title, fontsize=11)
    return figure


def save_panel(
    path: str | os.PathLike[str],
    volume: Tensor,
    reconstruction: Tensor,
    visible: Tensor,
    **options: Any,
) -> Path:
    """Writes ``make_panel(...)`` as a PNG and returns its path."""
    return write_figure(Path(path), make_panel(volume, reconstruction, visible, **options))


def write_figure(path: Path, figure: Figure) -> Path:
    """Writes a figure as PNG, through a temporary file in the same folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=110)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _arrays(
    volume: Tensor, reconstruction: Tensor, visible: Tensor, show: Display
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if volume.ndim != 3 or volume.shape != reconstruction.shape or visible.ndim != 3:
        raise ValueError(
            f"a panel takes volume and reconstruction [D, H, W] and visible cells [Gz, Gy, Gx], "
            f"not {tuple(volume.shape)}, {tuple(reconstruction.shape)}, {tuple(visible.shape)}"
        )
    seen = visible.detach().cpu().bool()
    for axis, (full, cells) in enumerate(zip(volume.shape, visible.shape, strict=True)):
        if full % cells:
            raise ValueError(f"axis {axis}: {full} voxels do not divide into {cells} cells")
        seen = seen.repeat_interleave(full // cells, dim=axis)
    image, rebuilt = (
        x.detach().cpu().float().numpy() * show.scale + show.offset
        for x in (volume, reconstruction)
    )
    return image, rebuilt, seen.numpy()


def _position(seen: np.ndarray) -> tuple[int, ...]:
    """Centre of the hidden voxels nearest to the middle, so that the planes cut hidden cells."""
    middle = np.array(seen.shape) / 2
    hidden = np.argwhere(~seen[::2, ::2, ::2]) * 2
    if len(hidden) == 0:
        return tuple(int(m) for m in middle)
    nearest = hidden[np.argsort(np.abs(hidden + 0.5 - middle).max(axis=1), kind="stable")[:256]]
    return tuple(int(n) for n in np.round(nearest.mean(axis=0)))


def _slice(array: np.ndarray, plane: str, where: Sequence[int]) -> np.ndarray:
    axis = _PLANES.index(plane)
    return array[tuple(where[axis] if i == axis else slice(None) for i in range(3))]


def _draw(
    axis: Axes,
    image: np.ndarray,
    plane: str,
    spacing: Sequence[float],
    cmap: str,
    low: float,
    high: float,
) -> Any:
    from matplotlib import colormaps

    rows, columns = {"axial": (1, 2), "coronal": (0, 2), "sagittal": (0, 1)}[plane]
    axis.set_facecolor(_HIDDEN)
    picture = axis.imshow(
        image,
        cmap=colormaps[cmap].with_extremes(bad=_HIDDEN),
        vmin=low,
        vmax=high,
        origin="upper" if plane == "axial" else "lower",
        aspect=spacing[rows] / spacing[columns],
        interpolation="nearest",
    )
    axis.set_xticks([])
    axis.set_yticks([])
    return picture


def _scale_bar(axis: Axes, columns: int, mm: float) -> None:
    from matplotlib.offsetbox import AnchoredOffsetbox, AuxTransformBox, TextArea, VPacker
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    fitting = [length for length in _SCALE_BARS_MM if length <= columns * mm / 3]
    length = fitting[-1] if fitting else _SCALE_BARS_MM[0]
    bar = AuxTransformBox(axis.transData)
    bar.add_artist(Rectangle((0, 0), length / mm, 0, ec="yellow", lw=2, fc="none"))
    outline = [withStroke(linewidth=2, foreground="black")]
    style = {"color": "yellow", "fontsize": 8, "path_effects": outline}
    label = TextArea(f"{length} mm", textprops=style)
    packed = VPacker(children=[bar, label], align="center", pad=0, sep=2)
    axis.add_artist(AnchoredOffsetbox("lower left", child=packed, frameon=False, pad=0.3))


class PanelCallback(L.Callback):
    """A panel of the first validation volume, as PNG and in TensorBoard, every few runs.

    Args:
        folder: for the PNG files, ``step_000500.png`` and so on.
        every: validation runs between panels.
        spacing: mm per voxel (z, y, x).
        display: units and window.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        every: int = 1,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        display: Display | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.every = max(1, every)
        self.spacing = tuple(spacing)
        self.display = display
        self._runs = 0

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draws the first volume of the first batch, on the first process."""
        if batch_idx != 0 or dataloader_idx != 0 or not trainer.is_global_zero:
            return
        self._runs += 1
        if (self._runs - 1) % self.every or not isinstance(outputs, Mapping):
            return
        output = outputs["spark"]
        hidden_loss, constant = output.loss.item(), output.constant_loss().item()
        figure = make_panel(
            output.volume[0, 0],
            output.reconstruction[0, 0],
            output.mask.visible[0],
            spacing=self.spacing,
            display=self.display,
            title=f"step {trainer.global_step}: loss {hidden_loss:.3f}, constant {constant:.3f}",
            blind=blind_reconstruction(output)[0, 0] if output.target.normalise else None,
        )
        write_figure(self.folder / f"step_{trainer.global_step:06d}.png", figure)
        for logger in trainer.loggers:
            if isinstance(logger, L.pytorch.loggers.TensorBoardLogger):
                logger.experiment.add_figure("panel", figure, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """The number of validation runs seen, so that a resumed run keeps the rhythm."""
        return {"runs": self._runs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``state_dict`` gave."""
        self._runs = int(state_dict["runs"])
