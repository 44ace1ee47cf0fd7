"""`medspark demo`: the whole chain on small data, a summary to read, a picture to look at."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from omegaconf import DictConfig

from medspark.cli.app import output_dir, plain, save_config

if TYPE_CHECKING:
    from medspark.cli.demo_report import Runs
    from medspark.pretrain.run import PretrainResult

# People of the task are others than those of the pre-training, and others than those on whom the
# settings of the demo were chosen (seeds from 100,000): the figures it prints are not tuned on them.
TASK_SEED = 200_000
MODES = ("linear", "full")
_T = TypeVar("_T")


def run(config: DictConfig) -> None:
    """Makes or takes scans, prepares, pre-trains, reconstructs, fine-tunes, reports."""
    from medspark.cli.demo_report import Demo, write_report

    began = time.monotonic()
    out = output_dir()
    save_config(config, out)
    scans = _step("1/5 scans", lambda: scans_of(config, out))
    _step("2/5 prepare: scans to a store", lambda: prepare_store(config, scans))
    result = _step("3/5 pretrain: hide cells, fill them in", lambda: pretrain(config, out))
    panel, losses = _step("4/5 reconstruct", lambda: draw_panel(config, result, out))
    runs = _step("5/5 finetune: lesion or not", lambda: finetune_both(config, result.best, out))
    demo = Demo(
        synthetic=config.data is None,
        steps=result.steps,
        loss=losses[0],
        constant=losses[1],
        runs=runs,
        seconds=time.monotonic() - began,
    )
    print(write_report(demo, panel, out))


def _step(title: str, work: Callable[[], _T]) -> _T:
    print(f"\n== {title}", flush=True)
    return work()


def scans_of(config: DictConfig, out: Path) -> Path:
    """The folder of scans: the user's, or synthetic ones written to `out`.

    Raises:
        FileNotFoundError: the user's folder does not exist.
    """
    from medspark.data.phantom import write_phantoms

    if config.data is not None:
        if not Path(config.data).is_dir():
            raise FileNotFoundError(f"no folder {config.data}")
        print(f"scans: {config.data}")
        return Path(config.data)
    folder = out / "scans"
    written = write_phantoms(folder, config.phantoms, config.seed)
    print(f"drew {len(written)} synthetic CTs in {folder}")
    return folder


def prepare_store(config: DictConfig, scans: Path) -> None:
    """Reads the scans into the store."""
    from medspark.cli.prepare import describe
    from medspark.data.ingest import prepare

    table = scans / "patients.csv"
    store = Path(config.pretrain.data.store)
    report = prepare(
        scans,
        store,
        spacing=plain(config.spacing),
        patients_csv=table if table.is_file() else None,
    )
    print(describe(report, store))


def pretrain(config: DictConfig, out: Path) -> PretrainResult:
    """Pre-trains a small network on crops of the store."""
    from medspark.cli.pretrain import pretrain_as

    return pretrain_as(config.pretrain, out / "pretrain")


def draw_panel(
    config: DictConfig, result: PretrainResult, out: Path
) -> tuple[Path, tuple[float, float]]:
    """A panel of the first validation patient; losses over all validation crops.

    Returns:
        The picture, and the loss of the network and of a constant guess on the same masks.
    """
    from medspark.cli.reconstruct import draw
    from medspark.data.store import Store, split_patients

    store = Store(config.pretrain.data.store)
    _, unseen = split_patients(store, config.pretrain.data.val_fraction, config.pretrain.seed)
    panel = out / "panel.png"
    draw(result.best, store.read(unseen[0].id), unseen[0].spacing, panel)
    return panel, (result.metrics["val/loss"], result.metrics["val/constant"])


def finetune_both(config: DictConfig, checkpoint: Path, out: Path) -> Runs:
    """Fine-tunes on the synthetic task, from the checkpoint and from scratch, in both modes.

    A linear probe from scratch has the random features of an untrained network: what the
    pre-trained features have to beat.
    """
    from medspark.data.phantom import write_phantom_task
    from medspark.data.tasks import load_task
    from medspark.data.windows import Intensity
    from medspark.finetune.run import finetune
    from medspark.pretrain.export import load_encoder

    folder = write_phantom_task(
        out / "task", n_patients=config.task_patients, seed=TASK_SEED + config.seed
    )
    task = load_task(folder)
    encoder, plan = load_encoder(checkpoint)
    runs: Runs = {}
    starts = {"pre-trained": encoder, "scratch": None}
    for mode, (start, network), seed in product(MODES, starts.items(), config.seeds):
        print(f"{mode}, {start}, seed {seed}", flush=True)
        found = finetune(
            task,
            network,
            scratch=plan["encoder"],
            intensity=Intensity.from_dict(plan["intensity"]),
            mode=mode,
            epochs=config.epochs,
            seed=seed,
            out_dir=out / "finetune" / f"{mode}_{start}_seed_{seed}",
            accelerator=config.pretrain.trainer.accelerator,
            progress=config.pretrain.trainer.progress_bar,
        )
        runs.setdefault(f"{mode}, {start}", {})[seed] = found.metrics
    return runs
