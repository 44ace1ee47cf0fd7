"""What `torch.nn.functional.interpolate` does when it meets a BlockSparseTensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch.nn.functional as F

from medspark.sparse.casts import widened
from medspark.sparse.convolutions import hashable
from medspark.sparse.mask import Level
from medspark.sparse.ops.resample3d import Mode, resample3d_features
from medspark.sparse.tensor import BlockSparseTensor, block_sparse, implements

_LINEAR = {4: "bilinear", 5: "trilinear"}


def _mode(x: BlockSparseTensor, mode: str, align_corners: bool | None, antialias: bool) -> Mode:
    """The kind of interpolation along every axis.

    Raises:
        ValueError: align_corners with a mode that has none.
        NotImplementedError: a mode without a sparse counterpart.
    """
    if antialias:
        raise NotImplementedError(
            "interpolate(antialias=True) has no block-sparse counterpart; leave the sparse world "
            "first: interpolate(x.to_dense(), ...)"
        )
    nearest = mode in ("nearest", "nearest-exact")
    if not nearest and mode != _LINEAR[x.ndim]:
        raise NotImplementedError(
            f"interpolate(mode={mode!r}) of a BlockSparseTensor {tuple(x.shape)} is not one of "
            f"'nearest', 'nearest-exact' and '{_LINEAR[x.ndim]}'; for another mode, leave the sparse "
            "world first: interpolate(x.to_dense(), ...)"
        )
    if nearest and align_corners is not None:
        raise ValueError(f"align_corners={align_corners} has no meaning with mode={mode!r}")
    return cast("Mode", mode) if nearest else "linear"


def _output_size(
    x: BlockSparseTensor,
    size: int | Sequence[int] | None,
    scale_factor: float | Sequence[float] | None,
) -> tuple[tuple[int, ...], tuple[float, ...] | None]:
    """Output size and, where they were given, scales per axis: torch's rules.

    Raises:
        ValueError: both, neither, or not one number per axis.
    """
    if (size is None) == (scale_factor is None):
        raise ValueError(
            f"interpolate needs either size or scale_factor, got {size} and {scale_factor}"
        )
    given = size if size is not None else scale_factor
    numbers = tuple(given) if isinstance(given, Sequence) else (given,) * len(x.spatial)
    if len(numbers) != len(x.spatial):
        raise ValueError(
            f"interpolate needs {len(x.spatial)} numbers for {tuple(x.shape)}, got {given}"
        )
    if size is not None:
        return tuple(int(n) for n in cast("tuple[int, ...]", numbers)), None
    scales = tuple(float(s) for s in cast("tuple[float, ...]", numbers))
    return tuple(int(n * s) for n, s in zip(x.spatial, scales, strict=True)), scales


@implements(F.interpolate)
def interpolate(
    x: BlockSparseTensor,
    size: int | Sequence[int] | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> BlockSparseTensor:
    """Interpolation of the masked volume, kept on the active voxels of the output's level.

    Reached through `torch.nn.functional.interpolate` (and so `upsample` and `nn.Upsample`), whose
    arguments and source coordinates it follows; hidden voxels count as 0.

    Raises:
        ValueError: the output does not map onto the cells of the mask, or torch's own complaints.
        NotImplementedError: modes other than nearest, nearest-exact, bilinear (4 axes) and trilinear
            (5 axes), or antialiasing.
    """
    x = widened(x, "cuda")
    key = ("interpolate", hashable(size), hashable(scale_factor), mode, align_corners)
    plan = x.level.plan(
        (*key, recompute_scale_factor, antialias),
        lambda: _plan(
            x, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias
        ),
    )
    features = resample3d_features(x, plan.level, plan.kind, bool(align_corners), plan.scales)
    return block_sparse(features, x.mask, plan.level, plan.spatial, x.semantics)


class Plan(NamedTuple):
    """Where the results go, the kind of interpolation along an axis, and scales that torch would use."""

    level: Level
    spatial: tuple[int, ...]
    kind: Mode
    scales: tuple[float, float, float] | None


def _plan(
    x: BlockSparseTensor,
    size: int | Sequence[int] | None,
    scale_factor: float | Sequence[float] | None,
    mode: str,
    align_corners: bool | None,
    recompute_scale_factor: bool | None,
    antialias: bool,
) -> Plan:
    kind = _mode(x, mode, align_corners, antialias)
    if recompute_scale_factor and size is not None:
        raise ValueError("recompute_scale_factor has no meaning with a size")
    spatial, scales = _output_size(x, size, scale_factor)
    try:
        level = x.mask.level(spatial, x.semantics.coarse)
    except ValueError as error:
        raise ValueError(f"interpolate from {x.spatial} to {spatial}: {error}") from error
    three = None
    if scales is not None and not recompute_scale_factor:
        three = cast("tuple[float, float, float]", (1.0,) * (3 - len(scales)) + scales)
    return Plan(level, spatial, kind, three)
