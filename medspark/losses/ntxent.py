"""NT-Xent, the loss of SimCLR (Chen et al., arXiv 2002.05709, equation 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from medspark.losses.rows import check_pair, check_positive, gather_rows, rank_and_world, unit


def nt_xent(
    first: Tensor, second: Tensor, temperature: float = 0.1, *, joint: bool = True
) -> Tensor:
    """Mean over this process's 2 B views of the cross-entropy of finding the other view.

    With z the views of N samples, scaled to length 1, and j the other view of the sample of i::

        l(i, j) = -log( exp(z_i . z_j / T) / sum over k != i of exp(z_i . z_k / T) )

    where k runs over the 2 N views of the samples of all processes. The mean of the loss over the
    processes is that of one process with the joint batch, and so are the gradients that
    DistributedDataParallel averages. In float32 (float64 stays), under autocast too. Lengths do not
    matter. A view that is not finite makes the loss NaN, on every process.

    Args:
        first: embeddings [B, D] of one view of each sample.
        second: of the other, in the same order.
        temperature: T; .1 was best in the paper's table 5.
        joint: whether samples of other processes are negatives; ``False`` where all processes read
            the same samples, as in validation.

    Returns:
        Scalar.

    Raises:
        ValueError: shapes or temperature do not fit; fewer than 2 samples in all, which leaves no
            negatives; processes with batches of different sizes.
    """
    check_pair(first, second, "the two views")
    check_positive(temperature=temperature)
    with torch.autocast(first.device.type, enabled=False):
        views = torch.stack([unit(first), unit(second)], dim=1)  # [B, 2, D]: one gather, not two
        rank, _ = rank_and_world(joint)
        others = gather_rows(views) if joint else views
        if len(others) < 2:
            raise ValueError("NT-Xent of one sample has no negatives; use batches of 2 or more")
        logits = views.flatten(0, 1) @ others.flatten(0, 1).T / temperature
        own = torch.arange(len(logits), device=logits.device)
        place = own + rank * len(logits)
        logits = logits.index_put((own, place), logits.new_tensor(-torch.inf))
        return F.cross_entropy(logits, place ^ 1)  # views 2 n and 2 n + 1 are of one sample
