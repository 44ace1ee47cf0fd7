"""Files and functions stay small enough to read in one go."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE, MAX_CUDA_FILE, MAX_FUNCTION = 400, 500, 60
SUFFIXES = {".py", ".h", ".cpp", ".inl", ".cu", ".cuh"}


def test_files() -> None:
    offenders = []
    for folder in ("medspark", "csrc", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix not in SUFFIXES:
                continue
            lines = len(path.read_text().splitlines())
            if lines > (MAX_CUDA_FILE if path.suffix == ".cu" else MAX_FILE):
                offenders.append(f"{path.relative_to(ROOT)}: {lines} lines")
    assert not offenders, "\n".join(offenders)


def _code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring: describing more must not cost anything."""
    first = node.body[0]
    documented = ast.get_docstring(node) is not None
    docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return (node.end_lineno or node.lineno) - node.lineno + 1 - docstring


def test_functions() -> None:
    offenders = []
    for path in sorted((ROOT / "medspark").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = _code_lines(node)
            if lines > MAX_FUNCTION:
                offenders.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines}")
    assert not offenders, "\n".join(offenders)
