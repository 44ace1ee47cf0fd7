"""SparK on images and on volumes against official SparK written out in plain torch (`spark_oracle`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medspark.models import SparK
from medspark.sparse import BlockMask, BlockSparseTensor, launches, use_backend

from . import spark_oracle as oracle

# Two channels; cells of 32: 3 x 4 of them in an image, 2 x 2 x 1 in a volume.
SHAPES = {2: (4, 2, 96, 128), 3: (3, 2, 64, 64, 32)}
# Widths of the encoder's stages. One has a coarsest map as wide as the decoder, which needs no projection;
# one shows its max pool values below 0.
NETWORKS = {
    "basic": ("resnet18", [4, 6, 8, 10]),
    "bottleneck": ("resnet50", [4, 4, 5, 6]),
    "no projection": ("resnet10", [4, 6, 8, 32]),
    "leaky": ("resnet10", [4, 6, 8, 10]),
}
CONVOLUTIONS = {"basic": 20, "bottleneck": 53, "no projection": 12, "leaky": 12}
SLOPE = 0.3  # below 0, of the stem's rectifier of "leaky" (MONAI's blocks have plain ones)


def build(dims: int, network: str) -> SparK:
    """A model with weights so large that tokens, biases and the bound of ReLU6 all matter."""
    name, widths = NETWORKS[network]
    kwargs = {"spatial_dims": dims, "n_input_channels": 2, "block_inplanes": widths}
    if network == "leaky":
        kwargs["act"] = ["leakyrelu", {"negative_slope": SLOPE, "inplace": True}]
    spark = SparK.build(name, encoder_kwargs=kwargs, in_channels=2, width=32).double().train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in spark.named_parameters():
            scale = 1.0 if p.ndim == 1 else (2 / p[0].numel()) ** 0.5
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale)
            if p.ndim == 1 and name.endswith("weight"):  # of a norm; no channel may die
                p.abs_().add_(0.5)
    return spark


def sample(dims: int, counts: str = "official") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPES[dims], generator=generator, dtype=torch.float64) * 2 + 1
    grid = tuple(n // 32 for n in x.shape[2:])
    visible = BlockMask.random(len(x), grid, 0.6, generator).visible
    if counts == "unequal":
        visible[1], visible[2] = False, True
    return x, visible


def state_of(spark: SparK) -> dict[str, Tensor]:
    """Its weights and buffers as own tensors; weights collect gradients."""
    state = {name: tensor.detach().clone() for name, tensor in spark.state_dict().items()}
    for name, _ in spark.named_parameters():
        state[name].requires_grad_()
    return state


def close(got: Tensor | None, expected: Tensor | None, what: str, bound: float = 1e-10) -> None:
    assert got is not None, what
    assert expected is not None, what
    assert got.shape == expected.shape, what
    scale = expected.abs().max()
    assert scale > 0, what
    assert (got - expected).abs().max() <= bound * scale, what


CASES = [
    (2, "basic", "official", "native"),
    (2, "basic", "unequal", "native"),
    (2, "bottleneck", "unequal", "native"),
    (2, "leaky", "official", "native"),
    (2, "no projection", "official", "native"),
    (2, "no projection", "unequal", "reference"),
    (3, "no projection", "official", "native"),
    (3, "basic", "unequal", "native"),
]


@pytest.mark.parametrize(("dims", "network", "counts", "backend"), CASES)
def test_a_training_step_is_that_of_official_spark(dims, network, counts, backend):
    spark, (x, visible) = build(dims, network), sample(dims, counts)
    state = state_of(spark)
    before = launches().get("conv3d", 0)
    with use_backend(backend):
        maps = spark.pyramid(BlockSparseTensor.from_dense(x, BlockMask(visible)))
        spark.load_state_dict(state)  # the running statistics have moved
        output = spark(x, BlockMask(visible))
        output.loss.backward()
    native = launches().get("conv3d", 0) - before
    assert native == (2 * CONVOLUTIONS[network] if backend == "native" else 0)

    theirs, prediction, their_maps = oracle.spark(
        state, x, visible, SLOPE if network == "leaky" else 0.0
    )
    hidden = (~visible).sum()
    (theirs * (hidden + 1e-8) / hidden).backward()  # we divide by the number itself
    close(output.loss, theirs * (hidden + 1e-8) / hidden, "loss")
    close(output.prediction, prediction, "prediction")
    for i, (own, their) in enumerate(zip(maps, their_maps, strict=True)):
        close(own.to_dense(), their, f"map {i}")
    check_gradients(spark, state)
    moved = [name for name, _ in spark.named_buffers() if "running" in name]
    assert len(moved) == 2 * (
        CONVOLUTIONS[network] + 4 + 10
    )  # a norm per conv, level, decoder conv
    for name in moved:
        close(spark.state_dict()[name], state[name], name)


def check_gradients(spark: SparK, state: dict[str, Tensor]) -> None:
    """Every parameter's. A bias that a batch norm takes out again has none, up to rounding."""
    own = dict(spark.named_parameters())
    for name, parameter in own.items():
        if not name.endswith("downsample.0.bias"):
            close(parameter.grad, state[name].grad, f"gradient of {name}")
            continue
        weight = own[name.replace("bias", "weight")].grad
        for grad in (parameter.grad, state[name].grad):
            assert weight is not None, name
            assert grad is not None, name
            assert grad.abs().max() <= 1e-12 * weight.abs().max(), name


