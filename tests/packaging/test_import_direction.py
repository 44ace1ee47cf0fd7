"""Who may import whom: sparse <- models <- pretrain, finetune <- study <- cli."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "medspark"

# Package of medspark -> the packages of medspark it may import, itself included.
LAYERS = {
    "sparse": {"sparse"},
    "losses": {"losses"},
    "data": {"data"},
    "models": {"models", "sparse", "losses"},
    "pretrain": {"pretrain", "models", "sparse", "losses", "data"},
    "finetune": {"finetune", "models", "sparse", "losses", "data"},
    "study": {"study", "finetune", "models", "sparse", "losses", "data"},
}
# Packages that only these third parties may enter.
THIRD_PARTY = {"sparse": {"torch", "numpy"}, "losses": {"torch"}}
# Peers found at run time, where a user of theirs calls for a conversion.
FOUND_AT_RUN_TIME = {"medspark.sparse.convert": {"spconv", "MinkowskiEngine"}}
# Third party -> its only home; None: nowhere. A dotted name covers what lies below it.
HOMES = {
    "hydra": "cli",
    "omegaconf": "cli",
    "SimpleITK": "data",
    "monai.transforms": "data",
    "torchvision": None,
    "timm": None,
    "lightly": None,
}
# What torch itself is installed with.
TORCH_NEEDS = (
    "torch torchgen functorch triton nvidia numpy typing_extensions sympy mpmath networkx jinja2 "
    "markupsafe fsspec filelock setuptools pkg_resources _distutils_hack optree cuda"
)


def imported_names(source: str, module: str, *, is_package: bool = False) -> Iterator[str]:
    """Absolute dotted names that a module imports, anywhere in it, relative imports resolved."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(layer: str, names: Iterator[str]) -> list[str]:
    """Those of the imported names that a module of `layer` must not import."""
    found = []
    for name in names:
        top, _, rest = name.partition(".")
        if top == "medspark":
            target = rest.partition(".")[0]
            inside = target == "configs" or (PACKAGE / target / "__init__.py").exists()
            if target and inside and layer in LAYERS and target not in LAYERS[layer]:
                found.append(name)
        elif layer in THIRD_PARTY and top not in sys.stdlib_module_names | THIRD_PARTY[layer]:
            found.append(name)
        for guarded, home in HOMES.items():
            if f"{name}.".startswith(f"{guarded}.") and layer != home:
                found.append(name)
    return found


def _modules() -> list[tuple[str, str, Path]]:
    listed = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        listed.append((parts[0], ".".join(["medspark", *parts]).removesuffix(".__init__"), path))
    return listed


def test_direction() -> None:
    offenders = []
    for layer, module, path in _modules():
        every = imported_names(path.read_text(), module, is_package=path.name == "__init__.py")
        found = FOUND_AT_RUN_TIME.get(module, set())
        names = (name for name in every if name.partition(".")[0] not in found)
        offenders += [f"{module} imports {name}" for name in violations(layer, names)]
    assert not offenders, "\n".join(offenders)


def test_every_package_has_a_layer() -> None:
    packages = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert packages - {"cli"} == set(LAYERS) & packages


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        ("sparse", "from ..models import spark"),
        ("sparse", "def f():\n    import monai"),
        ("losses", "import numpy"),
        ("data", "from medspark.models.spark import SparK"),
        ("models", "import medspark.cli.main"),
        ("models", "from omegaconf import DictConfig"),
        ("pretrain", "import SimpleITK as sitk"),
        ("finetune", "from monai import transforms"),
        ("cli", "import torchvision.ops"),
    ],
)
def test_checker_finds_wrong_imports(layer: str, line: str) -> None:
    names = imported_names(line, f"medspark.{layer}.module")
    assert violations(layer, names)


@pytest.mark.parametrize(
    ("layer", "line"),
    [
        ("sparse", "import torch.nn.functional as F\nfrom . import mask\nimport math"),
        ("models", "from medspark.sparse import BlockMask\nimport monai.networks.nets"),
        ("pretrain", "from medspark import __version__"),
        ("cli", "import hydra\nfrom medspark.data import store"),
        ("data", "from monai.transforms import Spacingd"),
    ],
)
def test_checker_accepts_right_imports(layer: str, line: str) -> None:
    assert not violations(layer, imported_names(line, f"medspark.{layer}.module"))


def test_sparse_needs_torch_alone() -> None:
    """In a fresh process where any other installed package is out of reach."""
    probe = f"""
import importlib.metadata, sys
allowed = set({TORCH_NEEDS!r}.split()) | {{"medspark"}}
blocked = set(importlib.metadata.packages_distributions()) - allowed - sys.stdlib_module_names
class Gate:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"{{name}} is out of reach", name=name)
assert "monai" not in sys.modules
sys.meta_path.insert(0, Gate())
import medspark.sparse, medspark.losses
import torch
mask = medspark.sparse.BlockMask(torch.ones(1, 2, 2, 2, dtype=torch.bool))
print(mask.visible.sum().item(), len(blocked) > 0)
"""
    run = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[0] == "8"
