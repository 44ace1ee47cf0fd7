"""Losses; torch only."""

from medspark.losses.patch import (
    constant_baseline,
    masked_patch_loss,
    patchify,
    standardise,
    unpatchify,
)

__all__ = [
    "constant_baseline",
    "masked_patch_loss",
    "patchify",
    "standardise",
    "unpatchify",
]
