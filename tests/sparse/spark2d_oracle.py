"""Official SparK on images (arXiv 2301.03580): dense tensors, and a mask multiplied in at every layer.

Written from the paper's description as plain functions of a dictionary of weights, so that it shares no
code with the package. Tensors are `[B, C, H, W]`, `visible` is bool `[B, Gy, Gx]`, True = visible. The
encoder is a small residual network: stem, max pool, stages of one block each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


def at(visible: Tensor, x: Tensor) -> Tensor:
    """The mask [B, 1, H, W] in the resolution of x: every cell repeated a whole number of times."""
    rows, columns = x.shape[-2] // visible.shape[-2], x.shape[-1] // visible.shape[-1]
    mask = visible.repeat_interleave(rows, -2).repeat_interleave(columns, -1)[:, None]
    assert mask.shape[2:] == x.shape[2:]
    return mask.to(x.dtype)


def conv(state: State, name: str, x: Tensor, stride: int, padding: int, visible: Tensor) -> Tensor:
    """Dense convolution, then the mask: hidden places are 0 again, the bias with them."""
    y = F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), stride, padding)
    return y * at(visible, y)


def batch_norm(state: State, name: str, x: Tensor, visible: Tensor | None = None) -> Tensor:
    """1D batch norm (training) of the list of visible places of the batch; of all places if None."""
    rows = x.permute(0, 2, 3, 1)
    shown = torch.ones_like(rows[..., 0]) if visible is None else at(visible, x)[:, 0]
    listed = F.batch_norm(
        rows[shown > 0], state[f"{name}.running_mean"], state[f"{name}.running_var"],
        state[f"{name}.weight"], state[f"{name}.bias"], training=True,
    )  # fmt: skip
    y = torch.zeros_like(rows)
    y[shown > 0] = listed
    return y.permute(0, 3, 1, 2)


def encode(state: State, x: Tensor, visible: Tensor, strides: Sequence[int]) -> list[Tensor]:
    """Maps of all stages, fine to coarse, 0 at hidden places."""
    x = conv(state, "encoder.stem", x * at(visible, x), 2, 3, visible)
    x = batch_norm(state, "encoder.norm", x, visible).relu()
    x = F.max_pool2d(x, 3, 2, 1)
    x = x * at(visible, x)
    maps = []
    for i, stride in enumerate(strides):
        name = f"encoder.stages.{i}"
        y = conv(state, f"{name}.conv1", x, stride, 1, visible)
        y = batch_norm(state, f"{name}.norm1", y, visible).relu()
        y = conv(state, f"{name}.conv2", y, 1, 1, visible)
        y = batch_norm(state, f"{name}.norm2", y, visible)
        x = (y + conv(state, f"{name}.shortcut", x, stride, 0, visible)).relu()
        maps.append(x)
    return maps


def densify(state: State, maps: Sequence[Tensor], visible: Tensor) -> list[Tensor]:
    """Norm of the visible places, mask token at the hidden ones, projection to the decoder's width."""
    dense = []
    for i, x in enumerate(maps):
        x = batch_norm(state, f"densify.{i}.norm", x, visible)
        mask = at(visible, x)
        x = x * mask + state[f"densify.{i}.mask_token"].view(1, -1, 1, 1) * (1 - mask)
        weight = state.get(f"densify.{i}.projection.weight")  # none: same width, kept as it is
        if weight is not None:
            x = F.conv2d(
                x, weight, state[f"densify.{i}.projection.bias"], padding=weight.shape[-1] // 2
            )
        dense.append(x)
    return dense


def decode(state: State, maps: Sequence[Tensor], size: int) -> Tensor:
    """U-Net blocks from the coarsest map to `size` rows; finer maps are added before their block."""
    finer = {x.shape[-2]: x for x in maps[:-1]}
    x, i = maps[-1], 0
    while x.shape[-2] < size:
        name = f"decoder.blocks.{i}"
        x = x + finer[x.shape[-2]] if x.shape[-2] in finer else x
        x = F.conv_transpose2d(x, state[f"{name}.up.weight"], state[f"{name}.up.bias"], 2, 1)
        x = F.conv2d(x, state[f"{name}.conv.0.weight"], padding=1)
        x = F.relu6(batch_norm(state, f"{name}.conv.1", x))
        x = F.conv2d(x, state[f"{name}.conv.3.weight"], padding=1)
        x = batch_norm(state, f"{name}.conv.4", x)
        i += 1
    return F.conv2d(x, state["decoder.head.weight"], state["decoder.head.bias"])


def loss(prediction: Tensor, image: Tensor, visible: Tensor, count_eps: float = 1e-8) -> Tensor:
    """Squared error against standardised patches, averaged in each, then over the hidden patches.

    `count_eps` is what the official code adds to the number of hidden patches.
    """
    total = prediction.new_zeros(())
    cell = [n // g for n, g in zip(image.shape[2:], visible.shape[1:], strict=True)]
    for b, gy, gx in (~visible).nonzero().tolist():
        rows = slice(gy * cell[0], (gy + 1) * cell[0])
        columns = slice(gx * cell[1], (gx + 1) * cell[1])
        patch = image[b, :, rows, columns]
        mean = patch.sum() / patch.numel()
        var = (patch - mean).square().sum() / (patch.numel() - 1)
        target = (patch - mean) / torch.sqrt(var + 1e-6)
        error = prediction[b, :, rows, columns] - target
        total = total + error.square().sum() / math.prod(patch.shape)
    return total / ((~visible).sum() + count_eps)


def spark(
    state: State,
    image: Tensor,
    visible: Tensor,
    strides: Sequence[int],
    count_eps: float = 1e-8,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss, prediction and encoder maps of one training step; updates the running statistics."""
    maps = encode(state, image, visible, strides)
    prediction = decode(state, densify(state, maps, visible), image.shape[-2])
    return loss(prediction, image, visible, count_eps), prediction, maps
