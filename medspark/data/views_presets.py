"""Policies of the published contrastive methods, for volumes and for axial slices of CT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from medspark.data.views_policy import ViewPolicy

# Published strengths, turned into what a scanner and a reader do: colour jitter becomes window,
# contrast and brightness. Looked at on real CT: with an overlap of 0.3, or small views of 55 mm,
# many pairs showed no structure in common, or none at all; without a least share of body some
# showed air; noise of 25 HU hid the brain in a soft-tissue window, and in a brain window a shift of
# 20 HU blackened it.
_SIMCLR = ViewPolicy(
    edge_mm=(90.0, 160.0),
    aspect=1.05,
    min_overlap=0.5,
    shift=1.0,
    min_body=0.25,
    flips=(False, False, True),
    rotate=(12.0, 6.0, 6.0),
    level=0.05,
    width=1.25,
    contrast=0.15,
    brightness=25.0,
    window_cap=0.05,
    noise=15.0,
    noise_share=0.5,
    blur_mm=1.5,
    blur_share=(0.5,),
    thickness_mm=(3.0, 6.0),
    thickness_share=0.3,
    cutouts=1,
)
_MOCO = replace(_SIMCLR, edge_mm=(100.0, 160.0), contrast=0.1, cutouts=0)
_BYOL = replace(_SIMCLR, blur_share=(1.0, 0.1), cutouts=0)
_SWAV = replace(_SIMCLR, edge_mm=(105.0, 176.0), n_local=6, local_edge_mm=(64.0, 95.0), cutouts=0)


def _slices(policy: ViewPolicy, edge_mm: tuple[float, float]) -> ViewPolicy:
    return replace(
        policy,
        dims=2,
        size=(1, 224, 224),
        edge_mm=edge_mm,
        local_size=(1, 96, 96),
        local_edge_mm=(70.0, 108.0),
        rotate=(policy.rotate[0], 0.0, 0.0),
    )


PRESETS: dict[str, ViewPolicy] = {
    "none": ViewPolicy(),
    "simclr": _SIMCLR,
    "moco_v2": _MOCO,
    "byol": _BYOL,
    "swav": _SWAV,
    "simclr_2d": _slices(_SIMCLR, (90.0, 320.0)),
    "moco_v2_2d": _slices(_MOCO, (140.0, 320.0)),
    "byol_2d": _slices(_BYOL, (90.0, 320.0)),
    "swav_2d": _slices(_SWAV, (120.0, 320.0)),
}


def view_policy(choice: str | Mapping[str, Any] | ViewPolicy) -> ViewPolicy:
    """The policy meant by the name of a preset, its settings, or itself.

    Raises:
        ValueError: If there is no such preset or setting.
    """
    if isinstance(choice, ViewPolicy):
        return choice
    if not isinstance(choice, str):
        return ViewPolicy.from_dict(choice)
    if choice not in PRESETS:
        raise ValueError(f"unknown views '{choice}', choose one of {', '.join(PRESETS)}")
    return PRESETS[choice]
