"""Repair of a gap in Dynamo, made when it first meets a sparse tensor.

Dynamo looks for `__torch_function__` in lists of arguments but not in tuples (seen in torch 2.13), so
`torch.cat((x, y), 1)` would join the packed memory of two sparse tensors without asking them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any


@cache
def look_into_tuples() -> None:
    """Lets Dynamo find tensors of ours in tuples of arguments too."""
    from torch._dynamo.variables import torch_function
    from torch._dynamo.variables.lists import TupleVariable

    found = getattr(torch_function, "_flatten_vts", None)
    if (
        found is None
    ):  # rewritten since; tests/sparse/test_machinery.py says whether it is right now
        return

    def flatten(arguments: Iterable[Any]) -> list[Any]:
        leaves: list[Any] = []
        for argument in found(arguments):
            if argument.is_realized() and isinstance(argument, TupleVariable):
                leaves += flatten(argument.items)
            else:
                leaves.append(argument)
        return leaves

    torch_function._flatten_vts = flatten  # type: ignore[assignment]


def while_tracing() -> None:
    """The same from code that Dynamo reads: it runs this call instead, and takes its result as known."""
    look_into_tuples()


while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]
