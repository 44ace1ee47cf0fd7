"""Queue of the embeddings of earlier samples (MoCo, arXiv 1911.05722, section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medspark.losses.rows import gather_rows, rank_and_world, unit


class Queue(nn.Module):
    """First in, first out: keeps the latest ``size`` rows of unit length, without gradients.

    It starts empty, unlike the official code's, whose first negatives are random vectors. A batch of
    any size goes in as if row by row, and over the end of the buffer to its start. All processes hold
    the same queue: the rows of process 0 enter first, then those of 1, and so on, so two processes
    fill it as one does with the joint batch. All of it is in the ``state_dict``; a resumed run goes
    on with the same bits.

    Buffers: ``vectors`` [size, D] in float32, ``pointer``, the place of the next row, and ``filled``,
    the number of rows so far, at most ``size``; both int64 scalars. Until the queue is full, rows
    0 to ``filled`` are those in use; then the oldest is at ``pointer``.

    Args:
        size: rows kept. More than the data set has samples means earlier keys of the same sample
            among the negatives.
        dim: D.

    Raises:
        ValueError: a size or dim below 1.
    """

    vectors: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"a queue needs at least one row and dimension, not [{size}, {dim}]")
        self.register_buffer("vectors", torch.zeros(size, dim))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, rows: Tensor, *, joint: bool = True) -> None:
        """Puts rows [B, D] of all processes in, scaled to length 1; the oldest make room.

        Call it after the loss was checked: NaN would stay for long. A single process does not wait for
        its GPU here.

        Args:
            rows: of this process.
            joint: whether other processes' rows go in as well; all must call it then.

        Raises:
            ValueError: rows that do not fit; processes with batches of different sizes.
        """
        size, dim = self.vectors.shape
        if rows.ndim != 2 or rows.shape[1] != dim:
            found = tuple(rows.shape)
            raise ValueError(f"a queue of [{size}, {dim}] takes rows [B, {dim}], not {found}")
        new = unit(gather_rows(rows) if joint else rows)
        skipped = max(len(new) - size, 0)  # overwritten at once, and on a GPU in no order
        places = torch.arange(skipped, len(new), device=rows.device) + self.pointer
        self.vectors.index_copy_(0, places % size, new[skipped:].to(self.vectors.dtype))
        self.pointer.add_(len(new)).remainder_(size)
        self.filled.add_(len(new)).clamp_(max=size)

    def negatives(self) -> Tensor:
        """The rows in use, [filled, D], in no order that matters; a copy, for the loss to keep.

        Reads ``filled``, so on a GPU it waits for what was launched before.
        """
        return self.vectors[: int(self.filled)].clone()

    def share(self) -> Tensor:
        """This process's part of ``negatives()``: those of all processes together are the queue.

        For SwAV, where queued samples of all processes are balanced together, each once.
        """
        rank, world = rank_and_world()
        return self.negatives()[rank::world]
