"""One launcher, two doors: a `torch.library` op for the compiler, an autograd Function for eager mode.

The library op is what `torch.compile`, `torch.export` and `opcheck` see; the Function costs less
per call. Both run the same launcher, the same set-up of the saved tensors and the same backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from medspark.sparse._ext import native
from medspark.sparse.mask import Level

LIBRARY = torch.library.Library("medspark", "DEF")
_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


class Config:
    """Mix-in of the NamedTuples that hold an op's other arguments: remembers the core's descriptions."""

    def core(self, key: Any, build: Callable[[], Any]) -> Any:
        """What `build` returned for this key, on this object, when first asked.

        The device is part of every key: a description holds addresses, which `build` checked for it.
        """
        cores = self.__dict__
        core = cores.get(key)  # keys are tuples: they cannot be taken for attributes
        if core is None:
            core = cores[key] = build()
        return core


class Saved:
    """What a backward pass is given: saved tensors, the op's other arguments, which gradients it needs."""

    __slots__ = ("config", "needs", "tensors")

    def __init__(self, tensors: tuple[Any, ...], config: Any, needs: tuple[bool, ...]) -> None:
        self.tensors, self.config, self.needs = tensors, config, needs


def define_op(
    schema: str,
    config: Callable[..., Any],
    launcher: Callable[..., Any],
    fake: Callable[..., Any],
    save: Callable[..., tuple[Tensor | None, ...]] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Registers `medspark::<schema>` and returns the function that picks the door.

    Arguments of an op are its tensors and one `config` with all others; the schema lists the fields of the
    config one by one, after the tensors.

    Args:
        schema: of the op, in torch's notation.
        config: NamedTuple type of the other arguments, a `Config`.
        launcher: computes the outputs from the tensors and the config.
        fake: the same for shapes only.
        save: the tensors that the backward needs, from the arguments and the output; None for ops without.
        backward: gradients of the tensors, from a `Saved` and the gradients of the outputs. Only the first
            output of an op is differentiable.
    """
    name = schema.partition("(")[0]
    full, fields = f"medspark::{name}", len(config._fields)  # type: ignore[attr-defined]

    def flat(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: function(*args[:-fields], config(*args[-fields:]))

    LIBRARY.define(schema)
    LIBRARY.impl(full, flat(launcher), "CPU")
    LIBRARY.impl(full, flat(launcher), "CUDA")
    torch.library.register_fake(full, flat(fake), lib=LIBRARY)
    op = getattr(torch.ops.medspark, name)
    if backward is None or save is None:

        def call_plain(*args: Any) -> Any:
            return op(*args[:-1], *args[-1]) if _traced(args[0]) else launcher(*args)

        return call_plain
    _register_autograd(full, config, fields, save, backward)
    # torch's own `apply` looks for functorch transforms first, for a microsecond; kernels refuse those.
    apply = super(torch.autograd.Function, _eager_function(launcher, save, backward)).apply

    def call(*args: Any) -> Any:
        if _traced(args[0]):
            return op(*args[:-1], *args[-1])
        for tensor in args[:-1]:
            if tensor is not None and tensor.requires_grad:
                return apply(*args)
        return launcher(*args)

    return call


def _register_autograd(
    name: str,
    config: Callable[..., Any],
    fields: int,
    save: Callable[..., tuple[Tensor | None, ...]],
    backward: Callable[..., Any],
) -> None:
    """The compiler's door to the backward: tensors of the config are saved as torch wants it."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        rest = inputs[-fields:]
        kept = save(*inputs[:-fields], config(*rest), output)
        if isinstance(output, tuple):
            ctx.mark_non_differentiable(*output[1:])
        tables = [a for a in rest if isinstance(a, Tensor)]
        ctx.save_for_backward(*kept, *tables)
        ctx.kept, ctx.rest = len(kept), [None if isinstance(a, Tensor) else a for a in rest]

    def differentiate(ctx: Any, *grads: Any) -> Any:
        kept, tables = ctx.saved_tensors[: ctx.kept], iter(ctx.saved_tensors[ctx.kept :])
        rest = config(*(next(tables) if a is None else a for a in ctx.rest))
        saved = Saved(kept, rest, ctx.needs_input_grad)
        return (*backward(saved, *grads), *(None,) * fields)

    torch.library.register_autograd(name, differentiate, setup_context=setup_context, lib=LIBRARY)


def _eager_function(
    launcher: Callable[..., Any],
    save: Callable[..., tuple[Tensor | None, ...]],
    backward: Callable[..., Any],
) -> Any:
    """The eager door: as few Python objects per call as possible."""

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = launcher(*args)
            ctx.config = args[-1]
            ctx.save_for_backward(*save(*args, output))
            if type(output) is tuple:
                ctx.mark_non_differentiable(*output[1:])
                ctx.set_materialize_grads(False)
            return output

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grads: Any) -> Any:
            if grads[0] is None:
                return (None,) * len(ctx.needs_input_grad)
            saved = Saved(ctx.saved_tensors, ctx.config, ctx.needs_input_grad)
            return (*backward(saved, *grads), None)

    return Eager


def _traced(first: Tensor) -> bool:
    """Whether shapes are all that counts: in Dynamo, on fake tensors behind it, on the meta device."""
    return type(first) is not Tensor or first.is_meta or torch.compiler.is_compiling()


def code(dtype: torch.dtype) -> int:
    """The core's code of an element type.

    Raises:
        TypeError: the kernels do not know the type.
    """
    if dtype not in _CODES:
        raise TypeError(
            f"medspark kernels take float32, float64, bfloat16 or float16, got {dtype}; "
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
    if tensor.shape != shape and (
        tensor.ndim != len(shape)
        or any(
            want is not None and have != want
            for have, want in zip(tensor.shape, shape, strict=True)
        )
    ):
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if like is not None and tensor.dtype != like.dtype:
        raise TypeError(
            f"{name} must be {like.dtype} like the features, got {tensor.dtype}; cast one of them"
        )
    if like is None or tensor.device != like.device:
        check_device(tensor, name, like)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


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
    if like.is_cpu:
        getattr(native(), kernel)(core, *addresses)
        return
    device = like.device
    size = getattr(native(), kernel + "_workspace", None)
    # Named until after the launch: its memory may be handed out again only behind it on the stream.
    workspace = like.new_empty(size(core), dtype=torch.uint8) if size else None
    scratch = () if workspace is None else (workspace.data_ptr(),)
    stream = torch.cuda.current_stream(device).cuda_stream
    getattr(native(), kernel + "_cuda")(core, *addresses, *scratch, device.index, stream)


def core_level(cells: Tensor, blocks: Tensor, block: Sequence[int], like: Tensor) -> Any:
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
