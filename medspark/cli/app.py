"""What all hydra commands share: start, one-line errors, the resolved configuration of a run."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# Bad input, a missing file or optional package, a layer without a sparse form, a training that has
# diverged: told in one line. Anything else is a defect and keeps its traceback.
EXPECTED_ERRORS = (
    ValueError,
    OSError,
    ModuleNotFoundError,
    NotImplementedError,
    FloatingPointError,
    OmegaConfBaseException,
)


# What Lightning says at every run and a user can do nothing about, or has chosen by a setting.
_CHATTER = (
    r"`isinstance\(treespec, LeafSpec\)`",
    ".*does not have many workers",
    ".*smaller than the logging interval",
    r"Found \d+ module\(s\) in eval mode",
    "Checkpoint directory .* exists and is not empty",
)


def config_path() -> str:
    """Where hydra finds the configurations: the installed package, else the source tree."""
    if importlib.util.find_spec("medspark.configs") is not None:
        return "pkg://medspark.configs"
    return str(Path(__file__).resolve().parents[2] / "configs")


@contextmanager
def _arguments(argv: Sequence[str]) -> Iterator[None]:
    saved = sys.argv
    sys.argv = list(argv)
    try:
        yield
    finally:
        sys.argv = saved


def run_app(name: str, task: Callable[[DictConfig], None], overrides: Sequence[str]) -> int:
    """Runs `task` as the hydra application `medspark <name>` on `configs/<name>.yaml`.

    Args:
        name: the command.
        task: gets the composed configuration.
        overrides: hydra arguments, `key=value` or flags such as `--help`.

    Returns:
        0 for success, else hydra's or the task's exit status.
    """
    program = sys.argv[0]

    def guarded(config: DictConfig) -> None:
        # Lightning starts the other processes of a run from `sys.argv`: they need the command.
        with _arguments([program, name, *overrides]):
            _run_task(name, task, config)

    app = hydra.main(config_path=config_path(), config_name=name, version_base="1.3")(guarded)
    try:
        with _arguments([program, *overrides]):
            app()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def quiet_libraries() -> None:
    """Keeps warnings that matter and drops the rest of what libraries tell about each run."""
    ranks = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero")
    for name in (*ranks, "numexpr.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _CHATTER:
        warnings.filterwarnings("ignore", message=message)


def _run_task(name: str, task: Callable[[DictConfig], None], config: DictConfig) -> None:
    quiet_libraries()
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            wanted = " ".join(f"{key}=..." for key in missing)
            raise ValueError(f"no value for {', '.join(missing)}; run: medspark {name} {wanted}")
        task(config)
    except EXPECTED_ERRORS as error:
        if os.environ.get("HYDRA_FULL_ERROR", "0") not in {"", "0"}:
            raise
        print(f"medspark {name}: error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def output_dir() -> Path:
    """The folder of the current run, as hydra made it (`hydra.run.dir`)."""
    return Path(HydraConfig.get().runtime.output_dir)


def save_config(config: DictConfig, folder: Path) -> Path:
    """Writes the configuration with every reference resolved to `folder/config.yaml`."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "config.yaml"
    partial = folder / f".config.yaml.{os.getpid()}"
    partial.write_text(OmegaConf.to_yaml(config, resolve=True))
    os.replace(partial, target)
    return target


def plain(value: Any) -> Any:
    """A part of the configuration as plain lists and dicts: checkpoints may hold nothing else."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
