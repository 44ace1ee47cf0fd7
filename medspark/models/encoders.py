"""Encoders by name: a plain, JSON-safe spec is all that a checkpoint carries.

A spec is ``{"name": str, "kwargs": {...}}``. Names and keyword arguments are looked up in closed
tables, so a hostile checkpoint can neither name a callable nor make a constructor download weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

EncoderSpec = dict[str, Any]

# Block type and blocks per stage (He et al., arXiv 1512.03385, table 1; ResNet-10 as in MONAI).
_RESNETS: dict[str, tuple[str, list[int]]] = {
    "resnet10": ("basic", [1, 1, 1, 1]),
    "resnet18": ("basic", [2, 2, 2, 2]),
    "resnet34": ("basic", [3, 4, 6, 3]),
    "resnet50": ("bottleneck", [3, 4, 6, 3]),
    "resnet101": ("bottleneck", [3, 4, 23, 3]),
}
_RESNET_DEFAULTS: dict[str, Any] = {
    "block_inplanes": [64, 128, 256, 512],
    "spatial_dims": 3,
    "n_input_channels": 1,
    "conv1_t_size": 7,
    "conv1_t_stride": 2,
    "no_max_pool": False,
    "shortcut_type": "B",
    "widen_factor": 1.0,
    "num_classes": 400,
    "feed_forward": False,
    "bias_downsample": True,
    "act": ["relu", {"inplace": True}],
    "norm": "batch",
}
# ResEnc-L of nnU-Net / nnssl (arXiv 2410.23132): six stages, stride 1 then five times 2.
_RESENC_DEFAULTS: dict[str, Any] = {
    "input_channels": 1,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "kernel_sizes": 3,
    "strides": [1, 2, 2, 2, 2, 2],
    "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
    "conv_bias": True,
    "stem_channels": None,
}


def _resnet(name: str, kwargs: dict[str, Any]) -> nn.Module:
    from monai.networks.nets.resnet import ResNet

    block, layers = _RESNETS[name]
    for key in ("act", "norm"):  # MONAI takes (name, options) as a tuple; JSON has lists only
        if isinstance(kwargs[key], list):
            kwargs[key] = tuple(kwargs[key])
    return ResNet(block, layers, **kwargs)


def _resenc(name: str, kwargs: dict[str, Any]) -> nn.Module:
    try:
        from dynamic_network_architectures.building_blocks import residual_encoders
    except ImportError as error:
        raise ImportError(
            "the 'resenc' encoder needs dynamic-network-architectures; install it with "
            "'pip install --no-deps dynamic-network-architectures' (--no-deps, because it lists "
            "torchvision, which breaks Lightning next to a CPU build of torch)"
        ) from error
    return residual_encoders.ResidualEncoder(  # type: ignore[no-any-return, unused-ignore]
        n_stages=len(kwargs["features_per_stage"]),
        conv_op=nn.Conv3d,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        return_skips=True,
        **kwargs,
    )


_Builder = Callable[[str, dict[str, Any]], nn.Module]
_REGISTRY: dict[str, tuple[_Builder, dict[str, Any]]] = {
    **{name: (_resnet, _RESNET_DEFAULTS) for name in _RESNETS},
    "resenc": (_resenc, _RESENC_DEFAULTS),
}


def encoder_names() -> list[str]:
    """Names that ``create_encoder`` knows."""
    return sorted(_REGISTRY)


def create_encoder(name: str, **kwargs: Any) -> nn.Module:
    """Builds an encoder of a public library: its own class, its own ``state_dict`` keys.

    ``resnet10/18/34/50/101`` are ``monai.networks.nets.ResNet`` with ``n_input_channels=1``,
    ``conv1_t_stride=2`` (total stride 32) and ``feed_forward=False`` unless asked otherwise;
    ``resenc`` is the encoder of nnU-Net's ``ResidualEncoderUNet`` (total stride 32, a map per
    stage).

    Args:
        name: one of ``encoder_names()``.
        **kwargs: options of that encoder, numbers, strings, lists and plain dicts only.

    Raises:
        ValueError: unknown name, unknown option, or options the network does not accept.
        ImportError: ``resenc`` without its package.
    """
    if name not in _REGISTRY:
        raise ValueError(f"unknown encoder {name!r}; known are {', '.join(encoder_names())}")
    build, defaults = _REGISTRY[name]
    unknown = sorted(set(kwargs) - set(defaults))
    if unknown:
        raise ValueError(
            f"encoder {name!r} has no option {', '.join(unknown)}; it takes {', '.join(defaults)}"
        )
    _check_plain(kwargs, f"options of encoder {name!r}")
    try:
        return build(name, {**defaults, **kwargs})
    except (TypeError, ValueError, AssertionError, IndexError, KeyError) as error:
        raise ValueError(f"encoder {name!r} does not accept {kwargs}: {error}") from error


def encoder_spec(name: str, **kwargs: Any) -> EncoderSpec:
    """The plain dict that ``encoder_from_spec`` rebuilds an (untrained) encoder from."""
    return {"name": name, "kwargs": dict(kwargs)}


def encoder_options(spec: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a spec that ``encoder_from_spec`` accepts, defaults included."""
    return {**_REGISTRY[spec["name"]][1], **spec.get("kwargs", {})}


def encoder_from_spec(spec: Mapping[str, Any]) -> nn.Module:
    """Builds the encoder of a spec ``{"name": ..., "kwargs": {...}}``.

    Raises:
        ValueError: the spec is not of that form, or ``create_encoder`` refuses it.
    """
    if not isinstance(spec, Mapping) or set(spec) - {"name", "kwargs"} or "name" not in spec:
        raise ValueError(f"an encoder spec is {{'name': ..., 'kwargs': {{...}}}}, not {spec!r}")
    kwargs = spec.get("kwargs", {})
    if not isinstance(spec["name"], str) or not isinstance(kwargs, Mapping):
        raise ValueError(f"an encoder spec is {{'name': str, 'kwargs': dict}}, not {spec!r}")
    return create_encoder(spec["name"], **kwargs)


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: key {key!r} is not a string")
            _check_plain(item, f"{where}: {key}")
    elif isinstance(value, list | tuple):
        for item in value:
            _check_plain(item, where)
    elif not (value is None or isinstance(value, bool | int | float | str)):
        raise ValueError(
            f"{where}: {value!r} is a {type(value).__name__}, not a number, string, list or dict"
        )
