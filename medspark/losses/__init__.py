"""Losses; torch only."""

from medspark.losses.byol import byol_loss, regression_loss
from medspark.losses.moco import info_nce
from medspark.losses.ntxent import nt_xent
from medspark.losses.patch import (
    constant_baseline,
    masked_patch_loss,
    patchify,
    standardise,
    unpatchify,
)
from medspark.losses.swav import (
    assign_codes,
    normalise_prototypes,
    sinkhorn,
    swapped_prediction_loss,
    swav_loss,
)

__all__ = [
    "assign_codes",
    "byol_loss",
    "constant_baseline",
    "info_nce",
    "masked_patch_loss",
    "normalise_prototypes",
    "nt_xent",
    "patchify",
    "regression_loss",
    "sinkhorn",
    "standardise",
    "swapped_prediction_loss",
    "swav_loss",
    "unpatchify",
]
