"""Gaussian noise that depends on a key alone: the same on any device, in any batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUNDS = 10


def philox(
    counter: Sequence[Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) on 32-bit words held in int64.

    Args:
        counter: Four tensors of one shape.
        key: Two words that broadcast against the counter's.

    Returns:
        Four random words for each counter.
    """
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product of two words wraps in int64, but its bits are right.
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, c = ((q >> 32) & _MASK) ^ b ^ k0, ((p >> 32) & _MASK) ^ d ^ k1
        b, d = q & _MASK, p & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return a, b, c, d


def normals(keys: Sequence[tuple[int, int]], shape: Sequence[int], device: torch.device) -> Tensor:
    """Standard normal noise for a batch, by Box and Muller.

    Args:
        keys: A key for each sample.
        shape: Of a sample.
        device: Where it is computed; devices differ by rounding.

    Returns:
        float32 `[len(keys), *shape]`.
    """
    n = math.prod(shape)
    zeros = torch.zeros(1, -(-n // 4), dtype=torch.int64, device=device)
    first = torch.arange(zeros.shape[1], device=device)[None]
    words = torch.tensor(keys, device=device)
    key = (words[:, :1], words[:, 1:])
    counter = [first.expand(len(keys), -1), zeros, zeros, zeros]
    drawn = philox(counter, key)
    parts = []
    for radius, angle in (drawn[:2], drawn[2:]):
        # Half a step away from 0, which has no logarithm.
        r = torch.log((radius.float() + 0.5) * 2.0**-32).mul_(-2).sqrt_()
        t = angle.float().mul_(2 * math.pi * 2.0**-32)
        parts += [r * torch.cos(t), r * torch.sin(t)]
    return torch.cat(parts, 1)[:, :n].reshape(len(keys), *shape)
