"""Swapped prediction of balanced codes, the loss of SwAV (Caron et al., arXiv 2006.09882)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from medspark.losses.rows import check_positive, rank_and_world, wide


@torch.no_grad()
def sinkhorn(
    scores: Tensor, epsilon: float = 0.05, iterations: int = 3, *, joint: bool = True
) -> Tensor:
    """Soft codes [B, K] of samples, balanced over the prototypes (equations 3 to 5).

    The codes maximise Tr(Q^T C^T Z) + epsilon H(Q), where each prototype has a share of 1 / K and
    each sample one of 1 / B of Q: ``Q = Diag(u) exp(scores / epsilon) Diag(v)``. As in the official
    code, iterations balance prototypes first and samples last, and Q is scaled by B, so that every
    row sums to 1, and every column to B / K as far as the iterations went.

    Computed with logarithms in float32 (float64 stays), under autocast too: no score over- or
    underflows, however small epsilon. Prototypes are balanced over the samples of all processes,
    whose numbers may differ. A score of NaN makes all codes NaN, on every process.

    Args:
        scores: [B, K], cosines of samples and prototypes.
        epsilon: of the entropy; the smaller, the harder the codes.
        iterations: at least 1; the paper's 3 suffice for training.
        joint: whether samples of all processes are balanced together; all must call it then.

    Raises:
        ValueError: scores that are not [B, K], or an option out of range.
    """
    check_positive(epsilon=epsilon, iterations=iterations)
    if scores.ndim != 2 or not scores.numel():
        raise ValueError(f"scores must be [B, K] and not empty, not {tuple(scores.shape)}")
    _, world = rank_and_world(joint)
    logs = wide(scores) / epsilon
    for _ in range(iterations):
        logs = logs - _log_sum_of_samples(logs, world)
        logs = logs - logs.logsumexp(1, keepdim=True)
    return logs.exp()


def _log_sum_of_samples(logs: Tensor, world: int) -> Tensor:
    """[B, K] -> [K], over the samples of all processes."""
    if world == 1:
        return logs.logsumexp(0)
    top = logs.amax(0)
    dist.all_reduce(top, dist.ReduceOp.MAX)
    total = (logs - top).exp().sum(0)
    dist.all_reduce(total)
    return top + total.log()


def assign_codes(
    scores: Sequence[Tensor],
    assign: Sequence[int] = (0, 1),
    epsilon: float = 0.05,
    iterations: int = 3,
    queued: Mapping[int, Tensor] | None = None,
    *,
    joint: bool = True,
) -> dict[int, Tensor]:
    """Codes [B, K] of the views in ``assign``, one Sinkhorn-Knopp run for each.

    Args:
        scores: [B, K] of each view.
        assign: numbers of the views that get codes: the large crops.
        epsilon: see ``sinkhorn``.
        iterations: see ``sinkhorn``.
        queued: for each view in ``assign``, scores [L, K] of earlier samples against the prototypes
            of now. They take part in the balance, and that is all: for batches much smaller than the
            number of prototypes (section 3.1). Processes bring different ones.
        joint: see ``sinkhorn``.

    Raises:
        ValueError: no such views, queued scores that do not fit, or as in ``sinkhorn``.
    """
    _check(scores, assign)
    codes = {}
    for view in assign:
        own = scores[view].detach()
        rows = [own] if queued is None else [own, _queued(queued, view, own)]
        codes[view] = sinkhorn(torch.cat(rows), epsilon, iterations, joint=joint)[: len(own)]
    return codes


def swapped_prediction_loss(
    scores: Sequence[Tensor], codes: Mapping[int, Tensor], temperature: float = 0.1
) -> Tensor:
    """Mean cross-entropy of predicting the codes of a view from each other view (equations 1, 2, 6).

    With q the codes of view i and p = softmax(scores / T) of view v::

        mean over i with codes, v != i, and samples of  -sum over prototypes of q log p

    A mean where the paper's equation 6 has a sum, as in the official code, so that the learning rate
    does not depend on the number of crops. In float32 (float64 stays), under autocast too. No
    gradient reaches the codes. What is not finite makes it NaN. With equal batches and joint codes
    the mean over processes is the loss of the joint batch.

    Args:
        scores: [B, K] of each view, large crops and small ones.
        codes: [B, K] of some views, from ``assign_codes``.
        temperature: T.

    Raises:
        ValueError: shapes, views or temperature do not fit.
    """
    check_positive(temperature=temperature)
    _check(scores, list(codes))
    with torch.autocast(scores[0].device.type, enabled=False):
        logs = [F.log_softmax(wide(s) / temperature, dim=1) for s in scores]
        terms = [
            -(code.detach() * log).sum(1).mean()
            for view, code in codes.items()
            for other, log in enumerate(logs)
            if other != view
        ]
        return torch.stack(terms).mean()


def swav_loss(
    scores: Sequence[Tensor],
    assign: Sequence[int] = (0, 1),
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    queued: Mapping[int, Tensor] | None = None,
    *,
    joint: bool = True,
) -> Tensor:
    """``swapped_prediction_loss`` of the codes of ``assign_codes``; arguments as there."""
    codes = assign_codes(scores, assign, epsilon, iterations, queued, joint=joint)
    return swapped_prediction_loss(scores, codes, temperature)


@torch.no_grad()
def normalise_prototypes(weight: Tensor) -> None:
    """Scales each prototype, a row of ``weight`` [K, D], to length 1, in place.

    As in the paper's pseudo-code (its rows are the columns of C). Call it before the forward pass of
    a step, not between forward and backward, where autograd refuses it.
    """
    weight.copy_(F.normalize(weight, dim=1))


def _queued(queued: Mapping[int, Tensor], view: int, own: Tensor) -> Tensor:
    rows = queued.get(view)
    if rows is None or rows.ndim != 2 or rows.shape[1] != own.shape[1]:
        found = "missing" if rows is None else str(tuple(rows.shape))
        raise ValueError(f"queued scores of view {view} must be [L, {own.shape[1]}]: {found}")
    return rows.detach().to(own.dtype)


def _check(scores: Sequence[Tensor], assign: Sequence[int]) -> None:
    shapes = [tuple(s.shape) for s in scores]
    if len(scores) < 2 or len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(f"scores must be [B, K], the same for 2 views or more, not {shapes}")
    if not assign or len(set(assign)) < len(assign) or not set(assign) <= set(range(len(scores))):
        raise ValueError(
            f"views with codes {list(assign)} must be different numbers below {len(scores)}"
        )
