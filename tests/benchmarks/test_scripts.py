"""The scripts from end to end on tiny problems: rows, goals, errors, pictures, help."""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from typing import Any

import adapters
import bench_all
import bench_conv3d
import bench_encoder
import bench_norm_pool
import goals
import harness
import pytest
import roofline
import torch
from roof import Roof, count_pairs
from torch import nn
from workloads import Workload

from medspark.sparse import BlockMask
from medspark.sparse._ext import load_extension

pytestmark = pytest.mark.skipif(load_extension() is None, reason="the kernels are not built")
SCRIPTS = [
    "bench_all", "bench_conv3d", "bench_norm_pool", "bench_encoder", "bench_overhead",
    "bench_memory", "bench_data", "compare", "roofline",
]  # fmt: skip
TINY = Workload("tiny", 8, 4, 8, 8, kind="3x3x3, blocks 4")


@pytest.fixture
def small_copy(monkeypatch) -> None:
    monkeypatch.setattr("roof.COPY_BYTES", 2**16)


@pytest.fixture
def args() -> Namespace:
    return Namespace(
        rounds=2, sample_ms=0.0, retakes=0, device="cpu", passes=["forward", "backward"],
        engines=["native", "dense", "dense channels_last", "halo"],
    )  # fmt: skip


def rows_of(args: Namespace) -> list[dict[str, Any]]:
    return bench_conv3d.measure_case(
        TINY, 0.5, "float32", args, Roof(threads=torch.get_num_threads(), seconds=0.001)
    )


def test_conv3d_rows(small_copy, args) -> None:
    rows = rows_of(args)
    assert len(rows) == 8
    assert {row["status"] for row in rows} == {"ok"}
    native = rows[0]
    assert native["launches"] == {"conv3d": 1}
    assert native["error"] < 1e-6
    dense = min(r["median_ms"] for r in rows[1:3])
    assert native["vs_dense"] == pytest.approx(dense / native["median_ms"])
    assert native["gflops"] == pytest.approx(native["flops"] / native["median_ms"] / 1e6)
    assert native["roof_share"] == pytest.approx(native["roof_ms"] / native["median_ms"])
    assert native["goals"]["vs_dense"] == pytest.approx(0.9 * native["ceiling"])
    assert "vs_peer" not in native


def test_an_engine_that_breaks_is_a_row(small_copy, args, monkeypatch) -> None:
    def broken(self, x, weight):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(adapters.DenseLast, "call", broken)
    args.engines = ["native", "dense channels_last", "torchsparse"]
    monkeypatch.setitem(sys.modules, "torchsparse", None)
    rows = {(r["engine"], r["pass"]): r for r in rows_of(args)}
    assert len(rows) == 6
    assert rows["dense channels_last", "forward"]["reason"] == "RuntimeError: out of memory"
    assert rows["torchsparse", "backward"]["status"] == "error"
    assert rows["native", "backward"]["status"] == "ok"


def test_an_engine_on_fewer_threads_is_no_measure() -> None:
    two = {
        "native": {"about": {}, "median_ms": 1.0},
        "spconv": {"about": {"threads": 99}, "median_ms": 5.0},
        "minkowski": {"about": {}, "median_ms": 8.0},
    }
    bench_conv3d.compare_engines(two)
    assert two["native"]["vs_peer"] == 8.0


def test_goals() -> None:
    row = {"dtype": "float32", "hidden": 0.6, "ceiling": 3.0, "roof_share": 0.7, "vs_dense": 2.8}
    asked = goals.conv_goals(Workload("W1", 96, 32, 32, 32, kind="3x3x3, blocks 32 to 8"), row)
    assert asked == {
        "roof_share": 0.85,
        "vs_dense": pytest.approx(2.7),
        "vs_halo": 1.15,
        "vs_peer": 5.0,
    }
    goals.judge(row, asked)
    assert row["missed"] == ["roof_share 0.70 < 0.85"]
    unmasked = goals.conv_goals(TINY, {**row, "hidden": 0.0})
    assert unmasked == {"roof_share": 0.75, "vs_dense": 0.9}


