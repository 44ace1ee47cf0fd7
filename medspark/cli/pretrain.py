"""`medspark pretrain`: masked pre-training on a store."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from medspark.cli.app import output_dir, plain, save_config

if TYPE_CHECKING:
    from medspark.data.crops import CropDataset
    from medspark.data.store import Store
    from medspark.data.windows import Intensity
    from medspark.pretrain.panels import Display
    from medspark.pretrain.run import PretrainResult

# A crop is a function of its number, so a longer data set costs nothing. This many processes can
# share one run.
_MAX_PROCESSES = 4096


def run(config: DictConfig) -> None:
    """Pre-trains on random crops of the store; checkpoints and panels go to the output folder.

    Raises:
        ValueError: `torchrun` or `resume=auto` without a folder that they agree upon.
    """
    check_output_dir(config)
    out = output_dir()
    if os.environ.get("RANK", "0") == "0":
        save_config(config, out)
    result = pretrain_as(config, out)
    if os.environ.get("RANK", "0") != "0":
        return
    shown = {key: result.metrics.get(key, float("nan")) for key in ("val/loss", "val/constant")}
    print(
        f"{result.steps} steps, loss on unseen patients {shown['val/loss']:.4f} "
        f"(a constant guess has {shown['val/constant']:.4f})\n"
        f"best checkpoint: {result.best}\nlast checkpoint: {result.last}\n"
        f"pictures:        {out / 'panels'}\n"
        f"curves:          tensorboard --logdir {out / 'tensorboard'}\n"
        f"summary:         {result.summary}"
    )


def check_output_dir(config: DictConfig) -> None:
    """Several processes, or a job that is started again, must write to one folder.

    Raises:
        ValueError: the folder would be named after the time, which differs between them.
    """
    given = any(o.startswith("hydra.run.dir=") for o in HydraConfig.get().overrides.hydra)
    why = "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "resume=auto"
    if not given and (why == "torchrun" or config.resume == "auto"):
        raise ValueError(
            f"{why} needs hydra.run.dir=FOLDER: without it the folder is named after the time of the "
            "start, which is another one in each process and after each restart"
        )


def pretrain_as(config: DictConfig, out: Path) -> PretrainResult:
    """Runs the pre-training that the groups data, model, method, optim and trainer describe."""
    from medspark.data.store import Store
    from medspark.data.windows import Intensity
    from medspark.pretrain.run import pretrain

    store = Store(config.data.store)
    intensity = Intensity.named(config.data.window)
    spec = model_spec(config)
    train, val = datasets(config, spec, store, intensity)
    return pretrain(
        spec,
        train,
        val,
        out_dir=out,
        optim=plain(config.optim),
        resume=config.resume,
        init_from=config.init_from,
        seed=config.seed,
        num_workers=config.data.num_workers,
        intensity=intensity.as_dict(),
        spacing=store.spacing,
        crop=plain(config.data.crop),
        display=display(intensity),
        **plain(config.trainer),
    )


def model_spec(config: DictConfig) -> dict[str, Any]:
    """The SparK spec that the groups `model` and `method` describe together."""
    from medspark.models.spark import spark_spec

    model, method = plain(config.model), plain(config.method)
    encoder = model.pop("encoder")
    return spark_spec(encoder["name"], encoder_kwargs=encoder["kwargs"], **model, **method)


def datasets(
    config: DictConfig, spec: Mapping[str, Any], store: Store, intensity: Intensity
) -> tuple[CropDataset, CropDataset]:
    """Endless training crops with their masks, and a fixed set of crops of other patients."""
    from medspark.data.crops import CropDataset
    from medspark.data.store import split_patients

    data, trainer = config.data, config.trainer
    train, val = split_patients(store, data.val_fraction, config.seed)
    crop = tuple(data.crop)
    options = {"min_body": data.min_body, "body_share": data.body_share, "seed": config.seed}
    samples = trainer.max_steps * trainer.batch_size * trainer.accumulate * _MAX_PROCESSES
    return (
        CropDataset(
            store,
            train,
            crop,
            intensity,
            length=samples,
            flips=data.flips,
            mask_grid=mask_grid(spec, crop),
            mask_ratio=spec["mask_ratio"],
            **options,
        ),
        CropDataset(store, val, crop, intensity, length=data.val_crops, flips=False, **options),
    )


def mask_grid(spec: Mapping[str, Any], crop: Sequence[int]) -> tuple[int, int, int]:
    """Cells of a crop's mask (z, y, x), as `medspark.models.SparK` counts them.

    Raises:
        ValueError: the crop is no multiple of the cell, or no cell would be hidden or visible.
    """
    from medspark.models.pyramid import as_stride

    cell = as_stride(spec["cell"] or spec["strides"][-1], 3)
    if any(size % edge for size, edge in zip(crop, cell, strict=True)):
        raise ValueError(f"crop {tuple(crop)} (z, y, x) does not divide by the cell {cell}")
    z, y, x = (size // edge for size, edge in zip(crop, cell, strict=True))
    cells = z * y * x
    if not 0 < round(cells * (1 - spec["mask_ratio"])) < cells:
        raise ValueError(
            f"mask ratio {spec['mask_ratio']} leaves no choice of {cells} cells in a crop of "
            f"{tuple(crop)}; use larger crops (data.crop) or smaller cells (method.cell)"
        )
    return z, y, x


def display(intensity: Intensity) -> Display:
    """How the panels show normalised values: in HU, between the ends of the window."""
    import torch

    from medspark.pretrain.panels import Display

    zero, one = intensity.to_hu(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    window = (intensity.window.low, intensity.window.high)
    return Display(scale=one - zero, offset=zero, window=window, unit="HU")
