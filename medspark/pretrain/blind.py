"""Reconstruction from what was visible alone."""

from __future__ import annotations

import torch
from torch import Tensor

from medspark.losses.patch import patchify, standardise, unpatchify
from medspark.models.spark import SparKOutput


@torch.no_grad()
def blind_reconstruction(output: SparKOutput) -> Tensor:
    """The input where visible, elsewhere the prediction; nothing of the hidden voxels is used.

    A normalised prediction says nothing of brightness and contrast. ``SparKOutput.reconstruction``
    takes both from the true patch; here they are estimated from the visible patches of the sample,
    weighted by the inverse square of the distance in cells. So the picture is what the model could show
    of voxels that nobody has seen. With a raw target the two are the same.

    Returns:
        [B, C, D, H, W].
    """
    if not output.target.normalise:
        return output.reconstruction
    truth = patchify(output.volume, output.cell)
    visible = output.mask.visible.to(truth.device)
    _, mean, scale = standardise(truth, output.target.eps, output.target.variance_floor)
    weight = _nearness(visible.shape[1:], truth.device) * visible.flatten(1)[:, None, :]
    weight = (weight / weight.sum(-1, keepdim=True)).to(truth.dtype)
    patches = patchify(output.prediction.to(truth.dtype), output.cell)
    patches = patches * (weight @ scale) + weight @ mean
    patches = torch.where(visible.flatten(1)[..., None], truth, patches)
    return unpatchify(patches, output.volume.shape[2:], output.cell)


def _nearness(grid: torch.Size, device: torch.device) -> Tensor:
    """[N, N]: inverse square of the distance between cells; 1 for a cell and itself."""
    axes = [torch.arange(n, dtype=torch.float64, device=device) for n in grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
    return 1 / torch.cdist(places, places).square().clamp(min=1)
