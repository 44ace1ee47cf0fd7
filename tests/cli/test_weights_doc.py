"""Commands and lines of docs/weights.md work as they stand."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from medspark.models import create_encoder

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "weights.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
COMMANDS += re.findall(r"`(medspark export [^`]+)`", TEXT)


def test_commands_were_found():
    assert len(COMMANDS) >= 4
    assert any("target=nnunet" in line for line in COMMANDS)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_compose(line):
    _, name, *overrides = shlex.split(line)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose(name, overrides)
    if "shortcut_type" in line:
        assert config.encoder.kwargs.shortcut_type == "A"
    if "data_licence" in line:
        assert config.data_licence == "CC BY 3.0"


def test_lines_of_python(tmp_path, monkeypatch, capsys):
    (code,) = (block for kind, block in BLOCKS if kind == "python")
    source = create_encoder("resnet18", shortcut_type="A")
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "resnet_18_23dataset.pth")
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(code, space)
    assert torch.equal(space["encoder"].layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    assert "100% of the kernels" in capsys.readouterr().out
