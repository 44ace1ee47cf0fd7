"""Networks of MONAI and nnU-Net, built as their users build them, and two styles of blocks built here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
MONAI, NNUNET, OURS = "MONAI", "dynamic-network-architectures", "built in the test"


def whole(net: nn.Module, x: Tensor) -> Any:
    return net(x)


@dataclass(frozen=True)
class Network:
    """A network, the volume it is tried on, and which of its parts are called."""

    source: str
    build: Callable[[], nn.Module]
    volume: tuple[int, ...]
    grid: tuple[int, ...]
    call: Callable[[nn.Module, Tensor], Any] = whole
    remark: str = ""


def monai(name: str, **arguments: Any) -> nn.Module:
    from monai.networks import nets

    net: nn.Module = getattr(nets, name)(**arguments)
    return net


def monai_resnet(name: str, spatial_dims: int = 3) -> nn.Module:
    return monai(
        name, n_input_channels=1, conv1_t_stride=2, num_classes=3, spatial_dims=spatial_dims
    )


def senet() -> nn.Module:
    return monai(
        "SENet", spatial_dims=3, in_channels=1, block="se_bottleneck", layers=(1, 1, 1, 1),
        groups=8, reduction=16, inplanes=32, downsample_kernel_size=1, num_classes=3,
    )  # fmt: skip


def flexible_unet(backbone: str) -> nn.Module:
    return monai(
        "FlexibleUNet", in_channels=1, out_channels=2, backbone=backbone, spatial_dims=3,
        decoder_channels=(64, 32, 16, 8, 8),
    )  # fmt: skip


def basic_unet() -> nn.Module:
    return monai("BasicUNet", features=(16, 16, 32, 64, 128, 16))


def basic_unet_encoder(net: nn.Module, x: Tensor) -> list[Tensor]:
    levels = [net.get_submodule("conv_0")(x)]
    for i in range(1, 5):
        levels.append(net.get_submodule(f"down_{i}")(levels[-1]))
    return levels


def vnet_encoder(net: nn.Module, x: Tensor) -> list[Tensor]:
    levels = [net.get_submodule("in_tr")(x)]
    for channels in (32, 64, 128, 256):
        levels.append(net.get_submodule(f"down_tr{channels}")(levels[-1]))
    return levels


def _nnunet(axes: int = 3) -> dict[str, Any]:
    return {
        "input_channels": 1, "n_stages": 5, "features_per_stage": (8, 16, 24, 32, 40),
        "conv_op": CONV[axes], "kernel_sizes": 3, "strides": (1, 2, 2, 2, 2), "conv_bias": True,
        "norm_op": {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[axes],
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip


def residual_unet() -> nn.Module:
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    net: nn.Module = ResidualEncoderUNet(
        **_nnunet(), n_blocks_per_stage=(1, 2, 2, 2, 2), num_classes=2, n_conv_per_stage_decoder=1
    )
    return net


def residual_encoder() -> nn.Module:
    return residual_unet().get_submodule("encoder")


def residual_encoder_with(axes: int = 3, **options: Any) -> nn.Module:
    from dynamic_network_architectures.building_blocks import residual_encoders

    net: nn.Module = residual_encoders.ResidualEncoder(
        **_nnunet(axes), n_blocks_per_stage=(1, 2, 2, 2, 2), return_skips=True, **options
    )
    return net


def plain_unet() -> nn.Module:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    net: nn.Module = PlainConvUNet(
        **_nnunet(), n_conv_per_stage=2, num_classes=2, n_conv_per_stage_decoder=2,
        deep_supervision=True,
    )  # fmt: skip
    return net


def drop_path(x: Tensor, p: float, training: bool) -> Tensor:
    """Drops the branch of whole samples, as timm and the ConvNeXt code do."""
    if not training:
        return x
    kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - p)
    return x * kept.div_(1 - p)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over axis 1, by way of the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.permute(0, *range(2, x.ndim), 1))
        return y.permute(0, x.ndim - 1, *range(1, x.ndim - 1))


class ConvNeXtBlock(nn.Module):
    """Depthwise 7, channels last, layer norm, two linear layers, layer scale (arXiv 2201.03545)."""

    def __init__(self, channels: int, axes: int) -> None:
        super().__init__()
        self.depthwise = CONV[axes](channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, 4 * channels)
        self.reduce = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, *range(2, x.ndim), 1)
        y = self.gamma * self.reduce(F.gelu(self.expand(self.norm(y))))
        return x + drop_path(y.permute(0, x.ndim - 1, *range(1, x.ndim - 1)), 0.2, self.training)


def convnext(axes: int) -> nn.Module:
    conv = CONV[axes]
    return nn.Sequential(
        conv(1, 16, 4, stride=4), ChannelNorm(16), ConvNeXtBlock(16, axes), ConvNeXtBlock(16, axes),
        ChannelNorm(16), conv(16, 32, 2, stride=2), ConvNeXtBlock(32, axes),
        ChannelNorm(32), conv(32, 48, 2, stride=2), ConvNeXtBlock(48, axes),
    )  # fmt: skip


class MedNeXtBlock(nn.Module):
    """Depthwise conv, one group per channel, expansion, GELU, optionally GRN (arXiv 2303.09975)."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int, response: bool) -> None:
        super().__init__()
        self.depthwise = nn.Conv3d(n_in, n_in, kernel, stride, kernel // 2, groups=n_in)
        self.norm = nn.GroupNorm(n_in, n_in)
        self.expand, self.reduce = nn.Conv3d(n_in, 2 * n_in, 1), nn.Conv3d(2 * n_in, n_out, 1)
        self.skip = nn.Conv3d(n_in, n_out, 1, stride) if stride > 1 else nn.Identity()
        self.response = response
        if response:
            self.beta = nn.Parameter(torch.full((1, 2 * n_in, 1, 1, 1), 0.1))
            self.gamma = nn.Parameter(torch.full((1, 2 * n_in, 1, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.expand(self.norm(self.depthwise(x))))
        if self.response:
            energy = torch.norm(y, p=2, dim=(-3, -2, -1), keepdim=True)
            share = energy / (energy.mean(dim=1, keepdim=True) + 1e-6)
            y = self.gamma * (y * share) + self.beta + y
        return self.skip(x) + self.reduce(y)


def mednext(kernel: int, response: bool) -> nn.Module:
    widths = ((16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
    blocks = (MedNeXtBlock(a, b, kernel, stride, response) for a, b, stride in widths)
    return nn.Sequential(nn.Conv3d(1, 16, 1), *blocks)


def _efficientnet() -> nn.Module:
    return monai(
        "EfficientNetBN", model_name="efficientnet-b0", pretrained=False, spatial_dims=3,
        in_channels=1, num_classes=3,
    )  # fmt: skip


def _encoder(backbone: str) -> nn.Module:
    return flexible_unet(backbone).get_submodule("encoder")


# The coarsest levels have 2, 4 and 8 voxels a volume: what one makes of 2 voxels, instance norm does not
# forgive in float32.
SMALL, CUBE, LARGE, WIDE = (32, 16, 16), (32, 32, 32), (64, 32, 32), (64, 64, 32)
FEW, MANY = (2, 1, 1), (4, 2, 2)

# fmt: off
NETWORKS: dict[str, Network] = {
    "ResNet-10": Network(MONAI, lambda: monai_resnet("resnet10"), LARGE, MANY),
    "ResNet-18": Network(MONAI, lambda: monai_resnet("resnet18"), LARGE, FEW),
    "ResNet-50": Network(MONAI, lambda: monai_resnet("resnet50"), WIDE, MANY),
    "ResNet-10, images": Network(MONAI, lambda: monai_resnet("resnet10", 2), (128, 64), (4, 2)),
    "ResNet-18, images": Network(MONAI, lambda: monai_resnet("resnet18", 2), (128, 64), (8, 4)),
    "ResNet-50, images": Network(MONAI, lambda: monai_resnet("resnet50", 2), (128, 128), (4, 4)),
    "SegResNet encoder": Network(
        MONAI, lambda: monai("SegResNet"), SMALL, MANY, lambda net, x: net.encode(x)),
    "SegResNet": Network(MONAI, lambda: monai("SegResNet"), SMALL, MANY),
    "DenseNet-121": Network(
        MONAI, lambda: monai("DenseNet121", spatial_dims=3, in_channels=1, out_channels=3),
        LARGE, MANY),
    "SENet": Network(MONAI, senet, LARGE, MANY),
    "SE-ResNet-50": Network(
        MONAI, lambda: monai("SEResNet50", spatial_dims=3, in_channels=1, num_classes=3),
        LARGE, MANY),
    "EfficientNet-B0": Network(MONAI, _efficientnet, LARGE, MANY),
    "BasicUNet encoder": Network(
        MONAI, basic_unet, CUBE, MANY, basic_unet_encoder),
    "BasicUNet": Network(MONAI, basic_unet, CUBE, MANY),
    "FlexibleUNet encoder, ResNet-18": Network(MONAI, lambda: _encoder("resnet18"), LARGE, MANY),
    "FlexibleUNet encoder, EfficientNet-B0": Network(
        MONAI, lambda: _encoder("efficientnet-b0"), LARGE, MANY),
    "FlexibleUNet, ResNet-10": Network(MONAI, lambda: flexible_unet("resnet10"), LARGE, MANY),
    "VNet encoder": Network(MONAI, lambda: monai("VNet"), SMALL, MANY, vnet_encoder),
    "VNet": Network(MONAI, lambda: monai("VNet"), SMALL, MANY),
    "ResidualEncoderUNet encoder": Network(NNUNET, residual_encoder, CUBE, MANY),
    "ResidualEncoderUNet": Network(NNUNET, residual_unet, CUBE, MANY),
    "ResidualEncoder, stochastic depth": Network(
        NNUNET, lambda: residual_encoder_with(stochastic_depth_p=0.2), CUBE, MANY),
    "ResidualEncoder, squeeze and excitation": Network(
        NNUNET, lambda: residual_encoder_with(squeeze_excitation=True), CUBE, MANY,
        remark="the package's gate averages a volume over two of its three axes; images work"),
    "ResidualEncoder, squeeze and excitation, images": Network(
        NNUNET, lambda: residual_encoder_with(2, squeeze_excitation=True), (64, 32), (4, 2)),
    "PlainConvUNet encoder": Network(
        NNUNET, lambda: plain_unet().get_submodule("encoder"), CUBE, MANY),
    "PlainConvUNet": Network(NNUNET, plain_unet, CUBE, MANY),
    "ConvNeXt": Network(OURS, lambda: convnext(3), (32, 16, 16), FEW),
    "ConvNeXt, images": Network(OURS, lambda: convnext(2), (64, 32), (4, 2)),
    "MedNeXt, kernel 3": Network(OURS, lambda: mednext(3, False), SMALL, MANY),
    "MedNeXt, kernel 5, GRN": Network(OURS, lambda: mednext(5, True), SMALL, MANY),
}
# fmt: on
