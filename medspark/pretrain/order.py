"""Which sample is read when: the one place that knows it, for loaders, masks and messages."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


def sample_numbers(call: int, rank: int, world: int, batch_size: int) -> range:
    """Numbers of the samples that process ``rank`` of ``world`` reads at its ``call``-th batch.

    With gradient accumulation a step takes several batches, and ``call`` counts them all. Samples of
    a step are the same, whether one process reads them as one batch or several share them.
    """
    first = (call * world + rank) * batch_size
    return range(first, first + batch_size)


def generator_of(seed: int, *names: str | int) -> torch.Generator:
    """CPU generator that depends on its arguments alone: a resumed run draws the same."""
    return torch.Generator().manual_seed(seed_of(seed, *names))


def seed_of(seed: int, *names: str | int) -> int:
    """A seed below 2^63 that depends on its arguments alone."""
    text = ":".join(map(str, [seed, *names]))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def place_in_world() -> tuple[int, int]:
    """Rank of this process and number of processes; known once they have met."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class CounterSampler(Sampler[int]):
    """Sample numbers of one process from any batch of a run on.

    The dataset maps a number to a sample by itself, so a run resumed at batch ``start`` reads
    exactly what it would have read. The length is that of the whole run, as Lightning counts the
    batches already done.

    Args:
        start: batches that this process has read before.
        batches: batches that it reads in the whole run.
        batch_size: per process.
    """

    def __init__(self, start: int, batches: int, batch_size: int) -> None:
        self.start, self.batches, self.batch_size = start, batches, batch_size

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        rank, world = place_in_world()
        for call in range(self.start, self.batches):
            yield from sample_numbers(call, rank, world, self.batch_size)
