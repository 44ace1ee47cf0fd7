"""Random numbers, masks and batches that depend on a seed and a sample's number alone.

Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a key and a
counter to random bits. With the seed in the key and the number of the sample in the counter, any
sample can be drawn at once, by any worker or process, before or after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

PLACE, MASK = 0, 1  # purposes, so that the mask is independent of the place


def uniforms(seed: int, purpose: int, index: int, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) of sample `index`, float64 `[count]`, with 53 random bits each.

    A longer draw starts with the shorter one. Only Philox' raw bits are used, which numpy
    guarantees, and not its distributions, which may change between versions.

    Raises:
        ValueError: If seed or index is no unsigned 64-bit number.
    """
    if not (0 <= seed < 1 << 64 and 0 <= index < 1 << 64):
        raise ValueError(f"seed {seed} and index {index} must lie in [0, 2**64)")
    # Philox counts in the first of the four words; the index is in the second.
    key, counter = (np.array(words, np.uint64) for words in ([seed, purpose], [0, index, 0, 0]))
    raw = np.random.Philox(key=key, counter=counter).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


def draw_visible(seed: int, index: int, grid: Sequence[int], mask_ratio: float) -> np.ndarray:
    """Cells of sample `index` that stay visible, bool `[Gz, Gy, Gx]`.

    As SparK's mask (arXiv 2301.03580): `round(n * (1 - mask_ratio))` of the n cells, those with
    the smallest of n uniform numbers.

    Raises:
        ValueError: If a ratio outside [0, 1] is asked for.
    """
    if not 0 <= mask_ratio <= 1:
        raise ValueError(f"mask_ratio {mask_ratio} must lie between 0 and 1")
    cells = int(np.prod(grid))
    visible = np.zeros(cells, dtype=bool)
    order = np.argsort(uniforms(seed, MASK, index, cells), kind="stable")
    visible[order[: round(cells * (1 - mask_ratio))]] = True
    return visible.reshape(grid)


class CounterBatches:
    """Batches of sample numbers, for one of several processes, from any sample on.

    Step `s` covers `world * batch_size` consecutive numbers from `start` on; process `rank` has
    the `rank`-th part. So `world` processes read together what one with the joint batch would,
    and a run that ended before sample n goes on with `start=n`. Samples that fill no joint batch
    are left out.

    Args:
        batch_size: Samples per process.
        start: First number.
        stop: End of the numbers.
        rank: This process, from 0.
        world: Processes.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self, batch_size: int, start: int, stop: int, *, rank: int = 0, world: int = 1
    ) -> None:
        if batch_size < 1 or start < 0 or not 0 <= rank < world:
            raise ValueError(
                f"batch_size {batch_size} must be positive, start {start} not negative and rank "
                f"{rank} below world {world}"
            )
        self.batch_size, self.start, self.stop = batch_size, start, stop
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        """Batches of this process."""
        return max(0, self.stop - self.start) // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[range]:
        """Ranges of sample numbers."""
        for step in range(len(self)):
            first = self.start + (step * self.world + self.rank) * self.batch_size
            yield range(first, first + self.batch_size)
