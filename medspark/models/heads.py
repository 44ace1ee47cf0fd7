"""Projection and prediction heads of the contrastive methods, and the prototypes of SwAV."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medspark.losses import normalise_prototypes
from medspark.losses.rows import unit, wide


class Head(nn.Sequential):
    """Linear, [BatchNorm,] ReLU, Linear: [B, dim] -> [B, out].

    The hidden layer has no bias where a norm follows, which would remove it. Global pooling of a
    feature map is the caller's. In training, a norm needs two samples: per process, unless it is a
    SyncBatchNorm.

    Args:
        dim: input features.
        hidden: of the hidden layer.
        out: output features.
        norm: whether the hidden layer is batch normalised.
    """

    def __init__(self, dim: int, hidden: int, out: int, *, norm: bool) -> None:
        layers: list[nn.Module] = [nn.Linear(dim, hidden, bias=not norm)]
        if norm:
            layers.append(nn.BatchNorm1d(hidden))
        super().__init__(*layers, nn.ReLU(inplace=True), nn.Linear(hidden, out))

    def forward(self, input: Tensor) -> Tensor:
        """Embeddings, not yet of length 1.

        Raises:
            ValueError: features that are not [B, dim]; in training, one sample and a batch norm.
        """
        dim = self[0].in_features
        if input.ndim != 2 or input.shape[1] != dim:
            raise ValueError(f"a head takes pooled features [B, {dim}], not {tuple(input.shape)}")
        if len(input) < 2 and any(isinstance(m, nn.BatchNorm1d) and m.training for m in self):
            raise ValueError(
                f"batch norm of a head cannot train on a batch of {len(input)}: use at least 2 "
                "samples per process, SyncBatchNorm with several processes, or a head without norm"
            )
        result: Tensor = super().forward(input)
        return result


def simclr_projector(
    dim: int, hidden: int | None = None, out: int = 128, norm: bool = False
) -> Head:
    """Projector of SimCLR (arXiv 2002.05709, section 2.1): W2 ReLU(W1 h), dim-dim-128.

    ``norm`` puts a batch norm into the hidden layer, as codes do, though not the paper's text.
    """
    return Head(dim, hidden or dim, out, norm=norm)


def moco_v2_projector(dim: int, hidden: int | None = None, out: int = 128) -> Head:
    """MLP head of MoCo v2 (arXiv 2003.04297, section 3): dim-dim-128 (2048 there), no norm."""
    return Head(dim, hidden or dim, out, norm=False)


def byol_projector(dim: int, hidden: int = 4096, out: int = 256) -> Head:
    """Projector of BYOL (arXiv 2006.07733, section 3.3): dim-4096-256, hidden batch norm."""
    return Head(dim, hidden, out, norm=True)


def byol_predictor(dim: int = 256, hidden: int = 4096) -> Head:
    """Predictor of BYOL: the projector's architecture, from its output to the same size."""
    return Head(dim, hidden, dim, norm=True)


def swav_projector(dim: int, hidden: int = 2048, out: int = 128) -> Head:
    """Projector of SwAV (arXiv 2006.09882, official settings): dim-2048-128, hidden batch norm."""
    return Head(dim, hidden, out, norm=True)


class Prototypes(nn.Linear):
    """Cosines of embeddings and prototypes: [B, dim] -> [B, count], no bias (SwAV, section 3.1).

    Prototypes, the rows of ``weight`` (columns of the paper's C), have length 1 from the start;
    ``normalise`` brings them back to it, before the forward pass of each step.

    Args:
        dim: of the embeddings.
        count: of prototypes.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__(dim, count, bias=False)
        self.normalise()

    def normalise(self) -> None:
        """Scales each prototype to length 1, in place."""
        normalise_prototypes(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        """Scores in float32 (float64 stays), under autocast too; ``input`` need not be of length 1."""
        with torch.autocast(input.device.type, enabled=False):
            return nn.functional.linear(unit(input), wide(self.weight))


def hold_prototypes(prototypes: Prototypes, step: int, first: int) -> bool:
    """Keeps the prototypes as they are in the first optimiser steps; says whether it did.

    Call it between backward and the optimiser's step. Without a gradient, an optimiser leaves a
    parameter alone: no decay, no momentum. The official 313 are *iterations*, one epoch of ImageNet
    in batches of 4096.

    Args:
        prototypes: whose gradient is dropped.
        step: optimiser steps done.
        first: number of steps to hold them.
    """
    held = step < first
    if held:
        prototypes.weight.grad = None
    return held
