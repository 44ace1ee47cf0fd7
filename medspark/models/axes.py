"""What differs between images and volumes: layers and names, by the number of spatial axes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Axes:
    """Layers and names for tensors of two or three spatial axes.

    Attributes:
        names: of the axes, for messages.
        layout: of a tensor, for messages.
        conv: convolution.
        conv_transpose: transposed convolution.
        batch_norm: norm over the batch.
        instance_norm: norm per sample.
        memory_format: channels last.
    """

    names: str
    layout: str
    conv: type[nn.Module]
    conv_transpose: type[nn.Module]
    batch_norm: type[nn.Module]
    instance_norm: type[nn.Module]
    memory_format: torch.memory_format


AXES = {
    2: Axes(
        "(y, x)",
        "[B, C, H, W]",
        nn.Conv2d,
        nn.ConvTranspose2d,
        nn.BatchNorm2d,
        nn.InstanceNorm2d,
        torch.channels_last,
    ),
    3: Axes(
        "(z, y, x)",
        "[B, C, D, H, W]",
        nn.Conv3d,
        nn.ConvTranspose3d,
        nn.BatchNorm3d,
        nn.InstanceNorm3d,
        torch.channels_last_3d,
    ),
}


def axes_of(dims: int) -> Axes:
    """What belongs to 2 (images) or 3 (volumes) spatial axes.

    Raises:
        ValueError: another number.
    """
    if dims not in AXES:
        raise ValueError(f"there are 2 spatial axes (images) or 3 (volumes), not {dims}")
    return AXES[dims]
