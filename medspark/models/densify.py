"""From packed visible voxels to the dense maps a decoder reads (SparK, arXiv 2301.03580)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from medspark.models.axes import Axes, axes_of
from medspark.sparse import BlockSparseTensor, densify

_NORMS: dict[str, Callable[[Axes, int], nn.Module]] = {
    "batch": lambda axes, channels: axes.batch_norm(channels),
    "instance": lambda axes, channels: axes.instance_norm(channels, affine=True),
    "identity": lambda axes, channels: nn.Identity(),
}


class Densify(nn.Module):
    """One level: norm of visible voxels, learned token at hidden ones, projection.

    Normalisation comes before the token, so its statistics are those of visible voxels. The
    projection of the coarsest level has kernel 1, or is none where the widths agree; that of other
    levels always has kernel 3. It keeps the framework's initialisation; the token is normal with SD .02, cut
    at +-.02.

    Args:
        channels: channels of the encoder's map.
        width: channels the decoder expects.
        coarsest: whether this is the pyramid's coarsest level.
        norm: ``"batch"`` (all visible voxels of the batch), ``"instance"`` or ``"identity"``.
        dims: 3 for volumes, 2 for images.

    Raises:
        ValueError: unknown ``norm`` or number of axes.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        coarsest: bool = False,
        norm: str = "batch",
        dims: int = 3,
    ) -> None:
        super().__init__()
        if norm not in _NORMS:
            raise ValueError(f"unknown densify norm {norm!r}; known are {', '.join(_NORMS)}")
        axes = axes_of(dims)
        self.norm = _NORMS[norm](axes, channels)
        self.mask_token = nn.Parameter(torch.zeros(channels))
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)
        self.projection: nn.Module
        if coarsest and channels == width:
            self.projection = nn.Identity()
        else:
            size = 1 if coarsest else 3
            self.projection = axes.conv(channels, width, size, padding=size // 2)
        self.to(memory_format=axes.memory_format)  # type: ignore[call-overload]

    def forward(self, x: BlockSparseTensor) -> Tensor:
        """[B, channels, (D,) H, W] with visible blocks only -> plain dense [B, width, (D,) H, W]."""
        dense: Tensor = self.projection(densify(self.norm(x), self.mask_token))
        return dense
