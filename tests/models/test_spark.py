"""SparK against an independent masked-dense computation, and its contract."""

import copy
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
from medspark.sparse import BlockMask, BlockSparseTensor, use_backend

TINY = {"block_inplanes": [4, 6, 8, 10]}


def tiny(**options):
    torch.manual_seed(0)
    return SparK.build("resnet10", encoder_kwargs=TINY, **{"width": 32, **options})


def volume(batch=2, size=64, dtype=torch.float32):
    return torch.randn(batch, 1, size, size, size, generator=torch.Generator().manual_seed(1)).to(
        dtype
    )


class MaskedDense:
    """Official SparK's way: dense layers, multiplied with the mask; BN over gathered voxels."""

    def __init__(self, mask: BlockMask):
        self.mask = mask.visible

    def at(self, x):
        m = self.mask
        for axis in (1, 2, 3):
            m = m.repeat_interleave(x.shape[axis + 1] // self.mask.shape[axis], dim=axis)
        return m.unsqueeze(1)

    def drop(self, x):
        return torch.where(self.at(x), x, 0)

    def norm(self, x, bn):
        where = self.at(x)[:, 0]
        seen = x.movedim(1, -1)[where]
        seen = functional.batch_norm(
            seen, None, None, bn.weight, bn.bias, training=True, eps=bn.eps
        )
        return torch.zeros_like(x.movedim(1, -1)).index_put((where,), seen).movedim(-1, 1)

    def block(self, x, b):
        y = self.norm(self.drop(b.conv1(x)), b.bn1).relu()
        y = self.norm(self.drop(b.conv2(y)), b.bn2)
        if b.downsample is not None:
            x = self.norm(self.drop(b.downsample[0](x)), b.downsample[1])
        return (x + y).relu()

    def encode(self, net, x):
        x = self.norm(self.drop(net.conv1(self.drop(x))), net.bn1).relu()
        x = self.drop(net.maxpool(x))
        maps = []
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            for b in layer:
                x = self.block(x, b)
            maps.append(x)
        return maps

    def loss(self, spark, x):
        dense = []
        for level, y in zip(spark.densify, self.encode(spark.encoder, x), strict=True):
            token = level.mask_token.view(1, -1, 1, 1, 1)
            dense.append(level.projection(torch.where(self.at(y), self.norm(y, level.norm), token)))
        prediction = spark.decoder(dense)
        patches = patchify(x, (32, 32, 32))
        mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True, unbiased=True)
        target = (patches - mean) / (var + 1e-6) ** 0.5
        per_patch = (patchify(prediction, (32, 32, 32)) - target).square().mean(-1)
        hidden = (~self.mask).flatten(1).to(per_patch.dtype)
        return (per_patch * hidden).sum() / (hidden.sum() + 1e-8)


def test_loss_and_gradients_equal_the_official_algorithm():
    spark = tiny().double()
    oracle = copy.deepcopy(spark)
    x = volume(dtype=torch.float64)
    mask = spark.draw_mask(x, torch.Generator().manual_seed(3))
    expected = MaskedDense(mask).loss(oracle, x)
    expected.backward()
    with use_backend("reference"):
        output = spark(x, mask)
        output.loss.backward()
    # the official divisor is hidden + 1e-8, which float32 cannot tell from hidden
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-8)
    theirs = dict(oracle.named_parameters())
    for name, parameter in spark.named_parameters():
        torch.testing.assert_close(
            parameter.grad,
            theirs[name].grad,
            rtol=1e-6,
            atol=1e-9,
            msg=lambda m, n=name: f"{n}: {m}",
        )


def test_every_parameter_gets_a_gradient():
    spark = tiny()
    spark(volume()).loss.backward()
    for name, parameter in spark.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_the_encoder_never_sees_hidden_voxels():
    spark = tiny()
    x = volume()
    mask = spark.draw_mask(x)
    hidden = ~MaskedDense(mask).at(x)
    poisoned = x.masked_fill(hidden, float("nan"))
    maps = [
        [m.features for m in spark.pyramid(BlockSparseTensor.from_dense(v, mask))]
        for v in (x, poisoned)
    ]
    for clean, dirty in zip(*maps, strict=True):
        assert torch.isfinite(clean).all()
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize(("size", "ratio", "kept"), [(64, 0.6, 3), (96, 0.6, 11), (96, 0.75, 7)])
def test_kept_count(size, ratio, kept):
    spark = tiny(mask_ratio=ratio)
    mask = spark.draw_mask(torch.zeros(5, 1, size, size, size))
    assert (mask.visible.flatten(1).sum(1) == kept).all()
    assert len({tuple(v.flatten().tolist()) for v in mask.visible}) > 1


def test_the_generator_decides_the_mask():
    spark, x = tiny(), volume()
    a, b, c = (spark.draw_mask(x, torch.Generator().manual_seed(s)).visible for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    output = spark(x, generator=torch.Generator().manual_seed(1))
    assert torch.equal(output.mask.visible, a)


@pytest.mark.parametrize("floor", [0.0, 4.0])
def test_reconstruction_keeps_the_visible_and_scales_the_hidden(floor):
    spark = tiny(variance_floor=floor)
    x = volume() * 3 + 5
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


@pytest.mark.parametrize("coarse", ["any", "every"])
def test_a_cell_finer_than_the_coarsest_stride(coarse):
    spark = tiny(cell=16, norm="instance", coarse=coarse)
    output = spark(volume())
    assert output.mask.visible.shape == (2, 4, 4, 4)
    assert torch.isfinite(output.loss)
    coarsest = spark.pyramid(BlockSparseTensor.from_dense(volume(), output.mask, spark.semantics))[
        -1
    ]
    cells = functional.max_pool3d(output.mask.visible.float(), 2).bool()
    active = cells.sum() if coarse == "any" else cells.numel()
    assert coarsest.features.shape[0] == active


def test_anisotropic_cells_and_volumes():
    spark = tiny(cell=[64, 32, 32])
    output = spark(torch.randn(1, 1, 64, 96, 64))
    assert output.mask.visible.shape == (1, 1, 3, 2)
    assert output.reconstruction.shape == (1, 1, 64, 96, 64)


def test_bfloat16_autocast_keeps_a_float32_loss():
    spark = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = spark(volume())
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.reconstruction.dtype == torch.float32
    assert torch.isfinite(spark.encoder.conv1.weight.grad).all()


def test_spec_rebuilds_the_model():
    spec = spark_spec("resnet10", encoder_kwargs=TINY, width=64, cell=16, variance_floor=0.1)
    again = build_spark(json.loads(json.dumps(spec)))
    reference = build_spark(spec)
    again.load_state_dict(reference.state_dict(), strict=True)
    assert again.cell == (16, 16, 16)
    assert again.target == TargetOptions(True, 1e-6, 0.1)
    x, mask = volume(1), reference.draw_mask(volume(1))
    assert torch.equal(reference.eval()(x, mask).loss, again.eval()(x, mask).loss)


def test_official_defaults():
    spec = spark_spec("resnet18")
    assert (spec["mask_ratio"], spec["width"], spec["strides"]) == (0.6, 768, [4, 8, 16, 32])
    assert (spec["normalise_target"], spec["eps"], spec["variance_floor"]) == (True, 1e-6, 0.0)
    spark = tiny()
    assert spark.cell == (32, 32, 32)
    assert [type(level.norm) for level in spark.densify] == [nn.BatchNorm3d] * 4
    kernels = [level.projection.kernel_size[0] for level in spark.densify]
    assert kernels == [3, 3, 3, 1]


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
