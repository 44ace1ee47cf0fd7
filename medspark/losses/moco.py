"""InfoNCE against a queue, the loss of MoCo (arXiv 1911.05722, equation 1; v2: 2003.04297)."""

from __future__ import annotations

import torch
from torch import Tensor

from medspark.losses.rows import check_pair, check_positive, unit, wide


def info_nce(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float = 0.2) -> Tensor:
    """Mean cross-entropy of finding a query's key among it and the keys of the queue.

    With q a query, k its key and k_i the K keys of the queue::

        -log( exp(q . k / T) / (exp(q . k / T) + sum over i of exp(q . k_i / T)) )

    Queries and keys are scaled to length 1 here, rows of the queue must have it. In float32 (float64
    stays), under autocast too. No gradient reaches keys or queue. With an empty queue loss and
    gradients are 0. What is not finite in a query, its key or the queue makes the loss NaN: put keys
    into the queue only after the loss was checked, or they spoil it for as long as they stay.

    Each process sees its own queries; with equal batches and equal queues the mean over processes is
    the loss of the joint batch.

    Args:
        queries: [B, D], of the trained network.
        keys: [B, D], of the momentum network: the same samples, another view.
        queue: [K, D] keys of earlier samples, see ``medspark.models.queue``; K may be 0.
        temperature: T; .2 in v2, .07 in v1.

    Returns:
        Scalar.

    Raises:
        ValueError: shapes or temperature do not fit.
    """
    check_pair(queries, keys, "queries and keys")
    check_positive(temperature=temperature)
    if queue.ndim != 2 or queue.shape[1] != queries.shape[1]:
        raise ValueError(
            f"the queue is {tuple(queue.shape)}, but queries {tuple(queries.shape)} need "
            f"[K, {queries.shape[1]}]"
        )
    with torch.autocast(queries.device.type, enabled=False):
        q, k = unit(queries), unit(keys.detach())
        positive = (q * k).sum(1, keepdim=True)
        negative = q @ wide(queue.detach()).to(q.dtype).T
        logits = torch.cat([positive, negative], dim=1) / temperature
        return (logits.logsumexp(1) - logits[:, 0]).mean()
