"""What counts as a regression, and the exit code."""

from __future__ import annotations

import sys
from typing import Any

import compare
import harness
import pytest


def row(ms: float, iqr: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"status": "ok", "median_ms": ms, "iqr_ms": iqr, **more}


ERROR = {"status": "error", "reason": "RuntimeError"}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (row(10), row(10.4), "same"),
        (row(10), row(10.6), "regression"),
        (row(10), row(9.4), "better"),
        (row(10, 1.0), row(11.4, 0.0), "same"),  # 1 + 0.05 + 0.1
        (row(10, 1.0), row(11.6, 0.0), "regression"),
        (row(10, 0.6), row(11.4, 0.912), "same"),  # spreads 0.06 and 0.08 make 0.10
        (row(10, 0.6), row(11.6, 0.928), "regression"),
        (row(10, roof_share=0.8), row(20, roof_share=0.8), "same"),  # a slower day
        (row(10, roof_share=0.8), row(10, roof_share=0.7), "regression"),
        (row(10, roof_share=0.8), row(10, vs_dense=2.0), "same"),  # by what both have
        (row(10), ERROR, "lost"),
        (row(10), None, "lost"),
        (ERROR, row(10), "fixed"),
        (None, row(10), "new"),
        (ERROR, ERROR, "error"),
        ({"status": "ok"}, {"status": "ok"}, "not comparable"),
    ],
)
def test_verdicts(old, new, expected) -> None:
    assert compare.verdict(old, new, 0.05)["verdict"] == expected


def test_judged_by_what_was_asked_for() -> None:
    old, new = row(10, roof_share=0.8), row(20, roof_share=0.8)
    found = compare.verdict(old, new, 0.05, by="median_ms")
    assert (found["by"], found["verdict"], found["worse"]) == ("median_ms", "regression", 2.0)
    other = compare.verdict(
        {"overhead_us": 5.0}, {"overhead_us": 8.0, "relative_spread": 0.1}, 0.05
    )
    assert (other["verdict"], other["limit"]) == ("regression", pytest.approx(1.15))


def run(tmp_path, monkeypatch, old: list[Any], new: list[Any], *options: str) -> int:
    paths = []
    for name, rows in (("old", old), ("new", new)):
        folder = tmp_path / name
        paths.append(harness.write_record("conv3d", rows, folder, ("workload", "engine")))
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, paths), *options])
    return compare.main()


def test_exit_codes(tmp_path, monkeypatch, capsys) -> None:
    native = {"workload": "W1", "engine": "native"}
    dense = {"workload": "W1", "engine": "dense"}
    good, bad = native | row(10), native | row(12)
    call = lambda *args: run(tmp_path, monkeypatch, *args)  # noqa: E731
    assert call([good], [good]) == 0
    assert call([good], [bad]) == 1
    assert "1 regression" in capsys.readouterr().out
    assert call([good], [bad], "--margin", "0.3") == 0
    assert call([good, dense | row(1)], [good, dense | row(9)]) == 0  # whose code is not ours
    assert call([good, dense | row(1)], [good, dense | row(9)], "--engines", "dense") == 1
    other = {"workload": "W2", "engine": "native"} | row(1)
    assert call([good, other], [good]) == 1
    assert call([good, other], [good], "--allow-missing") == 0
    assert call([good], [other]) == 1  # lost
    assert call([good], [good, other]) == 0
    assert call([native | ERROR], [native | ERROR]) == 2  # nothing was compared


def test_records_that_cannot_be_compared() -> None:
    env: dict[str, Any] = {"environment": {}}
    with pytest.raises(ValueError, match="identifies"):
        compare.compare(env | {"rows": []}, env | {"rows": []})
    twice = env | {"identity": ["engine"], "rows": [{"engine": "native"}, {"engine": "native"}]}
    with pytest.raises(ValueError, match="two rows"):
        compare.compare(twice, twice)
    other = env | {"identity": ["function"], "rows": []}
    with pytest.raises(ValueError, match="differently"):
        compare.compare(twice, other)
