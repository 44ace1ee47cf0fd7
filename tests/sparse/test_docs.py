"""docs/sparse.md says nothing that does not run."""

from __future__ import annotations

import re
from pathlib import Path

from medspark.sparse.tensor import BlockSparseTensor

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sparse.md"


def test_examples_run() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:  # one after the other, as a reader would
        exec(compile(block, PAGE.name, "exec"), names)
    kept = {name: type(names[name]) for name in ("y", "part", "hidden", "there")}
    assert set(kept.values()) == {BlockSparseTensor}
