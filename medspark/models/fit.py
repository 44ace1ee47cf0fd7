"""Making a tensor of weights fit: 2D kernels in 3D, RGB stems on grey input."""

from __future__ import annotations

import torch
from torch import Tensor

INFLATIONS = ("centre", "mean")
_COLOURS = (2, 3, 4)  # input channels of a stem that may be summed into one


def misfit(value: Tensor, wanted: Tensor, *, stem: bool) -> str | None:
    """Why ``value`` cannot become ``wanted``, or None where ``fit`` can do it.

    Looks at kinds and shapes only, so it costs nothing however large a shape a file claims.

    Args:
        value: tensor of a file.
        wanted: tensor of the network.
        stem: whether it is the weight of the network's first convolution.
    """
    if not _is_plain(value):
        return "the file has it sparse, quantised or without values"
    have, want = tuple(value.shape), tuple(wanted.shape)
    if value.is_floating_point() != wanted.is_floating_point() or value.is_complex():
        return f"the file has {value.dtype}, the network {wanted.dtype}"
    if have == want:
        return None
    reason = f"the file has {have}, the network {want}"
    if len(have) < 3 or len(have) not in (len(want), len(want) - 1):
        return reason
    inflated = len(have) == 4 and len(want) == 5
    if len(have) != len(want) and not inflated:
        return reason
    kernel = want[3:] if inflated else want[2:]
    channels = have[1] == want[1] or (stem and want[1] == 1 and have[1] in _COLOURS)
    return None if have[0] == want[0] and channels and have[2:] == kernel else reason


def fit(value: Tensor, wanted: Tensor, inflation: str) -> tuple[Tensor, bool, str]:
    """``value`` in the shape and type of ``wanted``; call ``misfit`` first.

    A stem that is trained on colours takes one grey channel after its kernels are summed over them:
    exact where all channels held the same values. A 2D kernel of a 3D network is, by ``inflation``,
    ``"centre"``: the central slice of a kernel of zeros, exact on volumes that do not change along
    z, borders included, wherever a layer pads by half its kernel; or ``"mean"``: repeated along z
    and divided by the depth (I3D, arXiv 1705.07750, section 2.3), exact there away from z borders.

    Returns:
        The tensor, whether it was inflated, and what else was done ("" for nothing).
    """
    note = ""
    x = value.double() if value.is_floating_point() else value
    if value.ndim > 2 and value.shape[1] != wanted.shape[1]:
        note = f"{value.shape[1]} input channels summed into 1"
        x = x.sum(dim=1, keepdim=True)
    inflated = x.ndim == wanted.ndim - 1
    if inflated:
        x = _inflate(x, wanted.shape[2], inflation)
    return x.to(wanted.dtype), inflated, note


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of a file, whatever they are, hold equal values."""
    plain = _is_plain(a) and _is_plain(b) and a.shape == b.shape and a.dtype == b.dtype
    return plain and torch.equal(a, b)


def _is_plain(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_quantized and not value.is_meta


def _inflate(kernel: Tensor, depth: int, inflation: str) -> Tensor:
    """[O, I, H, W] -> [O, I, depth, H, W]."""
    if inflation == "mean":
        return (kernel / depth).unsqueeze(2).repeat(1, 1, depth, 1, 1)
    out = kernel.new_zeros(*kernel.shape[:2], depth, *kernel.shape[2:])
    out[:, :, depth // 2] = kernel
    return out
