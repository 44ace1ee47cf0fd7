"""Views from boxes of int16 HU: one affine resampling each, then what a scanner and reader do.

The same code for one view and for a batch, on the CPU and on a GPU; they differ by rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from medspark.data.headers import AIR
from medspark.data.views_draw import Shot
from medspark.data.views_frame import Frame, close, in_volume, leaves, sampling, slab_matrix
from medspark.data.views_noise import normals
from medspark.data.windows import Intensity

_REACH = 3  # SDs at which a blur is cut
_SLACK = 1e-6


def render(
    boxes: Tensor, frames: Sequence[Frame], shots: Sequence[Shot], intensity: Intensity
) -> Tensor:
    """Finished views of one size.

    In this order: means over slabs, resampling (rotation, scale, mirroring), blur, contrast,
    brightness, noise, window and standardisation, cut-outs.

    Args:
        boxes: int16 `[B, 1, Z, Y, X]`, each view's frame in the first corner (`read_frame`).
        frames: Of each view.
        shots: The views, all of one size.
        intensity: The run's mean and SD, applied to the 0..1 of each view's own window.

    Returns:
        float32 `[B, 1, D, H, W]` on the device of `boxes`.
    """
    with _one_thread(boxes.device):
        return _rendered(boxes, frames, shots, intensity)


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU: torch cuts its loops by the number of threads, and the last bits go with the cuts.

    Loader processes have one thread anyway; what is rendered here has to be the same.
    """
    before = torch.get_num_threads()
    if device.type != "cpu" or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rendered(
    boxes: Tensor, frames: Sequence[Frame], shots: Sequence[Shot], intensity: Intensity
) -> Tensor:
    hu = boxes.float()
    for sample, frame in zip(hu, frames, strict=True):
        if any(frame.slabs):
            _average(sample[0], frame)
    shape, device = hu.shape[2:], hu.device
    pairs = list(zip(shots, frames, strict=True))
    grid = torch.stack([_places(s.size, *sampling(s, f, shape), device) for s, f in pairs])
    # Up to the faces of the volume the nearest voxel counts; beyond them is air.
    x = F.grid_sample(hu, grid, mode="bilinear", padding_mode="border", align_corners=False)
    for sample, (shot, frame) in zip(x, pairs, strict=True):
        if leaves(shot, frame):
            outside = _places(shot.size, *in_volume(shot, frame), device).abs() > 1 + _SLACK
            sample[0].masked_fill_(outside.any(-1), AIR)
        if shot.blur:
            sample[0] = blur(sample[0], [shot.blur / p for p in shot.pitch.tolist()])
    return _intensities(x, shots, intensity)


def _average(box: Tensor, frame: Frame) -> None:
    """Put the means over slabs into the first corner of a box, in place."""
    z, y, x = frame.extent
    means = box[:z, :y, :x]
    for axis, width in enumerate(frame.slabs):
        if width:
            matrix = torch.from_numpy(slab_matrix(frame, axis)).to(box.device)
            means = along(means, matrix, axis)
    z, y, x = means.shape
    box[:z, :y, :x] = means
    close(box, (z, y, x))


def along(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Apply `matrix` `[m, n]` along an axis of n values."""
    return torch.tensordot(matrix, x, dims=([1], [axis])).movedim(0, axis)


def _places(
    size: Sequence[int], matrix: np.ndarray, offset: np.ndarray, device: torch.device
) -> Tensor:
    """`matrix @ u + offset` at the voxels of a view, `[D, H, W, 3]` as (x, y, z) for `grid_sample`.

    In float64 but for the last two sums.
    """
    columns = []
    for axis, n in enumerate(size):
        u = (2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1
        part = u[:, None] * torch.from_numpy(matrix[::-1, axis].copy())
        columns.append(part if axis else part + torch.from_numpy(offset[::-1].copy()))
    z, y, x = (column.float().to(device) for column in columns)
    return (z[:, None] + y[None])[:, :, None] + x


def blur(x: Tensor, sigma: Sequence[float]) -> Tensor:
    """Gaussian blur of `[D, H, W]` with `sigma` voxels along each axis, edges repeated."""
    for axis, sd in enumerate(sigma):
        n = x.shape[axis]
        if n > 1:
            x = along(x, _gaussian(n, sd).to(x.device), axis)
    return x


def _gaussian(n: int, sd: float) -> Tensor:
    """`[n, n]`, rows sum to 1; what would come from beyond an end comes from the end."""
    reach = math.ceil(_REACH * sd)
    step = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (step / sd) ** 2)
    kernel /= kernel.sum()
    rows = torch.arange(n)[:, None].expand(n, len(step))
    columns = (rows + step.long()).clamp(0, n - 1)
    matrix = torch.zeros(n, n, dtype=torch.float64)
    return matrix.index_put_((rows, columns), kernel.expand(n, -1), accumulate=True).float()


def _intensities(x: Tensor, shots: Sequence[Shot], intensity: Intensity) -> Tensor:
    """HU `[B, 1, D, H, W]` to standardised values, in place."""

    def each(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=x.device).view(-1, 1, 1, 1, 1)

    if any(shot.contrast != 1 for shot in shots):
        x.addcmul_(x.clamp(min=0), each([shot.contrast - 1 for shot in shots]))
    if any(shot.brightness for shot in shots):
        x.add_(each([shot.brightness for shot in shots]))
    noisy = [b for b, shot in enumerate(shots) if shot.noise]
    if noisy:
        drawn = normals([shots[b].key for b in noisy], tuple(x.shape[1:]), x.device)
        drawn.mul_(each([shots[b].noise for b in noisy]))
        for b, noise in zip(noisy, drawn, strict=True):
            x[b].add_(noise)
    low, high = each([s.window[0] for s in shots]), each([s.window[1] for s in shots])
    scale = 1 / ((high - low) * intensity.std)
    x.clamp_(low, high).sub_(low + intensity.mean * (high - low)).mul_(scale)
    for b, shot in enumerate(shots):
        for start, end in shot.cutouts:
            z, y, w = (slice(a, e) for a, e in zip(start, end, strict=True))
            x[b, 0, z, y, w] = 0
    return x
