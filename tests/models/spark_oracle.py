"""Official SparK (arXiv 2301.03580) in plain torch, on images or volumes: a training step by formulas.

Written from the paper's description as functions of a dictionary of weights and of a bool mask `[B, *grid]`
(True = visible), so that it shares no code with the package: every layer is the dense one of
`torch.nn.functional`, multiplied by the mask; norms are spelled out. The encoder is a residual network with
the names of MONAI's ResNet. Tensors are `[B, C, H, W]` or `[B, C, D, H, W]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
CONV = {4: F.conv2d, 5: F.conv3d}
CONV_TRANSPOSE = {4: F.conv_transpose2d, 5: F.conv_transpose3d}
MAX_POOL = {4: F.max_pool2d, 5: F.max_pool3d}
EPS, MOMENTUM = 1e-5, 0.1  # of the batch norms


def at(visible: Tensor, x: Tensor) -> Tensor:
    """The mask `[B, 1, *spatial]` in the resolution of x: every cell repeated a whole number of times."""
    mask = visible
    for axis in range(1, visible.ndim):
        mask = mask.repeat_interleave(x.shape[axis + 1] // visible.shape[axis], axis)
    assert mask.shape[1:] == x.shape[2:]
    return mask[:, None].to(x.dtype)


def conv(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """Dense convolution that keeps the size, but for the stride."""
    weight = state[f"{name}.weight"]
    padding = (weight.shape[-1] - 1) // 2
    return CONV[x.ndim](x, weight, state.get(f"{name}.bias"), stride, padding)


def sparse_conv(state: State, name: str, x: Tensor, visible: Tensor, stride: int = 1) -> Tensor:
    """Dense convolution, then the mask: hidden places are 0 again, the bias with them."""
    y = conv(state, name, x, stride)
    return y * at(visible, y)


def batch_norm(state: State, name: str, x: Tensor, visible: Tensor | None = None) -> Tensor:
    """Training batch norm over the visible places of the batch (all if None), 0 elsewhere."""
    mask = torch.ones_like(x[:, :1]) if visible is None else at(visible, x)
    axes = [i for i in range(x.ndim) if i != 1]
    shape = [1, -1] + [1] * (x.ndim - 2)
    n = mask.sum()
    mean = (x * mask).sum(axes) / n
    var = ((x - mean.view(shape)).square() * mask).sum(axes) / n
    with torch.no_grad():  # the running variance is the unbiased one
        state[f"{name}.running_mean"].lerp_(mean, MOMENTUM)
        state[f"{name}.running_var"].lerp_(var * n / (n - 1), MOMENTUM)
    y = (x - mean.view(shape)) / (var.view(shape) + EPS).sqrt()
    y = y * state[f"{name}.weight"].view(shape) + state[f"{name}.bias"].view(shape)
    return y * mask


def block(state: State, name: str, x: Tensor, visible: Tensor, stride: int) -> Tensor:
    """Basic (two convs) or bottleneck (three) residual block; the stride sits in a 3-wide conv."""
    deep = f"{name}.conv3.weight" in state
    y = x
    for i in (1, 2, 3) if deep else (1, 2):
        step = stride if i == (2 if deep else 1) else 1
        y = sparse_conv(state, f"{name}.conv{i}", y, visible, step)
        y = batch_norm(state, f"{name}.bn{i}", y, visible)
        y = y.relu() if i < (3 if deep else 2) else y
    if f"{name}.downsample.0.weight" in state:
        x = sparse_conv(state, f"{name}.downsample.0", x, visible, stride)
        x = batch_norm(state, f"{name}.downsample.1", x, visible)
    return (x + y).relu()


def encode(state: State, x: Tensor, visible: Tensor, slope: float = 0.0) -> list[Tensor]:
    """Maps of the four stages, fine to coarse (strides 4, 8, 16, 32), 0 at hidden places.

    `slope` is that of the stem's rectifier below 0. Where it is not 0, it matters that the max pool sees
    zeros at hidden places.
    """
    root = "pyramid.encoder"
    x = sparse_conv(state, f"{root}.conv1", x * at(visible, x), visible, 2)
    x = F.leaky_relu(batch_norm(state, f"{root}.bn1", x, visible), slope)
    x = MAX_POOL[x.ndim](x, 3, 2, 1)
    x = x * at(visible, x)
    maps = []
    for stage in (1, 2, 3, 4):
        for i in count():
            name = f"{root}.layer{stage}.{i}"
            if f"{name}.conv1.weight" not in state:
                break
            x = block(state, name, x, visible, 2 if stage > 1 and i == 0 else 1)
        maps.append(x)
    return maps


def densify(state: State, maps: Sequence[Tensor], visible: Tensor) -> list[Tensor]:
    """Coarse to fine: norm of visible places, token at hidden ones, projection to the decoder's width.

    From level to level the mask doubles along each axis. Returns the maps coarse to fine.
    """
    dense, mask = [], visible[:, None]
    for level in reversed(range(len(maps))):
        name, x = f"densify.{level}", maps[level]
        assert mask.shape[2:] == x.shape[2:]
        x = batch_norm(state, f"{name}.norm", x, visible)
        token = state[f"{name}.mask_token"].view([1, -1] + [1] * (x.ndim - 2)).expand_as(x)
        x = torch.where(mask.expand_as(x), x, token)
        if f"{name}.projection.weight" in state:  # none: same width, kept as it is
            assert state[f"{name}.projection.weight"].shape[2] == (3 if dense else 1)
            x = conv(state, f"{name}.projection", x)
        dense.append(x)
        for axis in range(2, x.ndim):
            mask = mask.repeat_interleave(2, axis)
    return dense


def decode(state: State, dense: Sequence[Tensor], blocks: int = 5) -> Tensor:
    """U-Net blocks from stride 32 to 1; the maps (coarse to fine) are added before the first four."""
    x = torch.zeros_like(dense[0])
    for i in range(blocks):
        name = f"decoder.blocks.{i}"
        x = x + dense[i] if i < len(dense) else x
        up = CONV_TRANSPOSE[x.ndim]
        x = up(x, state[f"{name}.up.weight"], state[f"{name}.up.bias"], stride=2, padding=1)
        assert state[f"{name}.up.weight"].shape[2] == 4
        x = batch_norm(state, f"{name}.conv.1", conv(state, f"{name}.conv.0", x)).clamp(0, 6)
        x = batch_norm(state, f"{name}.conv.4", conv(state, f"{name}.conv.3", x))
    return conv(state, "decoder.head", x)


def loss(prediction: Tensor, x: Tensor, visible: Tensor) -> Tensor:
    """Mean squared error of each hidden patch against the standardised one; their sum / (number + 1e-8).

    A patch is standardised over all its values, channels included, with the unbiased variance + 1e-6.
    """
    cell = [n // g for n, g in zip(x.shape[2:], visible.shape[1:], strict=True)]
    total = x.new_zeros(())
    for b, *place in (~visible).nonzero().tolist():
        span = tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, cell, strict=True))
        patch = x[(b, slice(None), *span)]
        mean = patch.sum() / patch.numel()
        var = (patch - mean).square().sum() / (patch.numel() - 1)
        target = (patch - mean) / (var + 1e-6).sqrt()
        error = prediction[(b, slice(None), *span)] - target
        total = total + error.square().sum() / patch.numel()
    return total / ((~visible).sum() + 1e-8)


def spark(
    state: State, x: Tensor, visible: Tensor, slope: float = 0.0
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss, prediction and encoder maps of one training step; updates the running statistics."""
    maps = encode(state, x, visible, slope)
    prediction = decode(state, densify(state, maps, visible))
    return loss(prediction, x, visible), prediction, maps
