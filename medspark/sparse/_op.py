"""One launcher, two doors: a `torch.library` op for the compiler, an autograd Function for eager mode.

The library op is what `torch.compile`, `torch.export` and `opcheck` see; the Function costs a fifth of it
per call. Both run the same launcher, the same set-up of the saved tensors and the same backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from medspark.sparse._ext import native
from medspark.sparse.mask import Level

LIBRARY = torch.library.Library("medspark", "DEF")
_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


def define_op(
    schema: str,
    launcher: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Registers `medspark::<schema>` and returns the function that picks the door.

    Args:
        schema: of the op, in torch's notation.
        launcher: computes the outputs from the arguments.
        fake: the same for shapes only.
        setup_context: saves for the backward, as in `torch.library.register_autograd`.
        backward: gradients of all arguments; None for ops without one.
    """
    name = "medspark::" + schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, launcher, "CPU")
    LIBRARY.impl(name, launcher, "CUDA")
    torch.library.register_fake(name, fake, lib=LIBRARY)
    op = getattr(torch.ops.medspark, schema.partition("(")[0])
    if backward is None or setup_context is None:

        def call_plain(*args: Any) -> Any:
            return op(*args) if _traced(args[0]) else launcher(*args)

        return call_plain
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=LIBRARY)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = launcher(*args)
            setup_context(ctx, args, output)
            return output

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    def call(*args: Any) -> Any:
        return op(*args) if _traced(args[0]) else Eager.apply(*args)

    return call


def _traced(first: Tensor) -> bool:
    """Whether a compiler is looking: inside Dynamo, or on fake and functional tensors behind it."""
    return torch.compiler.is_compiling() or type(first) is not Tensor


def code(dtype: torch.dtype) -> int:
    """The core's code of an element type.

    Raises:
        TypeError: the kernels do not know the type.
    """
    if dtype not in _CODES:
        raise TypeError(
            f"medspark kernels take float32, float64 or bfloat16, got {dtype}; "
            "cast the input, or use medspark.sparse.use_backend('reference')"
        )
    return _CODES[dtype]


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The type in which the core accumulates: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check(tensor: Tensor, name: str, shape: tuple[int | None, ...], like: Tensor | None = None) -> Tensor:
    """Checks an argument before its address is taken, and makes it contiguous.

    Args:
        tensor: the argument.
        name: for messages.
        shape: expected shape, None where any size goes.
        like: tensor whose dtype and device must match.

    Raises:
        ValueError: wrong shape. TypeError: wrong dtype. RuntimeError: wrong device.
    """
    if tensor.ndim != len(shape) or any(
        want is not None and have != want for have, want in zip(tensor.shape, shape, strict=True)
    ):
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if like is not None and tensor.dtype != like.dtype:
        raise TypeError(f"{name} must be {like.dtype}, got {tensor.dtype}")
    if tensor.device != (like.device if like is not None else tensor.device):
        raise RuntimeError(f"{name} must be on {like.device}, got {tensor.device}")  # type: ignore[union-attr]
    if tensor.device.type != "cpu":
        raise RuntimeError(
            f"{name} is on {tensor.device}: this build has no kernel of the op for it; "
            "use medspark.sparse.use_backend('reference')"
        )
    return tensor.contiguous()


def core_level(cells: Tensor, blocks: Tensor, block: tuple[int, ...] | list[int]) -> Any:
    """The core's description of a level; the tensors must outlive it."""
    batch, *grid = cells.shape
    if cells.dtype != torch.int32 or blocks.dtype != torch.int32:
        raise TypeError("level tables must be int32")
    return native().Level(
        cells.data_ptr(), blocks.data_ptr(), blocks.shape[0], batch, tuple(grid), tuple(block)
    )


def tables(level: Level) -> tuple[Tensor, Tensor]:
    """The two tables of a level, as ops take them."""
    return level.cells, level.blocks


def threads() -> int:
    """Threads the core may use: those of torch."""
    return torch.get_num_threads()
