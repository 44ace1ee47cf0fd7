"""An encoder inside nnU-Net's own network, in the file that nnU-Net starts from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medspark.models.encoders import encoder_options
from medspark.pretrain.plan import Plan

NETWORK_WEIGHTS = "network_weights"
NETWORK_CLASS = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
_CLASSES = 2  # of the segmentation layers, which nnU-Net never takes over


def unet_options(plan: Plan) -> dict[str, Any]:
    """``arch_kwargs`` of the network in nnU-Net's plans, axes (z, y, x), classes named as there.

    Raises:
        ValueError: the plan's encoder is no part of that network.
    """
    if plan["encoder"]["name"] != "resenc":
        raise ValueError(
            f"the encoder {plan['encoder']['name']!r} is no part of nnU-Net's networks; target="
            "nnunet takes checkpoints of model=resenc, others are exported with target=encoder"
        )
    options = encoder_options(plan["encoder"])
    stages = len(options["features_per_stage"])
    arch = {
        "n_stages": stages,
        "features_per_stage": list(options["features_per_stage"]),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": _per_stage(options["kernel_sizes"], stages),
        "strides": _per_stage(options["strides"], stages),
        "n_blocks_per_stage": _counts(options["n_blocks_per_stage"], stages),
        "n_conv_per_stage_decoder": [1] * (stages - 1),
        "conv_bias": options["conv_bias"],
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    if options["stem_channels"] is not None:
        arch["stem_channels"] = options["stem_channels"]
    return arch


def unet_file(encoder: nn.Module, plan: Plan, seed: int) -> dict[str, dict[str, Tensor]]:
    """Content of a file for ``-pretrained_weights``: the U-Net around a trained encoder.

    The decoder is initialised as nnU-Net does it, from ``seed``. nnU-Net's loader asks for every
    key of the network except those of ``seg_layers``, and for equal shapes; the decoder's alias of
    the encoder (``decoder.encoder.``) is such a key.

    Raises:
        ValueError: see ``unet_options``.
    """
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    options = unet_options(plan) | {
        "conv_op": nn.Conv3d,
        "norm_op": nn.InstanceNorm3d,
        "nonlin": nn.LeakyReLU,
    }
    channels = encoder_options(plan["encoder"])["input_channels"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ResidualEncoderUNet(input_channels=channels, num_classes=_CLASSES, **options)
        network.apply(network.initialize)
    network.encoder.load_state_dict(encoder.state_dict(), strict=True)
    return {NETWORK_WEIGHTS: dict(network.state_dict())}


def encoder_part(content: dict[str, Any]) -> dict[str, Any]:
    """Weights of the encoder alone, of what ``unet_file`` made."""
    network = content[NETWORK_WEIGHTS]
    items = network.items() if isinstance(network, dict) else ()
    return {
        name.removeprefix("encoder."): value
        for name, value in items
        if isinstance(name, str) and name.startswith("encoder.")
    }


def _per_stage(value: Any, stages: int) -> list[list[int]]:
    """``3``, ``[1, 2, 2]`` or ``[[1, 3, 3], ...]`` as a (z, y, x) triple for each stage."""
    listed = list(value) if isinstance(value, list | tuple) else [value] * stages
    return [list(v) if isinstance(v, list | tuple) else [v] * 3 for v in listed]


def _counts(value: Any, stages: int) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value] * stages
