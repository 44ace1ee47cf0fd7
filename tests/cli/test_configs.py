"""Every configuration composes, and what it describes can be built."""

import inspect
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from medspark.cli.main import COMMANDS
from medspark.cli.pretrain import model_spec
from medspark.data.windows import Intensity

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GROUPS = ("crops", "model", "method", "optim", "trainer", "experiment", "debug")


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def composed(name: str, *overrides: str):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(name, list(overrides))


def check_pretraining(config) -> None:
    """Builds the model without memory and fits every value to the function that takes it."""
    from medspark.models.spark import build_spark
    from medspark.pretrain.run import pretrain
    from medspark.pretrain.schedule import optim_options

    with torch.device("meta"):
        spark = build_spark(model_spec(config))
    crop = torch.zeros(1, 1, *config.data.crop, device="meta")
    grid = spark.grid(crop)
    assert [g * c for g, c in zip(grid, spark.cell, strict=True)] == list(config.data.crop)
    optim_options({**OmegaConf.to_container(config.optim), "max_steps": config.trainer.max_steps})
    taken = inspect.signature(pretrain).parameters
    assert [key for key in config.trainer if key not in taken] == []
    Intensity.named(config.data.window)


def test_all_groups_are_covered():
    folders = sorted(p.name for p in CONFIGS.iterdir() if p.is_dir() and p.name != "__pycache__")
    assert folders == sorted((*GROUPS, "views"))
    assert all(options(group) for group in GROUPS)


def test_there_is_one_configuration_for_each_command():
    files = {path.stem for path in CONFIGS.glob("*.yaml")} - {"base"}
    assert files == set(COMMANDS) - {"info"}


@pytest.mark.parametrize("option", [f"{g}={o}" for g in GROUPS for o in options(g)])
def test_every_option_of_every_group_describes_a_pretraining(option):
    group = option.split("=")[0]
    key = f"{group}@data" if group == "crops" else group
    config = composed("pretrain", option.replace(group, key, 1), "data.store=store")
    check_pretraining(config)


@pytest.mark.parametrize("model", options("model"))
@pytest.mark.parametrize("method", options("method"))
def test_every_network_goes_with_every_method(model, method):
    check_pretraining(
        composed("pretrain", "data.store=store", f"model={model}", f"method={method}")
    )


def test_spark_preset_is_the_official_algorithm():
    spec = model_spec(composed("pretrain", "data.store=store", "method=spark"))
    assert spec["cell"] is None
    assert spec["width"] == 768
    assert spec["mask_ratio"] == 0.6
    assert spec["strides"] == [4, 8, 16, 32]
    assert (spec["normalise_target"], spec["eps"]) == (True, 1e-6)
    assert spec["variance_floor"] == 0.0


def test_medspark_preset_has_a_variance_floor_and_is_the_default():
    spec = model_spec(composed("pretrain", "data.store=store"))
    assert spec == model_spec(composed("pretrain", "data.store=store", "method=medspark"))
    assert spec["variance_floor"] > 0


def test_demo_describes_a_pretraining():
    config = composed("demo", "steps=30")
    assert config.pretrain.trainer.max_steps == 30
    assert config.pretrain.data.store == "demo_out/store"
    check_pretraining(config.pretrain)


def test_finetune_settings_are_arguments_of_finetune():
    from medspark.cli.finetune import _OPTIONS, _SETTINGS
    from medspark.finetune.run import finetune
    from medspark.finetune.settings import Settings

    config = OmegaConf.to_container(composed("finetune", "task=t"))
    defaults = Settings().as_dict()
    assert set(_SETTINGS) == set(defaults) - {"seed"}
    assert {key: config[key] for key in _SETTINGS} == {key: defaults[key] for key in _SETTINGS}
    taken = inspect.signature(finetune).parameters
    assert [key for key in _OPTIONS if taken[key].default != config[key]] == []


def test_predict_settings_are_arguments_of_predict():
    from medspark.finetune.predict import predict

    taken = inspect.signature(predict).parameters
    config = OmegaConf.to_container(composed("predict", "checkpoint=c", "source=s", "out=o"))
    assert set(config) == set(taken)
    optional = {k: p.default for k, p in taken.items() if p.default is not p.empty}
    assert optional == {key: config[key] for key in optional}


def test_prepare_settings_are_arguments_of_prepare():
    from medspark.data.ingest import prepare

    taken = set(inspect.signature(prepare).parameters)
    assert set(composed("prepare")) - taken == {"exclude_from"}
