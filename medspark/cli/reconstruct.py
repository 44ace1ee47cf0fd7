"""`medspark reconstruct`: what a pre-trained network fills into the hidden cells of a volume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from medspark.cli.app import plain

if TYPE_CHECKING:
    import numpy as np

    from medspark.models.spark import SparK, SparKOutput

AIR = -1024


def run(config: DictConfig) -> None:
    """Draws a panel of a volume and prints the losses."""
    from medspark.pretrain.export import load_plan

    checkpoint = Path(config.checkpoint)
    hu, spacing = read_hu(str(config.volume), config.store, load_plan(checkpoint)["spacing"])
    crop, centre = plain(config.crop), plain(config.centre)
    draw(checkpoint, hu, spacing, Path(config.out), crop=crop, centre=centre, seed=config.seed)


def draw(
    checkpoint: Path,
    hu: np.ndarray,
    spacing: Sequence[float],
    out: Path,
    *,
    crop: Sequence[int] | None = None,
    centre: Sequence[int] | None = None,
    seed: int = 0,
) -> tuple[float, float]:
    """Writes a panel of input, visible part, reconstruction and error, and prints the losses.

    Args:
        checkpoint: of the pre-training.
        hu: volume [z, y, x] in HU, at the voxel size of the pre-training.
        spacing: mm (z, y, x), for the picture.
        out: PNG.
        crop: voxels (z, y, x); None takes the crop of the pre-training.
        centre: middle voxel of the crop; None takes the middle of the volume.
        seed: of the mask.

    Returns:
        Loss on the hidden cells of this crop, and that of a constant guess.

    Raises:
        ValueError: a checkpoint without what is needed, a crop that does not divide into cells.
    """
    from medspark.cli.pretrain import display
    from medspark.data.windows import Intensity
    from medspark.pretrain.panels import save_panel

    spark, found = load_spark(checkpoint)
    if found["intensity"] is None or (crop is None and found["crop"] is None):
        raise ValueError(f"{checkpoint} does not say how its input was normalised and cropped")
    intensity = Intensity.from_dict(found["intensity"])
    box = crop_at(hu, crop or found["crop"], centre)
    output = reconstruct(spark, intensity.normalise(box), seed)
    loss, constant = output.loss.item(), output.constant_loss().item()
    save_panel(
        out,
        output.volume[0, 0],
        output.reconstruction[0, 0],
        output.mask.visible[0],
        spacing=spacing,
        display=display(intensity),
        title=f"loss {loss:.3f}, constant guess {constant:.3f}",
    )
    print(f"loss on hidden cells {loss:.4f}, of a constant guess {constant:.4f}\npanel: {out}")
    return loss, constant


def load_spark(checkpoint: Path) -> tuple[SparK, dict[str, Any]]:
    """The whole pre-trained model, in eval mode, and its plan.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or exported weights, which hold the encoder only.
    """
    from medspark.pretrain.export import load_checkpoint
    from medspark.pretrain.plan import check_plan
    from medspark.pretrain.spark_module import SparKModule

    content = load_checkpoint(checkpoint)
    if "hyper_parameters" not in content:
        raise ValueError(f"{checkpoint} holds no decoder: give a checkpoint of `medspark pretrain`")
    module = SparKModule(**content["hyper_parameters"])
    try:
        module.load_state_dict(content["state_dict"])
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{checkpoint} does not fit its own settings: {error}") from error
    return module.spark.eval(), check_plan(content.get("plan"), str(checkpoint))


def read_hu(
    volume: str, store: str | None, spacing: Sequence[float] | None
) -> tuple[np.ndarray, tuple[float, ...]]:
    """A volume as HU [z, y, x], at the voxel size of the pre-training, and its spacing in mm.

    Args:
        volume: a CT file or DICOM folder, or the id of a volume where `store` is given.
        store: folder of a store, or None.
        spacing: mm (z, y, x) to resample a file to; None keeps its own.

    Raises:
        FileNotFoundError: no such file, or no such volume in the store.
        ValueError: the file cannot be used as CT.
    """
    from medspark.data.ingest import resample
    from medspark.data.io import read_volume
    from medspark.data.store import Store

    if store is not None:
        records = {record.id: record for record in Store(store).records}
        if volume not in records:
            raise FileNotFoundError(f"no volume {volume!r} in {store}, see its manifest.csv")
        return Store(store).read(volume), records[volume].spacing
    if not Path(volume).exists():
        raise FileNotFoundError(f"no file {volume}; a volume of a store needs store=FOLDER too")
    found = read_volume(volume)
    if spacing is not None:
        found = resample(found, (spacing[0], spacing[1], spacing[2]))
    return found.hu, found.spacing


def crop_at(hu: np.ndarray, size: Sequence[int], centre: Sequence[int] | None) -> np.ndarray:
    """A box of `size` voxels around `centre` (the middle by default), inside where it fits.

    What the volume lacks is filled with air, evenly on both sides.
    """
    import numpy as np

    middle = [n // 2 for n in hu.shape] if centre is None else list(centre)
    starts = [
        min(max(c - s // 2, 0), max(n - s, 0))
        for c, s, n in zip(middle, size, hu.shape, strict=True)
    ]
    box = hu[tuple(slice(a, a + s) for a, s in zip(starts, size, strict=True))]
    lacking = [s - n for s, n in zip(size, box.shape, strict=True)]
    return np.pad(box, [(n // 2, n - n // 2) for n in lacking], constant_values=AIR)


def reconstruct(spark: SparK, volume: np.ndarray, seed: int) -> SparKOutput:
    """Runs the model on one normalised crop [D, H, W] under the mask that `seed` draws."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        output: SparKOutput = spark(torch.as_tensor(volume)[None, None], generator=generator)
    return output