def test_thread_gains() -> None:
    base = {"workload": "W", "hidden": 0.6, "dtype": "float32", "pass": "forward"}
    rows = [
        base | {"engine": "native", "bound": "compute", "threads": n, "median_ms": ms}
        for n, ms in ((1, 10.0), (2, 5.0))
    ]
    (gain,) = bench_conv3d.thread_gains([*rows, {**rows[0], "bound": "memory", "pass": "other"}])
    assert (gain["gain"], gain["met"]) == (2.0, True)


@pytest.mark.parametrize("name", list(bench_norm_pool.FUNCTIONS))
def test_norm_pool_rows(small_copy, args, name) -> None:
    args.hidden, function = [0.5], bench_norm_pool.FUNCTIONS[name]
    case = bench_norm_pool.Case(8, 4, 16, 0.5, args, "float32")
    for which in ("forward", "backward") if function.backward else ("forward",):
        rows = bench_norm_pool.measure(
            case, name, which, args, Roof(threads=torch.get_num_threads(), seconds=0.001)
        )
        assert [r["status"] for r in rows] == ["ok"] * (3 if function.dense else 1)
        assert rows[0].get("error", 0.0) < 1e-5
        packed = 4 * 8**3 // 2 * 16  # bytes of the volume
        if name in ("batch_norm", "relu"):
            times = {"batch_norm": (3, 5), "relu": (2, 3)}[name][which == "backward"]
            assert rows[0]["moved_bytes"] == times * packed


def test_flops_of_a_network() -> None:
    case = bench_encoder.Case.__new__(bench_encoder.Case)
    case.net = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 6, 3, stride=2, padding=1)
    )
    case.mask = BlockMask.random(1, (2, 2, 2), 0.5, torch.Generator().manual_seed(0))
    case.x = torch.randn(1, 1, 8, 8, 8)
    fine, coarse = case.mask.level((8, 8, 8)), case.mask.level((4, 4, 4))
    first = 2 * 4 * count_pairs(fine, fine, 3)
    second = 2 * 4 * 6 * count_pairs(fine, coarse, 3, 2)
    found = case.flops()
    assert found["forward"] == first + second
    assert found["step"] == 2 * first + 3 * second  # the volume needs no gradient
    assert found["dense forward"] == 2 * 27 * (4 * 8**3 + 4 * 6 * 4**3)


def test_roofline_is_drawn(small_copy, args, tmp_path) -> None:
    roof = Roof(threads=torch.get_num_threads(), seconds=0.001)
    rows = bench_conv3d.measure_case(TINY, 0.5, "float32", args, roof)
    about = {"identity": bench_conv3d.IDENTITY, "roof": [roof.record()]}
    record = harness.read_record(harness.write_record("conv3d", rows, tmp_path, **about))
    target = tmp_path / "roof.png"
    roofline.draw(record, "forward", None, target)
    assert target.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="no row"):
        roofline.draw(record, "grad_input", None, target)
    with pytest.raises(ValueError, match="no roof"):
        roofline.draw({**record, "roof": []}, "forward", None, target)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".png"}


def test_lines_of_the_common_table() -> None:
    row = {
        "workload": "W1", "engine": "native", "status": "ok", "median_ms": 2.0, "hidden": 0.6,
        "roof_share": 0.5, "short": "met", "threads": 1,
    }  # fmt: skip
    line = bench_all.line("conv3d", row)
    assert (line["what"], line["median"], line["unit"]) == ("W1 60% hidden", 2.0, "ms")
    assert (line["of roof"], line["goals"]) == (0.5, "met")
    assert bench_all.wanted(row)
    assert not bench_all.wanted({**row, "engine": "dense"})
    assert not bench_all.wanted({"volume": "phantom 0"})
    failed = bench_all.line("memory", {"network": "N", "status": "error", "reason": "too big"})
    assert failed["status"] == "error: too big"


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_teaches(name, monkeypatch, capsys) -> None:
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as exit_code:
        module.main()
    text = capsys.readouterr().out
    assert exit_code.value.code == 0
    assert f"benchmarks/{name}.py" in text, "examples"
    assert "--only" in text or name == "roofline"
