"""Regression of a target's projections, the loss of BYOL (Grill et al., arXiv 2006.07733)."""

from __future__ import annotations

import torch
from torch import Tensor

from medspark.losses.rows import check_pair, unit


def regression_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean over samples of |p - t|^2 = 2 - 2 cos(p, t), both scaled to length 1 (equation 2).

    From 0 (same direction) over 2 (orthogonal) to 4 (opposite). No gradient reaches the targets. In
    float32 (float64 stays), under autocast too. A row that is not finite makes it NaN. There are no
    negatives: with equal batches the mean over processes is the loss of the joint batch.

    Args:
        predictions: [B, D], of the online network's predictor.
        targets: [B, D], projections of the target network for the other view.

    Raises:
        ValueError: the shapes differ or are not [B, D].
    """
    check_pair(predictions, targets, "predictions and targets")
    with torch.autocast(predictions.device.type, enabled=False):
        p, t = unit(predictions), unit(targets.detach())
        return 2 - 2 * (p * t).sum(1).mean()


def byol_loss(predictions: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
    """Both directions summed, as in the paper (section 3.1); some codes take their mean.

    Args:
        predictions: of views 1 and 2, [B, D] each.
        targets: of views 1 and 2, in the same order: each is predicted from the other view.

    Returns:
        Scalar between 0 and 8.

    Raises:
        ValueError: as in ``regression_loss``.
    """
    (p1, p2), (t1, t2) = predictions, targets
    return regression_loss(p1, t2) + regression_loss(p2, t1)
