"""Classification metrics of one split, with a stated answer where a class is absent from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc


def classification_metrics(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """AUC, balanced accuracy and accuracy of one split.

    The AUC is that of class 1 for two classes, else the mean of the one-versus-rest AUCs. A class
    without a sample has no AUC and no recall: it is left out of both means (balanced accuracy is
    the mean recall), and `classes_present` says over how many classes they run. Where no class has
    an AUC (one class only, or no sample) it is NaN: any number would be an invention.

    Args:
        probabilities: float [N, n_classes], each row sums to 1.
        labels: integer [N], class of each sample.

    Returns:
        `auc`, `balanced_accuracy`, `accuracy`, `n` and `classes_present`.

    Raises:
        ValueError: shapes that do not fit, a label outside the classes, or a probability that is
            not finite.
    """
    _check(probabilities, labels)
    present = torch.unique(labels)
    predicted = probabilities.argmax(dim=1)
    recalls = [float((predicted[labels == c] == c).double().mean()) for c in present.tolist()]
    return {
        "auc": _auc(probabilities.double(), labels, present),
        "balanced_accuracy": sum(recalls) / len(recalls) if recalls else math.nan,
        "accuracy": float((predicted == labels).double().mean()) if len(labels) else math.nan,
        "n": float(len(labels)),
        "classes_present": float(len(present)),
    }


def _check(probabilities: Tensor, labels: Tensor) -> None:
    if probabilities.ndim != 2 or probabilities.shape[1] < 2 or labels.ndim != 1:
        raise ValueError(
            "expected probabilities [N, classes >= 2] and labels [N], got "
            f"{tuple(probabilities.shape)} and {tuple(labels.shape)}"
        )
    n, n_classes = probabilities.shape
    if len(labels) != n:
        raise ValueError(f"{n} rows of probabilities for {len(labels)} labels")
    if not bool(torch.isfinite(probabilities).all()):
        raise ValueError("probabilities hold NaN or infinity: has the training diverged?")
    if n and (int(labels.min()) < 0 or int(labels.max()) >= n_classes):
        found = f"{int(labels.min())}..{int(labels.max())}"
        raise ValueError(f"labels must lie in 0..{n_classes - 1}, got {found}")


def _auc(probabilities: Tensor, labels: Tensor, present: Tensor) -> float:
    if len(present) < 2:
        return math.nan
    if probabilities.shape[1] == 2:
        return float(binary_auroc(probabilities[:, 1], labels))
    classes = present.tolist()
    aucs = [float(binary_auroc(probabilities[:, c], (labels == c).long())) for c in classes]
    return sum(aucs) / len(aucs)
