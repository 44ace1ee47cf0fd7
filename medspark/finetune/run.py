"""One fine-tuning run: train, choose a checkpoint by validation, test it once."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from torch import Tensor, nn

from medspark.finetune.bootstrap import Interval, patient_intervals
from medspark.finetune.classifier import fitting_spec, make_plan, save_classifier
from medspark.finetune.data import KeptTask, TaskData
from medspark.finetune.fit import FeatureBank, Machine, fit, predicted
from medspark.finetune.knn import NearestNeighbours, mean_sd
from medspark.finetune.metrics import classification_metrics
from medspark.finetune.module import ClassifierModule
from medspark.finetune.pictures import write_pictures
from medspark.finetune.result import (
    CHECKPOINT,
    PREDICTIONS,
    RESULT,
    FinetuneResult,
    record_of,
    write_predictions,
    write_result,
)
from medspark.finetune.settings import Settings, loss_weights
from medspark.models.encoders import encoder_from_spec
from medspark.models.pyramid import spatial_dims

if TYPE_CHECKING:
    from medspark.data.tasks import Task
    from medspark.data.windows import Intensity

_SCRATCH: dict[str, Any] = {"name": "resnet18", "kwargs": {}}
_Found = Mapping[str, tuple[Tensor, Tensor]]


def finetune(
    task: Task,
    encoder: nn.Module | None,
    *,
    out_dir: str | Path,
    intensity: Intensity,
    scratch: Mapping[str, Any] | None = None,
    pretrained: Mapping[str, Any] | None = None,
    accelerator: str = "auto",
    num_workers: int = 0,
    progress: bool = True,
    draws: int = 2000,
    pictures: bool = True,
    **settings: Any,
) -> FinetuneResult:
    """Trains a classifier on the training split of `task` and tests it.

    The classifier of the best validation is kept and evaluated once on every split. The test split
    is not even read before that choice is made. The same seed gives the same numbers on a CPU.

    Args:
        task: labelled samples in the splits train, val (unless `monitor` is "last") and test.
        encoder: pre-trained network, not changed here (a copy trains); None starts from scratch.
        out_dir: folder for best.ckpt (the classifier), predictions.csv, metrics.csv (losses by
            epoch), roc.png, reliability.png and confusion.png of the test split and, last,
            result.json.
        intensity: normalisation of the voxels; must be that of the pre-training.
        scratch: spec `{"name": ..., "kwargs": {...}}` of the network. It is built where `encoder`
            is None (ResNet-18 by default, a 2D one for images), and written to the checkpoint,
            which cannot be predicted with otherwise.
        pretrained: plan of the pre-training; its spec goes before `scratch`.
        accelerator: of Lightning, "auto", "cpu" or "gpu".
        num_workers: processes that read samples.
        progress: whether to show a progress bar.
        draws: of the bootstrap over patients.
        pictures: whether to draw the pictures.
        **settings: see `Settings`.

    Raises:
        ValueError: an impossible setting, a split without samples, training labels of one class
            only, a 3D network for images or the reverse.
        FloatingPointError: a loss is not finite.
    """
    chosen = Settings(**settings)
    _check(task, chosen.splits)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    (out / RESULT).unlink(missing_ok=True)  # from here on the folder is an unfinished run
    L.seed_everything(chosen.seed, workers=True, verbose=False)
    spec = start_spec(task, encoder, scratch, pretrained)
    network = copy.deepcopy(encoder) if encoder is not None else encoder_from_spec(spec or _SCRATCH)
    _check_dims(task, network)
    machine = Machine(accelerator, num_workers, progress)
    data = TaskData(KeptTask(task), intensity, chosen, num_workers)
    module = _module(network, data, chosen)
    bank = FeatureBank(module, data, chosen, machine)
    found_by = _choose(module, bank, data, chosen, machine, out)
    plan = make_plan(
        encoder=spec,
        mode=chosen.mode,
        class_names=list(task.class_names),
        intensity=intensity.as_dict(),
        grey=task.grey,
        dims=task.dims,
        geometry=data.geometry(),
        knn=_knn_entry(module),
        pretrained=pretrained,
    )
    checkpoint = save_classifier(out / CHECKPOINT, module, plan)
    found = {}
    for split in chosen.splits:
        # A frozen encoder has seen most samples already.
        known = data.ordered_features(*bank.of(split)) if chosen.frozen else data.ordered(split)
        found[split] = predicted(module, known, chosen, machine)
    result = FinetuneResult(
        metrics={split: classification_metrics(p, label) for split, (p, label) in found.items()},
        predictions=write_predictions(task, found, out / PREDICTIONS),
        checkpoint=checkpoint,
        best_epoch=found_by.get("epoch"),
        chosen=found_by,
        intervals=_intervals(task, found, draws),
    )
    if pictures:
        write_pictures(out, *found["test"], task.class_names)
    write_result(out, result, record_of(task, encoder, spec, intensity, chosen))
    return result


def start_spec(
    task: Task,
    encoder: nn.Module | None,
    scratch: Mapping[str, Any] | None,
    pretrained: Mapping[str, Any] | None,
) -> dict[str, Any] | None:
    """Spec of the network that a run starts with; None where an `encoder` comes without one.

    From scratch a ResNet is 2D where the task's samples are.
    """
    if encoder is not None:
        return fitting_spec(encoder, pretrained["encoder"] if pretrained is not None else scratch)
    spec = dict(scratch if scratch is not None else _SCRATCH)
    kwargs = dict(spec.get("kwargs") or {})
    if task.dims == 2 and str(spec.get("name")).startswith("resnet"):
        kwargs.setdefault("spatial_dims", 2)
    return {**spec, "kwargs": kwargs}


def _check(task: Task, splits: Sequence[str]) -> None:
    labels = {split: {sample.label for sample in task.split(split)} for split in splits}
    if len(labels["train"]) < 2:
        raise ValueError("the training split holds one class only: nothing to learn")


def _check_dims(task: Task, network: nn.Module) -> None:
    dims = spatial_dims(network)
    if dims != task.dims:
        raise ValueError(
            f"the network works on {dims}D samples, those of task '{task.name}' are {task.dims}D"
        )


def _module(
    network: nn.Module, data: TaskData, settings: Settings
) -> ClassifierModule | NearestNeighbours:
    labels = [sample.label for sample in data.task.split("train")]
    n_classes = len(data.task.class_names)
    weights = loss_weights(settings, labels, n_classes)
    if settings.mode == "knn":
        return NearestNeighbours(network, n_classes, len(labels), class_weights=weights)
    return ClassifierModule(
        network,
        n_classes,
        mode=settings.mode,
        lr=settings.peak_lr,
        encoder_lr_scale=settings.encoder_lr_scale,
        layer_decay=settings.layer_decay,
        open_at=settings.open_at,
        weight_decay=settings.weight_decay,
        dropout=settings.dropout,
        class_weights=weights,
        label_smoothing=settings.label_smoothing,
    )


def _choose(
    module: ClassifierModule | NearestNeighbours,
    bank: FeatureBank,
    data: TaskData,
    settings: Settings,
    machine: Machine,
    out: Path,
) -> dict[str, Any]:
    """Trains, or keeps the neighbours; says what validation chose. The test split is not touched."""
    if settings.standardises:
        module.feature_mean, module.feature_sd = mean_sd(bank.of("train")[0])
    if isinstance(module, NearestNeighbours):
        module.remember(*bank.of("train"))
        choice = module.choose(*bank.of("val"), settings.monitor)
        return {"monitor": settings.monitor, **asdict(choice)}
    train = data.training()
    val = data.ordered("val") if "val" in settings.splits else None
    if settings.frozen:
        val = data.ordered_features(*bank.of("val")) if val is not None else None
        if not settings.augments:  # the encoder would say the same in every epoch
            train = data.training_features(*bank.of("train"))
    best = fit(module, train, val, settings, machine, out)
    return {"monitor": settings.monitor, "value": best.value, "epoch": best.epoch}


def _knn_entry(module: nn.Module) -> dict[str, Any] | None:
    if not isinstance(module, NearestNeighbours):
        return None
    count = len(module.references)
    return {"k": module.k, "temperature": module.temperature, "references": count}


def _intervals(task: Task, found: _Found, draws: int) -> dict[str, Interval]:
    patients = [sample.patient for sample in task.split("test")]
    return patient_intervals(*found["test"], patients, draws=draws, seed=0)
