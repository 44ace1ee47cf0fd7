"""SparK's contract, on volumes and images; `test_official.py` has its values."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from medspark.losses import patchify, standardise
from medspark.models import (
    LightDecoder,
    SparK,
    TargetOptions,
    build_spark,
    create_encoder,
    spark_spec,
)
from medspark.sparse import BlockMask, BlockSparseTensor

TINY = {"block_inplanes": [4, 6, 8, 10]}
TINY_2D = {**TINY, "spatial_dims": 2}
both = pytest.mark.parametrize("dims", [2, 3])


def tiny(dims=3, **options):
    torch.manual_seed(0)
    kwargs = TINY if dims == 3 else TINY_2D
    return SparK.build("resnet10", encoder_kwargs=kwargs, **{"width": 32, **options})


def volume(batch=2, size=64, dims=3):
    return torch.randn(batch, 1, *[size] * dims, generator=torch.Generator().manual_seed(1))


@both
def test_every_parameter_gets_a_gradient(dims):
    spark = tiny(dims)
    spark(volume(dims=dims)).loss.backward()
    for name, parameter in spark.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("dims", "size", "ratio", "kept"),
    [(3, 64, 0.6, 3), (3, 96, 0.6, 11), (3, 96, 0.75, 7), (2, 224, 0.6, 20), (2, 384, 0.75, 36)],
)
def test_kept_count(dims, size, ratio, kept):
    """In 2D those of the paper: 20 of 7 x 7 at 224 pixels, 36 of 12 x 12 at 384."""
    spark = tiny(dims, mask_ratio=ratio)
    mask = spark.draw_mask(torch.zeros(5, 1, *[size] * dims))
    assert mask.visible.shape == (5, *[size // 32] * dims)
    assert (mask.visible.flatten(1).sum(1) == kept).all()
    assert len({tuple(v.flatten().tolist()) for v in mask.visible}) > 1


def test_the_generator_decides_the_mask():
    spark, x = tiny(), volume()
    a, b, c = (spark.draw_mask(x, torch.Generator().manual_seed(s)).visible for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    output = spark(x, generator=torch.Generator().manual_seed(1))
    assert torch.equal(output.mask.visible, a)


@both
@pytest.mark.parametrize("floor", [0.0, 4.0])
def test_reconstruction_keeps_the_visible_and_scales_the_hidden(dims, floor):
    spark = tiny(dims, variance_floor=floor)
    x = volume(size=96 if dims == 2 else 64, dims=dims) * 3 + 5
    output = spark(x)
    patches, rebuilt = patchify(x, spark.cell), patchify(output.reconstruction, spark.cell)
    seen = output.mask.visible.flatten(1)
    assert torch.equal(patches[seen], rebuilt[seen])
    scaled, mean, scale = standardise(patches, variance_floor=floor)
    back = ((rebuilt - mean) / scale)[~seen]
    torch.testing.assert_close(
        back, patchify(output.prediction, spark.cell)[~seen], rtol=1e-4, atol=1e-4
    )
    # the squared distance of the picture, in standardised units, is the loss
    distance = (back - scaled[~seen]).square().mean().item()
    assert distance == pytest.approx(output.loss.item(), rel=1e-3)
    assert not output.reconstruction.requires_grad


def test_raw_target():
    spark = tiny(normalise_target=False)
    x = volume() + 2
    output = spark(x)
    hidden = ~output.mask.visible.flatten(1)
    error = patchify(output.prediction, spark.cell) - patchify(x, spark.cell)
    assert output.loss.item() == pytest.approx(error[hidden].square().mean().item(), rel=1e-5)
    rebuilt = patchify(output.reconstruction, spark.cell)[hidden]
    assert torch.equal(rebuilt, patchify(output.prediction.detach(), spark.cell)[hidden])
    assert output.constant_loss().item() == pytest.approx(
        patchify(x, spark.cell)[hidden].var(correction=0).item(), rel=1e-4
    )


@both
@pytest.mark.parametrize("coarse", ["any", "every"])
def test_a_cell_finer_than_the_coarsest_stride(dims, coarse):
    spark = tiny(dims, cell=16, norm="instance", coarse=coarse)
    x = volume(dims=dims)
    output = spark(x)
    assert output.mask.visible.shape == (2, *[4] * dims)
    assert torch.isfinite(output.loss)
    coarsest = spark.pyramid(BlockSparseTensor.from_dense(x, output.mask, spark.semantics))[-1]
    pool = functional.max_pool2d if dims == 2 else functional.max_pool3d
    cells = pool(output.mask.visible.float(), 2).bool()
    active = cells.sum() if coarse == "any" else cells.numel()
    assert coarsest.features.shape[0] == active


def test_anisotropic_cells_and_volumes():
    spark = tiny(cell=[64, 32, 32])
    output = spark(torch.randn(1, 1, 64, 96, 64))
    assert output.mask.visible.shape == (1, 1, 3, 2)
    assert output.reconstruction.shape == (1, 1, 64, 96, 64)
    flat = tiny(2, cell=[64, 32])
    assert flat.cell == (64, 32)
    output = flat(torch.randn(1, 1, 128, 96))
    assert output.mask.visible.shape == (1, 2, 3)
    assert output.reconstruction.shape == (1, 1, 128, 96)


@both
def test_bfloat16_autocast_keeps_a_float32_loss(dims):
    spark = tiny(dims)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = spark(volume(dims=dims))
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.reconstruction.dtype == torch.float32
    assert torch.isfinite(spark.encoder.conv1.weight.grad).all()


@both
def test_spec_rebuilds_the_model(dims):
    kwargs = TINY if dims == 3 else TINY_2D
    spec = spark_spec("resnet10", encoder_kwargs=kwargs, width=64, cell=16, variance_floor=0.1)
    again = build_spark(json.loads(json.dumps(spec)))
    reference = build_spark(spec)
    again.load_state_dict(reference.state_dict(), strict=True)
    assert again.dims == dims
    assert again.cell == (16,) * dims
    assert again.pyramid.strides == [(s,) * dims for s in (4, 8, 16, 32)]
    assert again.target == TargetOptions(True, 1e-6, 0.1)
    x = volume(1, dims=dims)
    mask = reference.draw_mask(x)
    assert torch.equal(reference.eval()(x, mask).loss, again.eval()(x, mask).loss)


def test_official_defaults():
    spec = spark_spec("resnet18")
    assert (spec["mask_ratio"], spec["width"], spec["strides"]) == (0.6, 768, [4, 8, 16, 32])
    assert (spec["normalise_target"], spec["eps"], spec["variance_floor"]) == (True, 1e-6, 0.0)
    for dims, norm in ((2, nn.BatchNorm2d), (3, nn.BatchNorm3d)):
        spark = tiny(dims)
        assert spark.cell == (32,) * dims
        assert [type(level.norm) for level in spark.densify] == [norm] * 4
        kernels = [level.projection.kernel_size for level in spark.densify]
        assert kernels == [(k,) * dims for k in (3, 3, 3, 1)]


def test_strides_per_axis():
    kwargs = {**TINY, "conv1_t_stride": [1, 2, 2], "conv1_t_size": [3, 7, 7]}
    strides = [[2, 4, 4], [4, 8, 8]]
    spark = SparK.build("resnet10", encoder_kwargs=kwargs, strides=strides, width=32)
    assert spark.cell == (4, 8, 8)
    assert torch.isfinite(spark(torch.randn(1, 1, 32, 64, 64)).loss)
    kwargs = {**TINY_2D, "conv1_t_stride": [1, 2], "conv1_t_size": [3, 7]}
    spark = SparK.build("resnet10", encoder_kwargs=kwargs, strides=[[2, 4], [4, 8]], width=32)
    assert spark.cell == (4, 8)
    output = spark(torch.randn(1, 1, 32, 64))
    assert output.mask.visible.shape == (1, 8, 8)
    assert torch.isfinite(output.loss)


def test_errors_name_the_numbers():
    spark = tiny()
    with pytest.raises(ValueError, match=r"\(64, 64, 80\).*cell \(32, 32, 32\)"):
        spark(torch.zeros(1, 1, 64, 64, 80))
    with pytest.raises(ValueError, match="keeps 0 of 1 cells"):
        spark(torch.zeros(1, 1, 32, 32, 32))
    with pytest.raises(ValueError, match=r"\[B, C, D, H, W\]"):
        spark(torch.zeros(1, 64, 64, 64))
    with pytest.raises(ValueError, match=r"mask \(2, 2, 2, 2\) should be \(1, 2, 2, 2\)"):
        spark(volume(1), BlockMask.random(2, (2, 2, 2), 0.5))
    with pytest.raises(ValueError, match="coarsest stride"):
        tiny(cell=16)(torch.zeros(1, 1, 48, 64, 64))
    with pytest.raises(ValueError, match="mask_ratio"):
        tiny(mask_ratio=1.0)
    with pytest.raises(ValueError, match="no option depth"):
        spark_spec("resnet10", depth=3)
    with pytest.raises(ValueError, match="unknown: depth"):
        build_spark({**spark_spec("resnet10"), "depth": 3})
    with pytest.raises(ValueError, match="decoder is for strides"):
        SparK(create_encoder("resnet10", **TINY), LightDecoder((8, 16, 32), 32))
    encoder = create_encoder("resnet10", **TINY_2D)
    with pytest.raises(ValueError, match=r"decoder is for strides \[\(4, 4, 4\)"):
        SparK(encoder, LightDecoder((4, 8, 16, 32), 32))


def test_errors_on_images_name_the_numbers():
    spark = tiny(2)
    with pytest.raises(ValueError, match=r"\(64, 80\) \(y, x\).*cell \(32, 32\)"):
        spark(torch.zeros(1, 1, 64, 80))
    with pytest.raises(
        ValueError, match=r"2D encoder takes \[B, C, H, W\], not \(1, 1, 64, 64, 64\)"
    ):
        spark(volume(1))
    with pytest.raises(ValueError, match=r"mask \(2, 2, 2, 2\) should be \(1, 2, 2\)"):
        spark(volume(1, dims=2), BlockMask.random(2, (2, 2, 2), 0.5))
    with pytest.raises(
        ValueError, match=r"one or two positive integers \(y, x\), not \[32, 32, 32\]"
    ):
        tiny(2, cell=[32, 32, 32])
