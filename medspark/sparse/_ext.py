"""The compiled extension: loading it, and saying why it is not there."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from types import ModuleType

import torch  # noqa: F401  (first, so that the extension shares torch's OpenMP runtime)

_NAME = "medspark._C"


@cache
def load_extension() -> ModuleType | None:
    """The compiled kernels, or None where they were not built.

    Raises:
        ImportError: the extension exists but cannot be loaded; the cause is attached.
    """
    if importlib.util.find_spec(_NAME) is None:
        return None
    try:
        return importlib.import_module(_NAME)
    except ImportError as error:
        raise ImportError(
            f"{_NAME} was built but cannot be loaded: {error}. Rebuild it for this Python with "
            "`pip install --force-reinstall --no-deps .`"
        ) from error


def extension_status() -> str:
    """One line for people: which kernels run, or why there are none."""
    extension = load_extension()
    if extension is None:
        return "not built (no C++ compiler at install time?): pure torch, slow; reinstall with a compiler"
    return f"native, {extension.cpu_kernels()} kernels, {extension.__file__}"


def native() -> ModuleType:
    """The compiled kernels.

    Raises:
        RuntimeError: they were not built.
    """
    extension = load_extension()
    if extension is None:
        raise RuntimeError(f"the native backend of medspark is {extension_status()}")
    return extension


def launches() -> dict[str, int]:
    """Native kernel launches so far, by kernel name. Empty without the extension."""
    extension = load_extension()
    return dict(extension.launches()) if extension else {}


def reset_launches() -> None:
    """Sets every launch count to zero."""
    extension = load_extension()
    if extension:
        extension.reset_launches()
