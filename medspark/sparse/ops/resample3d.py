"""Separable linear resampling between two levels (`csrc/include/medspark/resample3d.h`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from medspark.sparse import reference
from medspark.sparse._backend import current_backend
from medspark.sparse._ext import native
from medspark.sparse._op import (
    Config,
    Saved,
    accumulation,
    check,
    code,
    core_level,
    define_op,
    launch,
    tables,
    threads,
)
from medspark.sparse.mask import Level
from medspark.sparse.tensor import BlockSparseTensor

Mode = Literal["nearest", "nearest-exact", "linear"]
_MODES = ("nearest", "nearest-exact", "linear")
_ARGS = (
    "Tensor in_cells, Tensor in_blocks, int[] in_block, "
    "Tensor out_cells, Tensor out_blocks, int[] out_block, "
    "str mode, bool align_corners, float[] scales, bool transposed"
)


class _Fields(NamedTuple):
    in_cells: Tensor
    in_blocks: Tensor
    in_block: Sequence[int]
    out_cells: Tensor
    out_blocks: Tensor
    out_block: Sequence[int]
    mode: Mode
    align_corners: bool
    scales: Sequence[float]
    transposed: bool


class Resampling(_Fields, Config):
    """From which level to which other, and how: as in torch, or transposed for the gradient."""

    def transpose(self) -> Resampling:
        """The gradient's way back."""
        return Resampling(*self[3:6], *self[:3], *self[6:9], not self.transposed)


