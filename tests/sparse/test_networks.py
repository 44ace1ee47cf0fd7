"""Unmodified networks on masked volumes: outputs and gradients against the float64 oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from medspark.sparse import (
    BlockMask,
    BlockSparseTensor,
    launches,
    reference,
    reset_launches,
    use_backend,
)

ROUNDING = 32 * torch.finfo(torch.float32).eps


def monai_resnet(name: str) -> nn.Module:
    from monai.networks import nets

    net: nn.Module = getattr(nets, name)(
        n_input_channels=1, conv1_t_stride=2, num_classes=3, spatial_dims=3
    )
    return net


def residual_encoder() -> nn.Module:
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    net: nn.Module = ResidualEncoderUNet(
        input_channels=1, n_stages=5, features_per_stage=(8, 16, 24, 32, 40), conv_op=nn.Conv3d,
        kernel_sizes=3, strides=(1, 2, 2, 2, 2), n_blocks_per_stage=(1, 2, 2, 2, 2), num_classes=2,
        n_conv_per_stage_decoder=1, conv_bias=True, norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    ).encoder  # fmt: skip
    return net


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # network, volume, cell
    "resnet18": (lambda: monai_resnet("resnet18"), 64, 32),
    "resnet50": (lambda: monai_resnet("resnet50"), 64, 32),
    "resnet18, cell 16": (lambda: monai_resnet("resnet18"), 64, 16),
    "residual encoder": (residual_encoder, 32, 16),
}


def outputs_of(net: nn.Module, x: Tensor, mask: BlockMask) -> list[Tensor]:
    """All outputs, dense."""
    y = net(BlockSparseTensor.from_dense(x, mask))
    many: Sequence[Tensor] = y if isinstance(y, (list, tuple)) else [y]
    return [t.to_dense() if isinstance(t, BlockSparseTensor) else t for t in many]


def run(
    net: nn.Module, x: Tensor, mask: BlockMask, backend: str
) -> tuple[list[Tensor], dict[str, Tensor]]:
    net = copy.deepcopy(net).to(x.dtype)
    with use_backend(backend):  # type: ignore[arg-type]
        outputs = outputs_of(net, x, mask)
        generator = torch.Generator().manual_seed(3)
        loss = sum((t * torch.randn(t.shape, generator=generator)).mean() for t in outputs)
        assert isinstance(loss, Tensor)
        loss.backward()
    grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    return [t.detach() for t in outputs], grads


def case(name: str) -> tuple[nn.Module, Tensor, BlockMask]:
    build, size, cell = NETWORKS[name]
    torch.manual_seed(0)
    net = build()
    grid = (size // cell,) * 3
    visible = torch.rand(3, *grid) < 0.5
    visible[0], visible[1] = True, False  # all, none, some
    visible[2, 0, 0, 0] = True
    return net, torch.randn(3, 1, size, size, size), BlockMask(visible)


def relative(got: Tensor, exact: Tensor, floor: float) -> float:
    return ((got.double() - exact).norm() / max(exact.norm().item(), floor)).item()


@pytest.mark.parametrize("name", NETWORKS)
def test_native_is_the_reference_to_float32_rounding(name) -> None:
    net, x, mask = case(name)
    exact, exact_grads = run(net, x.double(), mask, "reference")
    torchs, torch_grads = run(net, x, mask, "reference")
    reset_launches()
    own, own_grads = run(net, x, mask, "native")
    convs = sum(isinstance(m, nn.Conv3d) for m in dict.fromkeys(net.modules()))
    norms = sum(isinstance(m, (nn.BatchNorm3d, nn.InstanceNorm3d)) for m in net.modules())
    assert launches()["conv3d"] == launches()["conv3d_weight"] == convs, "a convolution fell back"
    assert launches()["norm"] == launches()["norm_input"] == norms, "a norm fell back"
    for a, b, c in zip(own, torchs, exact, strict=True):
        assert relative(a, c, 1e-6) <= 2 * relative(b, c, 1e-6) + ROUNDING
    assert own_grads.keys() == exact_grads.keys() and own_grads
    # A bias in front of a norm has gradient 0: measured against the scale of the whole network.
    floor = 1e-3 * max(g.norm().item() for g in exact_grads.values())
    for key, exact_grad in exact_grads.items():
        limit = 2 * relative(torch_grads[key], exact_grad, floor) + ROUNDING
        assert relative(own_grads[key], exact_grad, floor) <= limit, key


@pytest.mark.parametrize("name", ["resnet18", "residual encoder"])
def test_hidden_voxels_change_nothing_bit_for_bit(name) -> None:
    net, x, mask = case(name)
    hidden = ~reference.voxel_mask(mask.level(tuple(x.shape[2:])))
    results = []
    for poison in (0.0, 1e30, torch.nan, -torch.inf):
        results.append(run(net, torch.where(hidden, poison, x), mask, "native"))
    outputs, grads = results[0]
    for other, other_grads in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs, other, strict=True))
        assert all(torch.equal(grads[k], other_grads[k]) for k in grads)
    assert all(torch.isfinite(g).all() for g in grads.values())


def test_all_visible_equals_the_dense_network() -> None:
    net, x, _ = case("resnet18")
    x, net = x[:2].double(), net.double()
    mask = BlockMask(torch.ones(2, 2, 2, 2, dtype=torch.bool))
    dense = copy.deepcopy(net)(x)
    own = outputs_of(net, x, mask)[0]
    assert torch.allclose(own, dense, rtol=1e-10, atol=1e-10)


def test_bfloat16_network_runs_natively() -> None:
    net, x, mask = case("residual encoder")
    exact, _ = run(net, x.double(), mask, "reference")
    torchs, _ = run(net, x.bfloat16(), mask, "reference")
    own, grads = run(net, x.bfloat16(), mask, "native")
    for a, b, c in zip(own, torchs, exact, strict=True):
        assert relative(a, c, 1e-6) <= 2 * relative(b, c, 1e-6)
    assert all(torch.isfinite(g).all() for g in grads.values())


def test_eval_mode_uses_running_statistics() -> None:
    net, x, mask = case("resnet18")
    net.eval()
    with torch.no_grad():
        outputs = {}
        for backend in ("native", "reference"):
            with use_backend(backend):  # type: ignore[arg-type]
                outputs[backend] = outputs_of(net, x, mask)[0]
    assert torch.allclose(outputs["native"], outputs["reference"], rtol=1e-4, atol=1e-5)
