"""What the HU of a patch tell without their places: a logistic regression on histograms.

The baseline of every task on patches: a network that does not beat it has learned nothing about
shape or texture. It sees how much air, fat, muscle, contrast agent and bone there is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from medspark.data.task_types import Sample, Task
from medspark.data.tasks import grey_to_hu
from medspark.data.windows import Intensity

BINS = 64
_STEPS = 200


def histograms(task: Task, samples: Sequence[Sample], intensity: Intensity) -> torch.Tensor:
    """Square roots of the shares of voxels in equal bins of the window, ends included.

    Roots make the noise of rare and of frequent values alike (Hellinger).

    Returns:
        float64 `[len(samples), 64]`.
    """
    rows = []
    for sample in samples:
        voxels = torch.from_numpy(task.read(sample)[0].copy())
        hu = grey_to_hu(voxels, intensity) if task.grey else voxels
        scaled = (hu.double() - intensity.window.low) / intensity.window.width
        bins = (scaled * BINS).floor().clamp(0, BINS - 1).long().flatten()
        rows.append((torch.bincount(bins, minlength=BINS).double() / bins.numel()).sqrt())
    return torch.stack(rows)


def histogram_baseline(
    task: Task,
    *,
    fit_on: str = "train",
    test_on: str = "test",
    intensity: Intensity | None = None,
    penalty: float = 0.1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit a logistic regression on the histograms of one split, apply it to another.

    Features are standardised by the mean and SD of the training split; classes count alike
    whatever their size. Deterministic.

    Args:
        task: The task.
        fit_on: Split to fit on.
        test_on: Split to apply to.
        intensity: Window of the histogram, the wide one by default.
        penalty: Weight of the sum of squared coefficients.

    Returns:
        Probabilities float64 `[N, classes]` and labels int64 `[N]` of `test_on`.

    Raises:
        ValueError: If a split does not exist, or a class is missing from `fit_on`.
    """
    intensity = intensity or Intensity.named("wide")
    train, test = task.split(fit_on), task.split(test_on)
    labels = torch.tensor([s.label for s in train])
    counts = torch.bincount(labels, minlength=len(task.class_names))
    if not counts.all():
        lacking = task.class_names[int(np.flatnonzero(counts.numpy() == 0)[0])]
        raise ValueError(f"the split '{fit_on}' has no sample of class '{lacking}'")
    x, y = histograms(task, train, intensity), histograms(task, test, intensity)
    mean, sd = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    x, y = (x - mean) / sd, (y - mean) / sd
    weight = torch.zeros(x.shape[1], len(counts), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(counts), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, line_search_fn="strong_wolfe")
    balance = len(labels) / (len(counts) * counts.double())

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(x @ weight + bias, labels, weight=balance)
        value = value + penalty * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    with torch.no_grad():
        return (y @ weight + bias).softmax(dim=1), torch.tensor([s.label for s in test])
