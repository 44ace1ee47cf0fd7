"""Classification metrics of one split, with a stated answer where a class is absent from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    multiclass_f1_score,
)

ECE_BINS = 15
_ROUNDING = 1e-2  # bfloat16 keeps three digits: more than that is no rounding


@dataclass(frozen=True)
class ReliabilityBins:
    """Samples by their top probability, in bins of equal width; NaN where a bin is empty.

    Attributes:
        edges: [bins + 1], from 0 to 1; bin b holds edges[b] < p <= edges[b + 1].
        counts: [bins], samples of each bin.
        confidence: [bins], mean top probability.
        accuracy: [bins], share of right predictions.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def ece(self) -> float:
        """Expected calibration error; NaN without a sample."""
        n = self.counts.sum()
        gaps = np.nan_to_num(np.abs(self.accuracy - self.confidence))
        return float((self.counts * gaps).sum() / n) if n else math.nan


def classification_metrics(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Ranking, decisions and calibration of one split.

    The prediction is the most probable class, the first of equals. A metric that does not exist
    for the given samples is NaN: any number would be an invention.

    - `auc`: area under the ROC curve, ties count half. Class 1 for two classes, else the mean of
      the one-versus-rest areas over the classes that have a sample. NaN with fewer than two
      classes present.
    - `ap`: average precision, the step-wise sum of (recall gained) × precision over distinct
      scores; for the same class or classes as `auc`. Its chance level is the share of the class.
      NaN with fewer than two classes present, where it would be 1 whatever the scores.
    - `balanced_accuracy`: mean recall over the classes that have a sample.
    - `macro_f1`: mean F1 = 2 TP / (2 TP + FP + FN) over the classes that are a label or a
      prediction of at least one sample. A class that is predicted but has no sample counts with
      F1 = 0; one that is neither is left out (as in scikit-learn and torchmetrics).
    - `accuracy`: share of right predictions.
    - `ece`: expected calibration error, sum over bins b of n_b / n × |accuracy_b − confidence_b|,
      confidence being the probability of the predicted class, in 15 bins of equal width over
      (0, 1] (Guo et al. 2017, arXiv 1706.04599, equation 3). With few samples it is biased
      upwards, by up to about Σ_b √(2 n_b a_b (1 − a_b) / π) / n with accuracy a_b: 96 samples of a
      perfectly calibrated classifier, confidences uniform in [0.5, 1], have 0.09 on average, 1000
      have 0.03. So it compares only splits of like size and confidence.
    - `brier`: mean over samples of Σ_c (p_c − [label = c])², from 0 to 2; for two classes twice the
      one-column form.
    - `nll`: mean of −ln(probability of the label); infinite where that is 0.
    - `n`: samples. `classes_present`: classes that have one.

    Args:
        probabilities: float [N, n_classes], each row sums to 1.
        labels: integer [N], class of each sample.

    Raises:
        ValueError: shapes that do not fit, a label outside the classes, or rows that are not
            probabilities.
    """
    scores, labels = check_predictions(probabilities, labels)
    n, n_classes = scores.shape
    predicted = scores.argmax(dim=1)
    present = torch.unique(labels).tolist()
    ranked = _ranked_classes(present, n_classes)
    one_hot = torch.nn.functional.one_hot(labels, n_classes)
    found = {
        "auc": _mean([float(binary_auroc(scores[:, c], one_hot[:, c])) for c in ranked]),
        "ap": _mean([float(binary_average_precision(scores[:, c], one_hot[:, c])) for c in ranked]),
        "balanced_accuracy": _mean([_share(predicted[labels == c] == c) for c in present]),
        "macro_f1": float(multiclass_f1_score(predicted, labels, n_classes)) if n else math.nan,
        "accuracy": _share(predicted == labels),
        "ece": reliability_bins(scores, labels).ece,
        "brier": float((scores - one_hot).square().sum(dim=1).mean()),
        "nll": float(-scores.gather(1, labels[:, None]).log().mean()),
    }
    return found | {"n": float(n), "classes_present": float(len(present))}


def reliability_bins(
    probabilities: Tensor, labels: Tensor, n_bins: int = ECE_BINS
) -> ReliabilityBins:
    """Sorts samples into equal-width bins of the probability of the predicted class.

    A bin includes its upper edge, so that certain predictions share the last bin; torchmetrics puts
    a probability of exactly 1 into a bin of its own.

    Args:
        probabilities: float [N, n_classes], each row sums to 1.
        labels: integer [N].
        n_bins: bins over (0, 1].

    Raises:
        ValueError: as `classification_metrics`.
    """
    scores, labels = check_predictions(probabilities, labels)
    top, predicted = scores.max(dim=1)
    right = (predicted == labels).double().numpy()
    edges = np.linspace(0.0, 1.0, n_bins + 1)
    place = np.clip(np.searchsorted(edges, top.numpy(), side="left") - 1, 0, n_bins - 1)
    counts = np.bincount(place, minlength=n_bins)
    divisor = np.where(counts, counts, np.nan)
    confidence, accuracy = (
        np.bincount(place, weights=values, minlength=n_bins) / divisor
        for values in (top.numpy(), right)
    )
    return ReliabilityBins(edges, counts, confidence, accuracy)


def check_predictions(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities as float64 within [0, 1] and labels as int64, both on the CPU.

    Raises:
        ValueError: as `classification_metrics`.
    """
    if probabilities.ndim != 2 or probabilities.shape[1] < 2 or labels.ndim != 1:
        raise ValueError(
            "expected probabilities [N, classes >= 2] and labels [N], got "
            f"{tuple(probabilities.shape)} and {tuple(labels.shape)}"
        )
    n, n_classes = probabilities.shape
    if len(labels) != n:
        raise ValueError(f"{n} rows of probabilities for {len(labels)} labels")
    if labels.is_floating_point():
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if n and (int(labels.min()) < 0 or int(labels.max()) >= n_classes):
        found = f"{int(labels.min())}..{int(labels.max())}"
        raise ValueError(f"labels must lie in 0..{n_classes - 1}, got {found}")
    scores = probabilities.detach().cpu().double()
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("probabilities hold NaN or infinity: has the training diverged?")
    _check_sums(scores)
    return scores.clamp(0.0, 1.0), labels.detach().cpu().long()


def _check_sums(scores: Tensor) -> None:
    wrong = ((scores.sum(dim=1) - 1).abs() > _ROUNDING) | (scores < -_ROUNDING).any(dim=1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        values = ", ".join(f"{v:.4g}" for v in scores[row, :5].tolist())
        raise ValueError(
            f"row {row} is no set of probabilities (at least 0, sum 1): {values}"
            f"{', ...' if scores.shape[1] > 5 else ''}; apply softmax to logits"
        )


def _ranked_classes(present: list[int], n_classes: int) -> list[int]:
    """Classes that are ranked against the rest; none where there is no rest."""
    if len(present) < 2:
        return []
    return [1] if n_classes == 2 else present


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