def test_the_case_is_hard_enough():
    """Tokens, biases and the bound of ReLU6 change the oracle's loss."""
    spark, (x, visible) = build(2, "no projection"), sample(2)
    plain = oracle.spark(state_of(spark), x, visible)[0].item()
    for name in ("densify.0.mask_token", "densify.3.mask_token", "decoder.blocks.0.up.bias"):
        state = {k: v.detach() for k, v in state_of(spark).items()}
        state[name] = state[name] * 0
        assert oracle.spark(state, x, visible)[0].item() != pytest.approx(plain, rel=1e-4), name
    above = []
    for block in spark.decoder.blocks:
        block.conv[1].register_forward_hook(lambda m, a, y: above.append(bool((y > 6).any())))
    spark(x, BlockMask(visible))
    assert len(above) == 5
    assert sum(above) >= 2


@pytest.mark.parametrize(("dims", "backend"), [(2, "native"), (2, "reference"), (3, "native")])
def test_hidden_values_change_nothing_bit_for_bit(dims, backend):
    """NaN there leaves maps, prediction, statistics and gradients as they are; no gradient goes there."""
    x, visible = sample(dims, "unequal")
    seen = oracle.at(visible, x).bool().expand_as(x)
    found = []
    for fill in (0.0, torch.nan):
        spark = build(dims, "no projection")
        volume = x.where(seen, fill).requires_grad_()
        with use_backend(backend):
            prediction = spark(volume, BlockMask(visible)).prediction
            prediction.square().sum().backward()
        assert volume.grad is not None
        assert (volume.grad[~seen] == 0).all()
        assert (volume.grad[seen] != 0).any()
        gradients = {f"grad {k}": p.grad for k, p in spark.named_parameters()}
        found.append(
            {"prediction": prediction, "x": volume.grad, **gradients, **spark.state_dict()}
        )
    for name, clean in found[0].items():
        assert torch.isfinite(clean).all(), name
        assert torch.equal(clean, found[1][name]), name


def test_images_meet_2d_layers_only():
    spark, (x, visible) = build(2, "basic"), sample(2)
    maps = spark.pyramid(BlockSparseTensor.from_dense(x, BlockMask(visible)))
    for level, sparse in zip(spark.densify, maps, strict=True):
        dense = level(sparse)
        assert type(dense) is Tensor
        assert dense.is_contiguous(memory_format=torch.channels_last)
    names = {type(module).__name__ for module in spark.modules()}
    assert {"Conv2d", "ConvTranspose2d", "BatchNorm2d"} <= names
    assert not [name for name in names if name.endswith("3d")]
