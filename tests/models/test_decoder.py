"""LightDecoder in 2D and 3D: official widths, additions, initialisation; anisotropic strides."""

import pytest
import torch
from torch import nn

from medspark.models import LightDecoder

STRIDES = (4, 8, 16, 32)
LAYERS = {
    2: (nn.ConvTranspose2d, nn.Conv2d, nn.BatchNorm2d),
    3: (nn.ConvTranspose3d, nn.Conv3d, nn.BatchNorm3d),
}
both = pytest.mark.parametrize("dims", [2, 3])


@both
def test_official_widths_and_layers(dims):
    with torch.device("meta"):
        decoder = LightDecoder(STRIDES, width=768, out_channels=3, dims=dims)
    transposed, plain, norm = LAYERS[dims]
    assert decoder.strides == [(s,) * dims for s in STRIDES]
    assert decoder.widths == [768, 384, 192, 96, 48, 24]
    assert decoder.level_widths == [96, 192, 384, 768]
    for block, width in zip(decoder.blocks, decoder.widths, strict=False):
        up, conv = block.up, block.conv
        assert type(up) is transposed
        assert (up.in_channels, up.out_channels) == (width, width)
        assert (up.kernel_size, up.stride, up.padding) == ((4,) * dims, (2,) * dims, (1,) * dims)
        assert up.bias is not None
        assert [type(m) for m in conv] == [plain, norm, nn.ReLU6, plain, norm]
        assert (conv[0].out_channels, conv[3].out_channels) == (width, width // 2)
        assert conv[0].bias is None
        assert conv[3].bias is None
    assert type(decoder.head) is plain
    assert (decoder.head.in_channels, decoder.head.kernel_size) == (24, (1,) * dims)
    assert decoder.head.out_channels == 3


@both
def test_initialisation(dims):
    torch.manual_seed(0)
    decoder = LightDecoder((8,), width=64, dims=dims)
    conv, up = decoder.blocks[0].conv[0], decoder.blocks[0].up
    assert conv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert (decoder.blocks[0].conv[1].weight == 1).all()
    # kaiming, fan out, as torch counts it for a transposed conv: weight.size(0) * kernel volume
    assert up.weight.std().item() == pytest.approx((2 / (64 * 4**dims)) ** 0.5, rel=0.02)
    assert (up.bias == 0).all()
    assert (decoder.head.bias == 0).all()


@both
def test_levels_are_added_before_their_block(dims):
    torch.manual_seed(0)
    decoder = LightDecoder(STRIDES, width=32, dims=dims).double().eval()
    maps = [
        torch.randn(1, w, *[64 // s] * dims, dtype=torch.float64)
        for w, s in zip(decoder.level_widths, STRIDES, strict=True)
    ]
    x = torch.zeros_like(maps[-1])
    for i, block in enumerate(decoder.blocks):
        if i < 4:
            x = x + maps[3 - i]
        x = block(x)
    torch.testing.assert_close(decoder(maps), decoder.head(x), rtol=1e-12, atol=1e-12)
    assert decoder(maps).shape == (1, 1, *[64] * dims)


def test_anisotropic_strides_upsample_only_where_needed():
    torch.manual_seed(0)
    decoder = LightDecoder([(1, 4, 4), (2, 16, 16)], width=16)
    # (2,16,16) -> (1,8,8) -> (1,4,4) -> (1,2,2) -> (1,1,1)
    assert [b.up.stride for b in decoder.blocks] == [(2, 2, 2)] + [(1, 2, 2)] * 3
    assert decoder.level_widths == [4, 16]
    maps = [torch.randn(1, 4, 4, 8, 8), torch.randn(1, 16, 2, 2, 2)]
    assert decoder(maps).shape == (1, 1, 4, 32, 32)
    flat = LightDecoder([(1, 4), (2, 16)], width=16)  # axes as the strides have entries
    assert [b.up.kernel_size for b in flat.blocks] == [(4, 4)] + [(3, 4)] * 3
    assert flat([torch.randn(1, 4, 8, 8), torch.randn(1, 16, 4, 2)]).shape == (1, 1, 8, 32)


def test_a_level_at_stride_one_reaches_the_prediction():
    decoder = LightDecoder((1, 2), width=4).eval()
    maps = [torch.randn(1, 2, 4, 4, 4), torch.randn(1, 4, 2, 2, 2)]
    changed = [maps[0] + 1, maps[1]]
    step = decoder.head.weight.sum(dim=1).squeeze()
    torch.testing.assert_close((decoder(changed) - decoder(maps)).mean(), step)


@both
def test_channels_last(dims):
    decoder = LightDecoder((4, 8), width=16, dims=dims)
    seen = []
    decoder.blocks[0].up.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    decoder([torch.randn(1, 8, *[8] * dims), torch.randn(1, 16, *[4] * dims)])
    memory_format = torch.channels_last if dims == 2 else torch.channels_last_3d
    assert seen[0].is_contiguous(memory_format=memory_format)
    assert decoder.blocks[0].up.weight.is_contiguous(memory_format=memory_format)


def test_errors():
    with pytest.raises(ValueError, match="multiple of 32"):
        LightDecoder(STRIDES, width=48)
    with pytest.raises(ValueError, match="power of two"):
        LightDecoder((4, 12), width=64)
    with pytest.raises(ValueError, match="power of two"):
        LightDecoder((8, 4), width=64)
    with pytest.raises(ValueError, match="has 2 levels, not 1"):
        LightDecoder((4, 8), width=16)([torch.zeros(1, 16, 2, 2, 2)])
    with pytest.raises(ValueError, match=r"one or two positive integers \(y, x\), not \(8, 8, 8\)"):
        LightDecoder([(4, 4), (8, 8, 8)], width=16)
    with pytest.raises(ValueError, match=r"one or three .*\(z, y, x\), not \(4, 4\)"):
        LightDecoder([(4, 4)], width=16, dims=3)
    with pytest.raises(ValueError, match=r"2 spatial axes .* or 3"):
        LightDecoder([(4,)], width=16)
