"""What `medspark info` says when something is missing or broken."""

from __future__ import annotations

import json

import pytest

from medspark.cli import info
from medspark.sparse import _ext


def test_missing_packages_are_named_not_hidden() -> None:
    versions = info.package_versions()
    assert set(versions) == {"medspark", "python", *info.PACKAGES.values()}
    assert versions["torch"] is not None
    rows = info._rows({**info.collect(), "versions": {"spconv": None}})
    assert rows["spconv"] == "not installed"


def test_extension_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ext, "load_extension", lambda: None)
    monkeypatch.setattr(_ext, "extension_status", lambda: "not built (no compiler)")
    report = info.native_extension()
    assert report == {"available": False, "broken": False, "status": "not built (no compiler)"}
    assert info._native_rows(report) == {"native extension": "no: not built (no compiler)"}


def test_broken_extension_is_reported_with_its_cause_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ImportError("undefined symbol: _Z3foov")

    monkeypatch.setattr(_ext, "load_extension", broken)
    assert info.main(["--json"]) == 1
    assert "undefined symbol: _Z3foov" in json.loads(capsys.readouterr().out)["native"]["status"]
