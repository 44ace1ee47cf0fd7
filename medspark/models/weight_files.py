"""Files of weights, read without running any code of theirs, as names and tensors."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Content of a checkpoint file, read without running any code of it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, compressed (a small file could fill the memory), or it holds more than
            tensors and plain values.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"no checkpoint at {source}")
    _check_stored(source)
    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can raise anything
        raise ValueError(
            f"{source} cannot be read as a checkpoint: it is damaged, or holds more than tensors "
            f"and plain values ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{source} holds a {type(content).__name__}, not a checkpoint")
    return content


def load_content(path: str | os.PathLike[str]) -> dict[str, Any]:
    """As ``load_checkpoint``, and safetensors files; which one it is, its first bytes say.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see ``load_checkpoint``.
        ImportError: a safetensors file, but the package is missing.
    """
    source = Path(path)
    if not source.is_file() or not _is_safetensors(source):
        return load_checkpoint(source)
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"{source} is a safetensors file; reading it needs 'pip install safetensors'"
        ) from error
    try:
        return dict(load_file(source, device="cpu"))
    except Exception as error:
        raise ValueError(
            f"{source} cannot be read as safetensors ({type(error).__name__}: {str(error)[:200]})"
        ) from error


def flat_tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Tensors of nested dicts by their dotted names: ``{"a": {"b.c": t}}`` is ``{"a.b.c": t}``.

    Only string keys count: what lies in lists or below numbers (states of optimisers) is no weight.
    ``_orig_mod.``, which ``torch.compile`` puts into names, is left out.

    Raises:
        ValueError: two tensors of one name.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", content)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            if name in found:
                raise ValueError(f"the file holds two tensors named {name!r}")
            found[name] = value.detach()
        elif isinstance(value, Mapping) and id(value) not in seen:
            seen.add(id(value))  # a pickle can hold itself
            dot = name and name + "."
            items = [
                (dot + key.replace("_orig_mod.", ""), item)
                for key, item in value.items()
                if isinstance(key, str)
            ]
            waiting += reversed(items)  # the order of the file
    return found


def _check_stored(path: Path) -> None:
    """Torch stores without compression, so that a file is as large as what it holds."""
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [i.filename for i in archive.infolist() if i.compress_type]
    except (zipfile.BadZipFile, NotImplementedError):
        return  # an older format, or no checkpoint at all: torch will say so
    if packed:
        raise ValueError(
            f"{path} cannot be read as a checkpoint: {packed[0][:80]!r} in it is compressed, which "
            "torch never does; save it again with torch.save"
        )


def _is_safetensors(path: Path) -> bool:
    """Length of a JSON header in eight bytes, then that header."""
    with path.open("rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return len(start) == 9 and start[8:] == b"{" and 9 <= 8 + length <= path.stat().st_size
