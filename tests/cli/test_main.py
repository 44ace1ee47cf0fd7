"""The console: what it says to a newcomer, and what it does with mistakes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from medspark.cli.app import config_path, run_app
from medspark.cli.main import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
HYDRA_COMMANDS = [name for name in COMMANDS if name != "info"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


def test_help_teaches_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert command.summary in text
        assert f"$ {command.example}" in text
        assert command.example.startswith(f"medspark {name}")
    assert "optim.lr=1e-3" in text


def test_no_command_is_an_error_that_teaches(capsys):
    assert main([]) == 2
    assert "usage: medspark <command>" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "meant"), [("pretrian", "pretrain"), ("fine-tune", "finetune"), ("prep", "prepare")]
)
def test_unknown_command_suggests(capsys, typed, meant):
    assert main([typed]) == 2
    text = capsys.readouterr().err
    assert re.search(rf"Did you mean .*\b{meant}\b", text)
    assert "Traceback" not in text


def test_unknown_command_without_a_neighbour(capsys):
    assert main(["xyzzy"]) == 2
    text = capsys.readouterr().err
    assert "Did you mean" not in text
    assert "prepare, pretrain" in text


@pytest.mark.parametrize("name", HYDRA_COMMANDS)
def test_help_of_a_command_explains_every_key(capsys, name):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    explained, _, listed = text.partition("== Configuration of this command line ==")
    assert explained.startswith(f"medspark {name}: ")
    assert f"usage: medspark {name}" in explained
    keys = OmegaConf.create(listed[: listed.index("`medspark ")]).keys()
    assert [key for key in keys if not re.search(rf"^ +{key}\b", explained, re.M)] == []


@pytest.mark.parametrize("name", HYDRA_COMMANDS)
def test_typo_in_a_key_fails(capsys, name):
    assert main([name, "checkpiont=1"]) == 1
    assert "checkpiont" in capsys.readouterr().err


def test_typo_in_a_group_option_fails_and_lists_the_options(capsys):
    assert main(["pretrain", "model=resnet19"]) == 1
    text = capsys.readouterr().err
    assert "resnet18" in text
    assert "resnet50" in text


def test_missing_values_are_asked_for(capsys):
    assert main(["prepare"]) == 1
    expected = (
        "medspark prepare: error: no value for source, store; "
        "run: medspark prepare source=... store=...\n"
    )
    assert capsys.readouterr().err == expected


def test_library_errors_are_one_line(capsys):
    assert main(["prepare", "source=nowhere", "store=store"]) == 1
    text = capsys.readouterr().err
    assert text.startswith("medspark prepare: error: ")
    assert "nowhere" in text
    assert text.count("\n") == 1


def test_full_error_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        main(["prepare", "source=nowhere", "store=store"])


def test_defects_keep_their_traceback(capsys):
    def broken(config):
        raise RuntimeError("a defect")

    assert run_app("export", broken, ["checkpoint=a", "out=b"]) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert "RuntimeError: a defect" in text


def test_further_processes_would_get_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["medspark", "from", "outside"])
    seen = []
    arguments = ["checkpoint=a", "out=b"]
    assert run_app("export", lambda config: seen.append(list(sys.argv)), arguments) == 0
    assert seen == [["medspark", "export", *arguments]]
    assert sys.argv == ["medspark", "from", "outside"]


def test_info_parses_its_own_flags(capsys):
    assert main(["info", "--json"]) == 0
    assert "torch" in capsys.readouterr().out


def test_nothing_heavy_is_imported_for_help():
    code = (
        "import sys; from medspark.cli.main import main; main(['--help']); main(['pretrian']); "
        "print([m for m in ('torch', 'hydra', 'monai', 'lightning') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_configurations_are_found_without_installation(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert config_path().endswith("configs")
    assert "pkg" not in config_path()
