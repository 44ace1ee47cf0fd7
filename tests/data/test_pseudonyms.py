from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import pytest

from medspark.data.pseudonyms import Pseudonyms, words

KEYED = Pseudonyms(b"0123456789abcdef")


def test_keyed_and_plain() -> None:
    assert Pseudonyms().of("abc", 64) == hashlib.sha256(b"abc").hexdigest()
    wanted = hmac.new(b"0123456789abcdef", b"abc", hashlib.sha256).hexdigest()
    assert KEYED.of("abc", 12) == wanted[:12]
    assert "0123" not in repr(KEYED)


def test_key_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("0123456789abcdef\n")
    assert Pseudonyms.from_file(path) == KEYED
    assert Pseudonyms.from_file(None) == Pseudonyms()
    path.write_text("short")
    with pytest.raises(ValueError, match="it needs 16"):
        Pseudonyms.from_file(path)
    with pytest.raises(FileNotFoundError, match="key of the pseudonyms"):
        Pseudonyms.from_file(tmp_path / "none")


@pytest.mark.parametrize(
    "part", ["DOE_JANE", "jane-doe 1961", "Doe, Jane", "x-DOEJANE", "mrn-47.11", "4711MRN4711"]
)
def test_parts_that_identify(part: str) -> None:
    shown = KEYED.path(f"ct/{part}/scan 3", ["DOE^JANE", "MRN-4711"])
    assert shown == f"ct/{KEYED.of('path:' + part, 12)}/scan 3"


def test_suffix_and_series_mark_stay() -> None:
    name = Pseudonyms().path("a/doe.NII.GZ", ["Doe"])
    assert name == f"a/{Pseudonyms().of('path:doe.NII.GZ', 12)}.NII.GZ"
    assert Pseudonyms().path("doe#12ab", ["Doe"]).endswith("#12ab")


def test_what_says_nothing_stays() -> None:
    """Initials and empty ids would match anything."""
    assert Pseudonyms().path("ct/a.nii", ["a", "", "^", "A^C"]) == "ct/a.nii"


def test_other_people_as_whole_words() -> None:
    """A file that holds no tags may still bear the name of somebody whose other files do."""
    others = words(["DOE^JANE", "MRN-4711"])
    assert others == {"doejane", "doe", "jane", "mrn4711"}
    for name in ("doe_1.nii", "scan of Jane.nii", "mrn4711.nii"):
        assert KEYED.path(name, [], others) == KEYED.of("path:" + name, 12) + ".nii"
    assert KEYED.path("does/janet.nii", [], others) == "does/janet.nii"


def test_hide_all() -> None:
    shown = Pseudonyms(hide_paths=True).path("ct/a.nii", [])
    assert shown.endswith(".nii") and "ct" not in shown.split("/")[0]
