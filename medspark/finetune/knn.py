"""Nearest neighbours of frozen features: nothing is trained, so nothing can be mistuned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import lightning as L
import torch
from torch import Tensor, nn

from medspark.finetune.metrics import classification_metrics
from medspark.models.pyramid import Pyramid

# What is tried on the validation split; of equals the first.
K = (20, 10, 5, 3, 1, 50)
TEMPERATURES = (0.07, 0.2, 0.02)


@dataclass(frozen=True)
class Choice:
    """Neighbours and temperature, and what the validation split said about them.

    Attributes:
        k: neighbours that vote.
        temperature: of the weights exp(similarity / temperature).
        value: loss or AUC of the validation split.
    """

    k: int
    temperature: float
    value: float


def vote(
    features: Tensor,
    references: Tensor,
    labels: Tensor,
    weights: Tensor,
    k: int,
    temperature: float,
) -> Tensor:
    """Probabilities by the k most similar references (Wu et al., arXiv 1805.01978, section 3.4).

    Similarity s is the cosine. A neighbour votes for its class with exp((s - s1) / temperature),
    where s1 is the nearest one's, times the weight of its class. One vote of weight 1 more is
    shared by all classes: so no probability is 0, and the loss of an error stays finite.

    Args:
        features: float [N, C].
        references: float [R, C].
        labels: integer [R], class of each reference.
        weights: float [n_classes].
        k: neighbours, at most R.
        temperature: positive.

    Returns:
        float32 [N, n_classes]; rows sum to 1.
    """
    # In mixed precision a product of half precision would move neighbours apart or together.
    with torch.autocast(features.device.type, enabled=False):
        normalised = nn.functional.normalize(features.float(), dim=1)
        similarity = normalised @ nn.functional.normalize(references.float(), dim=1).T
    nearest, places = similarity.topk(k, dim=1)
    power = ((nearest - nearest[:, :1]) / temperature).exp() * weights[labels[places]]
    votes = torch.full((len(features), len(weights)), 1 / len(weights), device=features.device)
    votes.scatter_add_(1, labels[places], power)
    return votes / votes.sum(dim=1, keepdim=True)


class NearestNeighbours(L.LightningModule):
    """Encoder, global average over its coarsest map, standardisation, vote of the neighbours.

    Args:
        encoder: network on [B, 1, D, H, W] or [B, 1, H, W]; stays as it is.
        n_classes: at least 2.
        references: number of reference features, the training split's.
        k: neighbours that vote.
        temperature: see `vote`.
        class_weights: factor on the votes of each class, None for 1.

    Attributes:
        references, reference_labels: [R, C] standardised features and [R] classes.
        class_weights: [n_classes], factor on the votes.
    """

    feature_mean: Tensor
    feature_sd: Tensor
    references: Tensor
    reference_labels: Tensor
    class_weights: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        n_classes: int,
        references: int,
        k: int = 1,
        temperature: float = 1.0,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.pyramid = Pyramid(encoder, strides=None).requires_grad_(False)
        channels = self.pyramid.channels[-1]
        self.k, self.temperature = k, temperature
        self.register_buffer("feature_mean", torch.zeros(channels))
        self.register_buffer("feature_sd", torch.ones(channels))
        self.register_buffer("references", torch.zeros(references, channels))
        self.register_buffer("reference_labels", torch.zeros(references, dtype=torch.int64))
        weights = torch.ones(n_classes) if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights)
        self.eval()

    def features(self, x: Tensor) -> Tensor:
        """Samples [B, 1, (D,) H, W] to pooled features [B, C] of the coarsest map."""
        with torch.no_grad():
            top: Tensor = self.pyramid(x)[-1]
            return top.flatten(2).mean(dim=2)

    def remember(self, features: Tensor, labels: Tensor) -> None:
        """Takes features [R, C], as the encoder gives them, and classes [R] as references."""
        self.references = (features - self.feature_mean) / self.feature_sd
        self.reference_labels = labels

    def probabilities(self, features: Tensor) -> Tensor:
        """Pooled features [B, C], as the encoder gives them, to probabilities [B, n_classes]."""
        standard = (features - self.feature_mean) / self.feature_sd
        kept = (self.references, self.reference_labels, self.class_weights)
        return vote(standard, *kept, self.k, self.temperature)

    def forward(self, x: Tensor) -> Tensor:
        """Samples [B, 1, (D,) H, W], or pooled features [B, C], to ln of probabilities."""
        return self.probabilities(x if x.ndim == 2 else self.features(x)).log()

    def predict_step(
        self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities [B, n_classes], labels [B] and dataset indices [B]."""
        x, label, index = batch
        return self(x).exp(), label, index

    def choose(self, features: Tensor, labels: Tensor, monitor: str) -> Choice:
        """Takes the k and temperature under which the validation split does best.

        Args:
            features: [N, C] of the validation split, as the encoder gives them.
            labels: [N].
            monitor: "loss", the mean -ln(probability of the class), or "auc".

        Raises:
            ValueError: an AUC is asked for that the split does not have.
        """
        usable = [k for k in K if k <= len(self.references)] or [len(self.references)]
        tried = [
            self._tried(k, t, features, labels, monitor) for k, t in product(usable, TEMPERATURES)
        ]
        best = tried[0]
        for choice in tried[1:]:
            better = choice.value < best.value if monitor == "loss" else choice.value > best.value
            best = choice if better else best
        self.k, self.temperature = best.k, best.temperature
        return best

    def _tried(
        self, k: int, temperature: float, features: Tensor, labels: Tensor, monitor: str
    ) -> Choice:
        self.k, self.temperature = k, temperature
        metrics = classification_metrics(self.probabilities(features), labels)
        value = metrics["nll" if monitor == "loss" else "auc"]
        if math.isnan(value):
            raise ValueError(
                "the validation split has no AUC, it holds samples of one class only: use "
                "monitor=loss"
            )
        return Choice(k, temperature, value)


def mean_sd(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and SD [C] of features [N, C].

    The SD is at least a hundredth of its root mean square over the channels: one that is nearly
    constant in the training split would else drown the others where it moves in the test split.
    """
    mean, sd = features.mean(dim=0), features.std(dim=0, correction=0)
    floor = 0.01 * sd.square().mean().sqrt()
    return mean, torch.where(floor > 0, sd.clamp(min=floor), torch.ones_like(sd))
