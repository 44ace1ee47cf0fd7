"""SparK's light decoder in 2D and 3D (arXiv 2301.03580, section 3.2 and appendix)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from medspark.models.axes import axes_of
from medspark.models.pyramid import Stride, as_stride


def _steps(coarse: Stride, fine: Stride) -> list[Stride]:
    """Factors of 1 or 2 per axis that lead from one stride to a finer one, largest first."""
    steps = []
    current = coarse
    while current != fine:
        if any(
            c < f or c % f or (c // f) & (c // f - 1) for c, f in zip(current, fine, strict=True)
        ):
            raise ValueError(
                f"the decoder upsamples by 2, so stride {coarse} cannot lead to {fine}: each axis "
                "needs a ratio that is a power of two"
            )
        step = tuple(2 if c > f else 1 for c, f in zip(current, fine, strict=True))
        current = tuple(c // s for c, s in zip(current, step, strict=True))
        steps.append(step)
    return steps


class UpBlock(nn.Module):
    """Transposed conv (factor 1 or 2 per axis), conv3 + BN + ReLU6, conv3 + BN.

    It has as many axes as ``factor`` has entries.
    """

    def __init__(self, channels_in: int, channels_out: int, factor: Stride) -> None:
        super().__init__()
        axes = axes_of(len(factor))
        kernel = tuple(4 if f == 2 else 3 for f in factor)
        self.up = axes.conv_transpose(channels_in, channels_in, kernel, stride=factor, padding=1)
        self.conv = nn.Sequential(
            axes.conv(channels_in, channels_in, 3, padding=1, bias=False),
            axes.batch_norm(channels_in),
            nn.ReLU6(inplace=True),
            axes.conv(channels_in, channels_out, 3, padding=1, bias=False),
            axes.batch_norm(channels_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels_in, (D,) H, W] -> [B, channels_out, (D*fz,) H*fy, W*fx]."""
        y: Tensor = self.conv(self.up(x))
        return y


class LightDecoder(nn.Module):
    """Up from the coarsest level to stride 1, one block per factor of two, widths halving.

    Maps of finer levels are added before the block that starts at their stride. Official SparK:
    strides (4, 8, 16, 32), width 768, so widths 768-384-192-96-48-24 and five blocks.

    Args:
        strides: total strides of the maps, fine to coarse, an int or one per axis ((z, y, x) or
            (y, x)) each.
        width: channels at the coarsest level, a multiple of two to the number of blocks.
        out_channels: channels of the prediction.
        dims: 3 for volumes, 2 for images; default as many as the strides have entries, 3 where all
            are ints.

    Attributes:
        dims: spatial axes, 2 or 3.
        strides: as given, one entry per axis.
        widths: channels before each block, and behind the last.
        level_widths: channels expected of each map, fine to coarse.

    Raises:
        ValueError: strides do not nest by powers of two or do not fit the number of axes, or the
            width cannot be halved often enough.
    """

    def __init__(
        self,
        strides: Sequence[int | Sequence[int]],
        width: int = 768,
        out_channels: int = 1,
        dims: int | None = None,
    ) -> None:
        super().__init__()
        if not strides:
            raise ValueError("a decoder needs at least one level")
        given = [len(s) for s in strides if not isinstance(s, int)]
        self.dims = dims if dims is not None else (given[0] if given else 3)
        self.strides = [as_stride(s, self.dims) for s in strides]
        factors: list[Stride] = []
        starts = []  # index of the block before which each level is added, coarse to fine
        targets = [*self.strides[-2::-1], (1,) * self.dims]
        for coarse, fine in zip(self.strides[::-1], targets, strict=True):
            starts.append(len(factors))
            factors += _steps(coarse, fine)
        if width <= 0 or width % (1 << len(factors)):
            raise ValueError(
                f"decoder width {width} must be a multiple of {1 << len(factors)}: it is halved by "
                f"each of the {len(factors)} blocks from stride {self.strides[-1]} to 1"
            )
        self.widths = [width >> i for i in range(len(factors) + 1)]
        self.level_widths = [self.widths[i] for i in starts[::-1]]
        self._level_of_block = {block: -1 - i for i, block in enumerate(starts)}
        self.blocks = nn.ModuleList(
            UpBlock(a, b, f) for a, b, f in zip(self.widths, self.widths[1:], factors, strict=False)
        )
        axes = axes_of(self.dims)
        self.head = axes.conv(self.widths[-1], out_channels, 1)
        self.apply(_initialise)
        self.to(memory_format=axes.memory_format)  # type: ignore[call-overload]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Dense maps [B, level_widths[i], (D/s_i,) ...], fine to coarse -> [B, out, (D,) H, W]."""
        if len(maps) != len(self.strides):
            raise ValueError(f"the decoder has {len(self.strides)} levels, not {len(maps)}")
        memory_format = axes_of(self.dims).memory_format
        x = maps[-1]
        for i, block in enumerate(self.blocks):
            level = self._level_of_block.get(i)
            if i > 0 and level is not None:
                x = x + maps[level]
            x = block(x.contiguous(memory_format=memory_format))
        # A pyramid that reaches stride 1 adds its finest map behind the last block.
        level = self._level_of_block.get(len(self.blocks))
        if level is not None and len(self.blocks) > 0:
            x = x + maps[level]
        prediction: Tensor = self.head(x)
        return prediction


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
        nn.init.ones_(module.weight)
    bias = getattr(module, "bias", None)  # of a layer of any kind
    if isinstance(bias, Tensor):
        nn.init.zeros_(bias)
