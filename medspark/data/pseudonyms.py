"""Names for people that say nothing about them: keyed hashes of identifiers, and paths without them.

Without a key, whoever knows all patient numbers of a hospital can hash them and compare; with a
key only who has the key can (HMAC-SHA256, RFC 2104).
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

_SHORTEST = 3  # shorter parts of names, such as initials, would match anything


@dataclass(frozen=True)
class Pseudonyms:
    """Makes pseudonyms; the same text gets the same one under the same key.

    Attributes:
        key: Secret of the site; empty for plain SHA-256.
        hide_paths: Hash every part of a path, not only what is known to identify.
    """

    key: bytes = field(default=b"", repr=False)
    hide_paths: bool = False

    @classmethod
    def from_file(cls, path: Path | str | None, hide_paths: bool = False) -> Pseudonyms:
        """The key is the content of a file, white space at its ends aside; None for no key.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds fewer than 16 characters.
        """
        if path is None:
            return cls(hide_paths=hide_paths)
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file '{path}' with the key of the pseudonyms")
        key = Path(path).read_bytes().strip()
        if len(key) < 16:
            raise ValueError(
                f"the key in '{path}' has {len(key)} characters, it needs 16: "
                "`openssl rand -hex 32` makes one"
            )
        return cls(key, hide_paths)

    def of(self, text: str, length: int = 16) -> str:
        """Hexadecimal digits that stand for a text."""
        data = text.encode("utf-8", "surrogateescape")
        if self.key:
            return hmac.new(self.key, data, hashlib.sha256).hexdigest()[:length]
        return hashlib.sha256(data).hexdigest()[:length]

    def path(
        self, name: str, secrets: Collection[str], others: Collection[str] = frozenset()
    ) -> str:
        """A relative path whose parts that hold one of the secrets are replaced by pseudonyms.

        A part that holds a secret goes as a whole: the rest of it often says more, such as a
        date of birth. The last part keeps its suffix.

        Args:
            name: Path with "/".
            secrets: Patient id and name as in the file, such as "DOE^JANE"; found anywhere.
            others: Words (`words`) of other people of the archive; found as whole words only.
        """
        own = words(secrets)
        parts = name.split("/")
        hidden = [
            self.hide_paths
            or any(word in _plain(part) for word in own)
            or any(word.casefold() in others for word in re.split(r"[\W_]+", part))
            for part in parts
        ]
        return "/".join(self._hide(p) if h else p for p, h in zip(parts, hidden, strict=True))

    def _hide(self, part: str) -> str:
        stem, mark, rest = part.partition("#")
        suffix = re.search(
            r"(\.nii\.gz|\.nii|\.nrrd|\.mha|\.mhd|\.dcm|\.ima)$", stem, re.IGNORECASE
        )
        return self.of(f"path:{stem}", 12) + (suffix.group(0) if suffix else "") + mark + rest


def words(secrets: Collection[str]) -> frozenset[str]:
    """What to look for: every secret as a whole and in parts, letters and digits only."""
    found = {w for s in secrets for w in (_plain(s), *map(_plain, re.split(r"[\^=\s,]+", s)))}
    return frozenset(w for w in found if len(w) >= _SHORTEST)


def _plain(text: str) -> str:
    """Letters and digits only, so that DOE^JANE is found in doe_jane."""
    return re.sub(r"[\W_]+", "", text).casefold()
