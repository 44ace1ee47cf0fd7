"""SparK, masked modelling for CNNs (arXiv 2301.03580), on truly sparse volumes and images."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor, nn

from medspark.losses.patch import (
    constant_baseline,
    masked_patch_loss,
    patchify,
    standardise,
    unpatchify,
)
from medspark.models.axes import axes_of
from medspark.models.decoder import LightDecoder
from medspark.models.densify import Densify
from medspark.models.encoders import encoder_from_spec, encoder_spec
from medspark.models.pyramid import Pyramid, as_stride, spatial_dims
from medspark.sparse import BlockMask, BlockSparseTensor, Semantics


@dataclass(frozen=True)
class TargetOptions:
    """What the loss compares with; arguments of ``masked_patch_loss``."""

    normalise: bool = True
    eps: float = 1e-6
    variance_floor: float = 0.0


@dataclass
class SparKOutput:
    """Result of a SparK forward pass.

    Attributes:
        loss: scalar, mean over hidden patches.
        prediction: [B, C, (D,) H, W]; standardised per patch if the target is normalised.
        mask: which cells were visible.
        volume: the input, [B, C, D, H, W], or [B, C, H, W] of images.
        cell: voxels per mask cell (z, y, x), pixels (y, x) of images.
        target: what the loss compared with.
    """

    loss: Tensor
    prediction: Tensor
    mask: BlockMask
    volume: Tensor = field(repr=False)
    cell: tuple[int, ...]
    target: TargetOptions

    @cached_property
    def reconstruction(self) -> Tensor:
        """The input where visible, elsewhere the prediction in its units; no gradient.

        A normalised prediction is scaled and shifted by the statistics of the true patch, as
        SparK's own pictures are: brightness and contrast of a hidden patch are given, only its
        structure is predicted.
        """
        with torch.no_grad():
            patches = patchify(self.prediction.detach().to(self.volume.dtype), self.cell)
            truth = patchify(self.volume, self.cell)
            if self.target.normalise:
                _, mean, scale = standardise(truth, self.target.eps, self.target.variance_floor)
                patches = patches * scale + mean
            visible = self.mask.visible.to(truth.device).flatten(1).unsqueeze(-1)
            return unpatchify(
                torch.where(visible, truth, patches), self.volume.shape[2:], self.cell
            )

    def constant_loss(self) -> Tensor:
        """The loss that the best constant prediction has on the same masks."""
        with torch.no_grad():
            return constant_baseline(
                self.volume,
                self.mask.visible.to(self.volume.device),
                self.cell,
                self.target.normalise,
                self.target.eps,
                self.target.variance_floor,
            )


class SparK(nn.Module):
    """Encoder on visible cells only -> densify each level -> decoder -> loss on hidden cells.

    It works on volumes [B, C, D, H, W] if the encoder is a 3D network, and on images [B, C, H, W],
    with strides, cells and masks of two axes (y, x), if it is a 2D one: official SparK.

    Args:
        encoder: any CNN with strided stages; it stays unmodified, at ``pyramid.encoder``.
        decoder: takes dense maps fine to coarse; its ``level_widths`` say how wide.
        strides: total strides of the maps to use, fine to coarse, an int or one per axis each.
        in_channels: channels of the volume.
        cell: voxels per mask cell, an int or one per axis; default: the coarsest stride (official
            SparK).
        mask_ratio: share of cells hidden; ``round(n * (1 - ratio))`` cells of each sample stay
            visible.
        norm: norm of the visible voxels before densifying, "batch", "instance" or "identity".
        target: what the loss compares with.
        semantics: rule for levels coarser than the cell, and what pools do with hidden voxels.

    Raises:
        ValueError: a stride the encoder does not have, a ratio outside (0, 1), a decoder for other
            levels or another number of axes.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: LightDecoder,
        *,
        strides: Sequence[int | Sequence[int]] = (4, 8, 16, 32),
        in_channels: int = 1,
        cell: int | Sequence[int] | None = None,
        mask_ratio: float = 0.6,
        norm: str = "batch",
        target: TargetOptions | None = None,
        semantics: Semantics | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 < mask_ratio < 1.0:
            raise ValueError(f"mask_ratio must lie between 0 and 1, not {mask_ratio}")
        self.pyramid = Pyramid(encoder, in_channels, strides)
        if list(decoder.strides) != self.pyramid.strides:
            raise ValueError(
                f"the decoder is for strides {decoder.strides}, "
                f"the pyramid has {self.pyramid.strides}"
            )
        self.decoder = decoder
        self.cell = self.pyramid.strides[-1] if cell is None else as_stride(cell, self.dims)
        self.mask_ratio = mask_ratio
        self.target = target or TargetOptions()
        self.semantics = semantics or Semantics()
        last = len(self.pyramid.channels) - 1
        self.densify = nn.ModuleList(
            Densify(channels, width, coarsest=i == last, norm=norm, dims=self.dims)
            for i, (channels, width) in enumerate(
                zip(self.pyramid.channels, decoder.level_widths, strict=True)
            )
        )

    @property
    def encoder(self) -> nn.Module:
        """The untouched encoder."""
        return self.pyramid.encoder

    @property
    def dims(self) -> int:
        """Spatial axes: 3 for volumes, 2 for images."""
        return self.pyramid.dims

    @classmethod
    def build(
        cls, encoder_name: str, *, encoder_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> SparK:
        """SparK on a named encoder; ``options`` as in ``spark_spec``."""
        return build_spark(spark_spec(encoder_name, encoder_kwargs=encoder_kwargs, **options))

    def draw_mask(self, volume: Tensor, generator: Generator | None = None) -> BlockMask:
        """A random mask for [B, C, (D,) H, W], drawn on the CPU from ``generator``.

        Raises:
            ValueError: the volume is no multiple of the cell, or no cell would be hidden or
                visible.
        """
        grid = self.grid(volume)
        cells = math.prod(grid)
        kept = round(cells * (1 - self.mask_ratio))
        if not 0 < kept < cells:
            raise ValueError(
                f"mask ratio {self.mask_ratio} keeps {kept} of {cells} cells of {self.cell} in "
                f"an input {tuple(volume.shape[2:])}; use larger crops or smaller cells"
            )
        return BlockMask.random(
            volume.shape[0], grid, self.mask_ratio, generator=generator, device=volume.device
        )

    def grid(self, volume: Tensor) -> tuple[int, ...]:
        """Cells per axis of a volume [B, C, D, H, W], (z, y, x), or of images [B, C, H, W], (y, x).

        Raises:
            ValueError: another number of axes than the encoder's, or no multiple of the cell or of
                the coarsest stride.
        """
        axes = axes_of(self.dims)
        if volume.ndim != self.dims + 2:
            raise ValueError(
                f"SparK on a {self.dims}D encoder takes {axes.layout}, not {tuple(volume.shape)}"
            )
        size = tuple(volume.shape[2:])
        for name, unit in (("cell", self.cell), ("coarsest stride", self.pyramid.strides[-1])):
            if any(s % u for s, u in zip(size, unit, strict=True)):
                raise ValueError(
                    f"input {size} {axes.names} does not divide by the {name} {tuple(unit)}; "
                    "crop or pad it"
                )
        return tuple(s // c for s, c in zip(size, self.cell, strict=True))

    def forward(
        self, volume: Tensor, mask: BlockMask | None = None, generator: Generator | None = None
    ) -> SparKOutput:
        """Hides cells of [B, C, (D,) H, W] (normalised intensities), predicts them, compares.

        The encoder sees a ``BlockSparseTensor``, which hidden voxels are not part of.

        Args:
            volume: input and target.
            mask: True = visible, [B, *grid]; drawn from ``generator`` by default.
            generator: CPU generator for the mask.

        Raises:
            ValueError: see ``draw_mask`` and ``masked_patch_loss``.
        """
        grid = self.grid(volume)
        mask = self.draw_mask(volume, generator) if mask is None else mask.to(volume.device)
        expected = (volume.shape[0], *grid)
        if tuple(mask.visible.shape) != expected:
            raise ValueError(
                f"mask {tuple(mask.visible.shape)} should be {expected}: batch and cells"
            )
        maps = self.pyramid(BlockSparseTensor.from_dense(volume, mask, self.semantics))
        dense = [level(x) for level, x in zip(self.densify, maps, strict=True)]
        prediction = self.decoder(dense)
        loss = masked_patch_loss(
            prediction,
            volume,
            mask.visible,
            self.cell,
            self.target.normalise,
            self.target.eps,
            self.target.variance_floor,
        )
        return SparKOutput(loss, prediction, mask, volume, self.cell, self.target)


_SPEC_DEFAULTS: dict[str, Any] = {
    "strides": [4, 8, 16, 32],
    "in_channels": 1,
    "width": 768,
    "cell": None,
    "mask_ratio": 0.6,
    "norm": "batch",
    "normalise_target": True,
    "eps": 1e-6,
    "variance_floor": 0.0,
    "coarse": "any",
    "max_pool": "zero",
    "avg_divisor": "kernel",
}


def spark_spec(
    encoder_name: str, *, encoder_kwargs: Mapping[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """A complete, plain, JSON-safe description of a SparK model; the defaults are official SparK.

    A 2D encoder (``encoder_kwargs={"spatial_dims": 2}`` for a ResNet) makes a model for images.

    Args:
        encoder_name: see ``create_encoder``.
        encoder_kwargs: its options.
        **options: ``strides``, ``in_channels``, ``width`` (of the decoder at the coarsest level),
            ``cell``, ``mask_ratio``, ``norm``, ``normalise_target``, ``eps``, ``variance_floor``,
            ``coarse``, ``max_pool``, ``avg_divisor`` (see ``medspark.sparse.Semantics``).

    Raises:
        ValueError: unknown option.
    """
    unknown = sorted(set(options) - set(_SPEC_DEFAULTS))
    if unknown:
        raise ValueError(
            f"SparK has no option {', '.join(unknown)}; it takes {', '.join(_SPEC_DEFAULTS)}"
        )
    encoder = encoder_spec(encoder_name, **(encoder_kwargs or {}))
    return copy.deepcopy({"encoder": encoder, **_SPEC_DEFAULTS, **options})


def build_spark(spec: Mapping[str, Any]) -> SparK:
    """Builds the untrained model of a spec; entries that it lacks are the defaults.

    Raises:
        ValueError: unknown entries, or values that do not fit each other.
    """
    unknown = sorted(set(spec) - set(_SPEC_DEFAULTS) - {"encoder"})
    if unknown or "encoder" not in spec:
        raise ValueError(
            f"a SparK spec has 'encoder' and {', '.join(_SPEC_DEFAULTS)}; "
            + (f"unknown: {', '.join(unknown)}" if unknown else "'encoder' is missing")
        )
    full = {**_SPEC_DEFAULTS, **spec}
    encoder = encoder_from_spec(full["encoder"])
    decoder = LightDecoder(
        full["strides"], full["width"], full["in_channels"], spatial_dims(encoder)
    )
    return SparK(
        encoder,
        decoder,
        strides=full["strides"],
        in_channels=full["in_channels"],
        cell=full["cell"],
        mask_ratio=full["mask_ratio"],
        norm=full["norm"],
        target=TargetOptions(full["normalise_target"], full["eps"], full["variance_floor"]),
        semantics=Semantics(full["coarse"], full["max_pool"], full["avg_divisor"]),
    )