def _nearest(
    inside: int, outside: int, exact: bool, ratio: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Source index and weight of each output, with torch's roundings (its CPU fuses `* ratio - 0.5`)."""
    o = torch.arange(outside, dtype=torch.float64, device="cpu")
    step = torch.tensor(ratio, dtype=dtype, device="cpu").double()
    at = (step * (o + 0.5) - 0.5).to(dtype) + 0.5 if exact else (step * o).to(dtype)
    index = at.float().floor().long().clamp(max=inside - 1)
    return index[:, None], torch.ones(outside, 1, dtype=dtype, device="cpu")


def _linear(
    inside: int, outside: int, align_corners: bool, ratio: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Both source indices and weights of each output, in torch's precision."""
    o = torch.arange(outside, dtype=dtype, device="cpu")
    if inside == outside:  # torch copies, even if the scale says otherwise
        return o.long()[:, None], torch.ones(outside, 1, dtype=dtype, device="cpu")
    if align_corners:
        ratio = (inside - 1) / (outside - 1) if outside > 1 else 0.0
    step = torch.tensor(ratio, dtype=dtype, device="cpu")
    at = step * o if align_corners else (step * (o + 0.5) - 0.5).clamp(min=0)
    low = at.float().floor().long().clamp(max=inside - 1)
    high = (low + 1).clamp(max=inside - 1)
    share = (at - low).clamp(0, 1) * (high > low)
    return torch.stack([low, high], 1), torch.stack([1 - share, share], 1)


@lru_cache(maxsize=1024)
def axis_table(
    inside: int,
    outside: int,
    mode: Mode,
    align_corners: bool,
    scale: float,
    transposed: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sources of each output coordinate along one axis, as `torch.nn.functional.interpolate` has them.

    Args:
        inside: voxels of the input.
        outside: voxels of the output.
        mode: kind of interpolation.
        align_corners: for "linear".
        scale: outputs per input, the one given to torch; 0: derived from the sizes.
        transposed: the table of the gradient instead: `inside` rows of output coordinates.
        dtype: of the weights.
        device: of the tables.

    Returns:
        start int32 `[rows + 1]`, index int32 and weight, both in the order of the rows.
    """
    ratio = 1.0 / scale if scale > 0 else inside / outside
    if mode == "linear":
        index, weight = _linear(inside, outside, align_corners, ratio, dtype)
    else:
        index, weight = _nearest(inside, outside, mode == "nearest-exact", ratio, dtype)
    used = weight != 0
    row = torch.arange(outside, device="cpu")[:, None].expand_as(index)[used]
    index, weight = index[used], weight[used]
    if transposed:
        order = index.argsort(stable=True)
        row, index, weight = index[order], row[order], weight[order]
    counts = torch.bincount(row, minlength=inside if transposed else outside)
    start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return start.to(device, torch.int32), index.to(device, torch.int32), weight.to(device)


def _axes(x: Tensor, r: Resampling) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The three axes' tables; they must outlive the launch.

    Raises:
        ValueError: unknown mode, or not three scales.
    """
    if r.mode not in _MODES or len(r.scales) != 3:
        raise ValueError(f"resampling knows {_MODES} and three scales, got {r.mode} and {r.scales}")
    if r.in_cells.shape[0] != r.out_cells.shape[0]:
        raise ValueError(
            "both levels must have the same batch, got "
            f"{r.in_cells.shape[0]} and {r.out_cells.shape[0]}"
        )
    sizes = [
        [g * n for g, n in zip(cells.shape[1:], block, strict=True)]
        for cells, block in ((r.in_cells, r.in_block), (r.out_cells, r.out_block))
    ]
    inner, outer = reversed(sizes) if r.transposed else sizes
    kind = (accumulation(x.dtype), x.device)
    return [
        axis_table(n, m, r.mode, r.align_corners, scale, r.transposed, *kind)
        for n, m, scale in zip(inner, outer, r.scales, strict=True)
    ]


def _core(x: Tensor, how: Resampling) -> Any:
    return how.core((x.dtype, x.device, x.shape[-1], threads()), lambda: _build_core(x, how))[0]


def _build_core(x: Tensor, how: Resampling) -> tuple[Any, Any]:
    """The core's description, and the tables whose addresses it holds."""
    axes = _axes(x, how)
    core = native().Resample3d(
        code(x.dtype),
        core_level(how.in_cells, how.in_blocks, how.in_block, x),
        core_level(how.out_cells, how.out_blocks, how.out_block, x),
        [[t.data_ptr() for t in axis] for axis in axes],
        x.shape[-1],
        threads(),
    )
    return core, axes


def _resample(x: Tensor, how: Resampling) -> Tensor:
    x = check(x, "interpolate: features", (how.in_blocks.shape[0], *how.in_block, x.shape[-1]))
    y = _resample_fake(x, how)
    launch("resample3d", _core(x, how), x, x.data_ptr(), y.data_ptr())
    return y


def _resample_fake(x: Tensor, how: Resampling) -> Tensor:
    return x.new_empty(how.out_blocks.shape[0], *how.out_block, x.shape[-1])


def _resample_save(x: Tensor, how: Resampling, y: Tensor) -> tuple[Tensor | None, ...]:
    return ()


def _resample_backward(saved: Saved, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (resample3d_op(grad, saved.config.transpose()),)


resample3d_op = define_op(
    f"resample3d(Tensor x, {_ARGS}) -> Tensor",
    Resampling,
    _resample,
    _resample_fake,
    _resample_save,
    _resample_backward,
)


def resample3d_features(
    x: BlockSparseTensor,
    out: Level,
    mode: Mode,
    align_corners: bool,
    scales: tuple[float, float, float] | None,
) -> Tensor:
    """Packed features on the level `out` of the masked volume's interpolation.

    Args:
        x: `[B, C, D, H, W]` (or `[B, C, H, W]`).
        out: a level of the same batch and any size.
        mode: "nearest", "nearest-exact" or "linear" (along every axis), as torch defines them.
        align_corners: for "linear".
        scales: outputs per input and axis (z, y, x) as given by the user, from which `out`'s size
            follows; derived from the sizes if None.
    """
    if current_backend() == "reference":
        dense, mask = reference.dense_level(x.features, x.level)
        size = cast("Any", tuple(g * n for g, n in zip(out.grid, out.block, strict=True)))
        out_mask = reference.voxel_mask(out)
        y = reference.interpolate(dense, mask, out_mask, size, mode, align_corners, scales)
        return reference.pack(y, out)
    level, given = x.level, scales or (0.0, 0.0, 0.0)
    how = level.plan(
        ("resample", out, mode, align_corners, given),
        lambda: Resampling(
            *tables(level), level.block, *tables(out), out.block, mode, align_corners, given, False
        ),
    )
    features: Tensor = resample3d_op(x.features, how)
    return features
