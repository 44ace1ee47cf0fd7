"""One launcher, two doors: a `torch.library` op for the compiler, an autograd Function for eager mode.

The library op is what `torch.compile`, `torch.export` and `opcheck` see; the Function costs less
per call. Both run the same launcher, the same set-up of the saved tensors and the same backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
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
    save, differentiate = setup_context, backward

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = launcher(*args)
            save(ctx, args, output)
            return output

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grads: Any) -> Any:
            return differentiate(ctx, *grads)

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


def check(
    tensor: Tensor, name: str, shape: tuple[int | None, ...], like: Tensor | None = None
) -> Tensor:
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
    check_device(tensor, name, like)
    return tensor.contiguous()


def check_device(tensor: Tensor, name: str, like: Tensor | None = None) -> None:
    """Checks that kernels can read an argument, on the device of `like`.

    Raises:
        RuntimeError: another device, or one for which this build has no kernels.
    """
    device = tensor.device
    if like is not None and device != like.device:
        raise RuntimeError(f"{name} must be on {like.device}, got {device}")
    if device.type == "cpu" or (device.type == "cuda" and has_cuda()):
        return
    rebuild = "rebuild medspark where nvcc is found (MEDSPARK_CUDA=ON), or "
    cure = rebuild if device.type == "cuda" else ""
    raise RuntimeError(
        f"{name} is on {device}: this build has no kernel of the op for it; "
        f"{cure}use medspark.sparse.use_backend('reference')"
    )


@cache
def has_cuda() -> bool:
    """Whether the CUDA kernels were compiled in."""
    return bool(native().build_info()["with_cuda"])


def launch(kernel: str, core: Any, like: Tensor, *addresses: int) -> None:
    """Runs a kernel of the core where `like` lives: on the CPU, or on the current stream of its GPU.

    On a GPU the kernel's scratch memory comes from torch's allocator, and launches are counted under
    the name with `_cuda` behind it.

    Args:
        kernel: name in the core, for example `conv3d`.
        core: the core's description of the op.
        like: a tensor on the device.
        addresses: of the op's tensors, all on that device; 0 for an absent one.
    """
    device = like.device
    if device.type == "cpu":
        getattr(native(), kernel)(core, *addresses)
        return
    size = getattr(native(), kernel + "_workspace", None)
    # Named until after the launch: its memory may be handed out again only behind it on the stream.
    workspace = like.new_empty(size(core), dtype=torch.uint8) if size else None
    scratch = () if workspace is None else (workspace.data_ptr(),)
    stream = torch.cuda.current_stream(device).cuda_stream
    getattr(native(), kernel + "_cuda")(core, *addresses, *scratch, device.index, stream)


def core_level(
    cells: Tensor, blocks: Tensor, block: tuple[int, ...] | list[int], like: Tensor
) -> Any:
    """The core's description of a level on the device of `like`; the tensors must outlive it.

    Raises:
        TypeError: wrong dtype. RuntimeError: wrong device.
    """
    batch, *grid = cells.shape
    if cells.dtype != torch.int32 or blocks.dtype != torch.int32:
        raise TypeError("level tables must be int32")
    if not cells.device == blocks.device == like.device:
        raise RuntimeError(
            f"the mask's tables are on {cells.device}, the features on {like.device}; "
            "move the mask with mask.to(device)"
        )
    return native().Level(
        cells.data_ptr(), blocks.data_ptr(), blocks.shape[0], batch, tuple(grid), tuple(block)
    )


def core_window(kernel: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    """The core's description of a sliding window, three numbers (z, y, x) each.

    Raises:
        ValueError: a kernel, stride or dilation below 1, or a padding below 0.
    """
    if min(*kernel, *stride, *dilation) < 1 or min(padding) < 0:
        raise ValueError(
            "kernel, stride and dilation must be at least 1 and padding at least 0, got "
            f"{kernel}, {stride}, {dilation} and {padding}"
        )
    return native().Window(tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))


def tables(level: Level) -> tuple[Tensor, Tensor]:
    """The two tables of a level, as ops take them."""
    return level.cells, level.blocks


def core_starts(starts: Tensor, like: Tensor) -> int:
    """Address of the first row of each segment, checked; the tensor must outlive its use.

    Raises:
        TypeError: wrong dtype. RuntimeError: wrong device.
    """
    if starts.dtype != torch.int64:
        raise TypeError(f"starts must be int64, got {starts.dtype}")
    if starts.device != like.device:
        raise RuntimeError(f"starts must be on {like.device}, got {starts.device}")
    return starts.data_ptr()


def threads() -> int:
    """Threads the core may use: those of torch."""
    return torch.get_num_threads()
