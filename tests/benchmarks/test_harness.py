"""Rounds, samples and records."""

from __future__ import annotations

import json
import math

import harness
import pytest
from harness import Sample


@pytest.fixture
def clock(monkeypatch):
    """Samples that are dictated: (ms, cores of others), one after the other."""
    script: list[Sample] = []
    taken: list[int] = []

    def take(run, calls):
        run()
        taken.append(calls)
        return script.pop(0)

    monkeypatch.setattr(harness, "take_sample", take)
    return script, taken


def test_engines_take_turns_and_an_error_is_a_row() -> None:
    order: list[str] = []

    def broken() -> None:
        order.append("broken")
        if len(order) > 4:
            raise KeyError("torch.bfloat16")

    rows = harness.time_interleaved(
        {"a": lambda: order.append("a"), "broken": broken, "b": lambda: order.append("b")},
        rounds=3,
        between=lambda: order.append("|"),
    )
    assert order[:12] == ["a", "broken", "b", "|", "a", "broken", "b", "|", "a", "b", "|", "a"]
    assert rows["broken"] == {"status": "error", "reason": "KeyError: 'torch.bfloat16'"}
    assert len(rows["a"]["times_ms"]) == len(rows["b"]["times_ms"]) == 3


def test_samples_are_long_enough_and_warm_up_does_not_count(clock) -> None:
    script, taken = clock
    script += [Sample(8.0, 0), Sample(3.0, 0), Sample(1.0, 0), Sample(2.0, 0)]
    row = harness.time_interleaved({"a": int}, rounds=3, sample_ms=20)["a"]
    assert taken == [1, 3, 3, 3]
    assert row["times_ms"] == [3.0, 1.0, 2.0]
    assert (row["median_ms"], row["q1_ms"], row["q3_ms"], row["iqr_ms"]) == (2.0, 1.5, 2.5, 1.0)


def test_disturbed_samples_are_taken_again(clock) -> None:
    script, _ = clock
    script += [Sample(9, 0), Sample(5, 1.0), Sample(4, 0.5), Sample(6, 0.9)]  # retakes used up
    script += [Sample(3, 1.0), Sample(2, 0.1)]  # quiet at the second go
    row = harness.time_interleaved({"a": int}, rounds=2, retakes=2)["a"]
    assert row["times_ms"] == [4, 2]
    assert row["others"] == 0.3
    assert not script


def test_records_come_back(tmp_path) -> None:
    rows = [{"engine": "native", "status": "ok", "median_ms": 1.5, "ratio": math.nan}]
    path = harness.write_record("conv3d", rows, tmp_path, ("engine",), roof=[{"threads": 1}])
    record = harness.read_record(path)
    assert record["rows"] == [{**rows[0], "ratio": None}]
    assert (record["name"], record["identity"]) == ("conv3d", ["engine"])
    assert record["roof"] == [{"threads": 1}]
    env = record["environment"]
    assert env["schema"] == harness.SCHEMA
    assert env["threads"] > 0
    assert len(env["load_before"]) == len(env["load_after"]) == 3
    assert str(tmp_path) not in path.read_text()


def test_a_record_that_fails_leaves_nothing(tmp_path) -> None:
    with pytest.raises(TypeError):
        harness.write_record("conv3d", [{"bad": object()}], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}'])
def test_what_is_no_record(tmp_path, text) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="record"):
        harness.read_record(path)


def test_one_sample_has_no_spread() -> None:
    assert harness.spread([2.0]) == {"median_ms": 2.0, "q1_ms": 2.0, "q3_ms": 2.0, "iqr_ms": 0.0}


def test_committed_records_are_json() -> None:
    for path in harness.RESULTS.glob("*.json"):
        assert json.loads(path.read_text())["rows"], path.name
