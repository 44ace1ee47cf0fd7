"""Batch norm that does not tell a query which key is its own (MoCo, arXiv 1911.05722, section 3.3).

A query and its key that are normalised in the same company share its statistics, by which a network
can tell the key from the queue's without looking at the image. So keys are encoded in other company:
the joint batch is shuffled over the processes, encoded, and put back in order. Statistics must be per
process then: with a SyncBatchNorm, or on one process, query and key have the same company whatever the
order; a shuffle by itself does nothing there.

The replacement on one process is ``parts``: query batches are encoded in that many parts, ``in_parts``,
and so are shuffled keys, ``encode_keys``. That is what the same number of processes would do, to the
last statistic. With n = processes x parts, 1 / n of a key's company is its query's by chance; n = 1
leaves the leak open. The authors' demonstration on one GPU splits its batch norms in 8 for the same
purpose, and loses 4 % of accuracy without shuffling. A part should keep 8 samples or more, or its
statistics are noise. Networks without batch norm need none of this.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from medspark.losses.rows import gather_rows, rank_and_world


def shuffle(x: Tensor, seed: int) -> Tensor:
    """This process's share [B, ...] of the shuffled joint batch; without gradient.

    The order follows from the seed and the size of the joint batch alone, so all processes agree
    without a word. Every process receives the joint batch for a moment.

    Raises:
        ValueError: processes with batches of different sizes.
    """
    rank, world = rank_and_world()
    order = _order(world * len(x), seed)
    return _take(x, order[rank * len(x) : (rank + 1) * len(x)])


def unshuffle(x: Tensor, seed: int) -> Tensor:
    """Back to where the samples came from: ``unshuffle(shuffle(x, seed), seed) == x``."""
    rank, world = rank_and_world()
    back = _order(world * len(x), seed).argsort()
    return _take(x, back[rank * len(x) : (rank + 1) * len(x)])


def in_parts(network: Callable[[Tensor], Tensor], x: Tensor, parts: int) -> Tensor:
    """``network`` on consecutive parts of a batch, each with its own batch statistics.

    Running statistics move once per part. Differentiable.

    Args:
        network: [b, ...] -> [b, D].
        x: [B, ...].
        parts: of equal size.

    Returns:
        [B, D], in order.

    Raises:
        ValueError: B is not a multiple of ``parts``, or that is below 1.
    """
    if parts < 1 or len(x) % parts:
        raise ValueError(f"a batch of {len(x)} does not split into {parts} equal parts")
    return network(x) if parts == 1 else torch.cat([network(part) for part in x.chunk(parts)])


@torch.no_grad()
def encode_keys(
    network: Callable[[Tensor], Tensor], x: Tensor, seed: int, parts: int = 1
) -> Tensor:
    """Keys [B, D] of a batch, each encoded in random company; without gradient.

    With one process and one part there is no other company: the network runs on ``x`` as it is.

    Args:
        network: the momentum network.
        x: [B, ...] of this process.
        seed: of this step; the same on all processes, another at each step.
        parts: see ``in_parts``; queries must go through it with the same.

    Raises:
        ValueError: as in ``in_parts`` and ``shuffle``.
    """
    _, world = rank_and_world()
    if world * parts == 1:
        return network(x)
    return unshuffle(in_parts(network, shuffle(x, seed), parts), seed)


def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _take(x: Tensor, places: Tensor) -> Tensor:
    return gather_rows(x)[places.to(x.device)]
