"""The pyramid finds stage outputs by tracing and leaves the encoder alone."""

import copy
import pickle

import pytest
import torch
from torch import nn

from medspark.models import Level, Pyramid, create_encoder, find_levels
from medspark.models.pyramid import as_stride, spatial_dims
from medspark.sparse import BlockMask, BlockSparseTensor


def tiny(name="resnet10", **kwargs):
    torch.manual_seed(0)
    return create_encoder(name, block_inplanes=[4, 8, 8, 16], **kwargs)


def stages(net, x):
    """MONAI ResNet's stage outputs, spelled out."""
    x = net.maxpool(net.act(net.bn1(net.conv1(x))))
    maps = []
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = layer(x)
        maps.append(x)
    return maps


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ["resnet10", "resnet50"])
def test_maps_are_the_stage_outputs(name, dims):
    # the next bottleneck begins with 1x1x1 convs at the old stride: those are not the map
    net = tiny(name, spatial_dims=dims).eval()
    pyramid = Pyramid(net)
    x = torch.randn(2, 1, *(64, 64, 96)[-dims:])
    maps = pyramid(x)
    for got, expected in zip(maps, stages(net, x), strict=True):
        assert torch.equal(got, expected)
    assert pyramid.dims == spatial_dims(net) == dims
    assert pyramid.strides == [(s,) * dims for s in (4, 8, 16, 32)]
    assert pyramid.channels == [m.shape[1] for m in maps]


def test_sparse_images_give_sparse_maps():
    net = tiny(spatial_dims=2).eval()
    x, mask = torch.randn(2, 1, 64, 96), BlockMask(torch.ones(2, 2, 3, dtype=torch.bool))
    maps = Pyramid(net)(BlockSparseTensor.from_dense(x, mask))
    for got, expected in zip(maps, stages(net, x), strict=True):
        assert isinstance(got, BlockSparseTensor)
        torch.testing.assert_close(got.to_dense(), expected)


def test_levels_show_themselves_as_before():
    """Plans in checkpoints hold these strides; 3D ones have three entries."""
    levels = find_levels(tiny())
    assert repr(levels[-1]) == "Level(module='layer4', call=0, stride=(32, 32, 32), channels=16)"
    assert find_levels(tiny(spatial_dims=2))[-1] == Level("layer4", 0, (32, 32), 16)


def test_strides_of_an_image_encoder_may_differ_by_axis():
    net = tiny(spatial_dims=2, conv1_t_stride=[1, 2], conv1_t_size=[3, 7])
    assert Pyramid(net, strides=[[2, 4], (16, 32)]).strides == [(2, 4), (16, 32)]


def test_a_classification_head_is_no_level():
    assert [level.module for level in find_levels(tiny(feed_forward=True, num_classes=2))] == [
        "act", "layer1", "layer2", "layer3", "layer4",
    ]  # fmt: skip


def test_resenc_gives_its_skips():
    net = create_encoder(
        "resenc",
        features_per_stage=[4, 6, 8],
        strides=[1, [1, 2, 2], 2],
        n_blocks_per_stage=[1, 2, 1],
    ).eval()
    pyramid = Pyramid(net, strides=None)
    assert pyramid.strides == [(1, 1, 1), (1, 2, 2), (2, 4, 4)]
    x = torch.randn(1, 1, 8, 16, 16)
    for got, expected in zip(pyramid(x), net(x), strict=True):
        assert torch.equal(got, expected)


def test_one_wrapping_sequential_hides_nothing():
    net = tiny()
    wrapped = nn.Sequential(
        net.conv1, net.bn1, net.act, net.maxpool, net.layer1, net.layer2, net.layer3, net.layer4
    )
    outer = nn.Sequential(nn.ModuleDict({"body": wrapped})["body"])
    assert [level.module for level in find_levels(outer)][1:] == ["0.4", "0.5", "0.6", "0"]


class Shared(nn.Module):
    """One activation called at every stride; pooling by a function, no module."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv3d(1, 3, 3, padding=1), nn.Conv3d(3, 5, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x):
        self.fine = self.act(self.a(x))
        self.coarse = self.act(self.b(nn.functional.max_pool3d(self.fine, 2)))
        return self.coarse


def test_a_module_called_at_two_strides():
    net = Shared()
    pyramid = Pyramid(net, strides=(1, 2))
    fine, coarse = pyramid(torch.randn(1, 1, 8, 8, 8))
    assert fine is net.fine
    assert coarse is net.coarse


class Concrete(Shared):
    """Reads a value, which the meta device has not."""

    def forward(self, x):
        assert float(x.sum()) == float(x.sum())
        return super().forward(x)


class Concrete2D(nn.Sequential):
    """The same on images."""

    def forward(self, x):
        assert float(x.sum()) == float(x.sum())
        return super().forward(x)


def test_networks_that_need_values_are_traced_on_the_cpu():
    assert [level.channels for level in find_levels(Concrete())] == [3, 5]
    flat = Concrete2D(nn.Conv2d(1, 3, 3, stride=(1, 2), padding=1), nn.Conv2d(3, 5, 2, stride=2))
    assert [level.stride for level in find_levels(flat)] == [(1, 2), (2, 4)]


def test_missing_stride_lists_those_found():
    with pytest.raises(ValueError, match=r"\(64, 64, 64\).*\(32, 32, 32\) \(16 channels\)"):
        Pyramid(tiny(), strides=(4, 64))
    with pytest.raises(ValueError, match=r"\(64, 64\).*\(32, 32\) \(16 channels\)"):
        Pyramid(tiny(spatial_dims=2), strides=(4, 64))
    with pytest.raises(ValueError, match=r"does not run on a volume \[1, 2, D, H, W\]; 512\^3"):
        Pyramid(tiny(), in_channels=2)
    with pytest.raises(ValueError, match=r"does not run on an image \[1, 2, H, W\]; 512\^2"):
        Pyramid(tiny(spatial_dims=2), in_channels=2)
    with pytest.raises(ValueError, match=r"no output \[B, C, H, W\] with a whole stride"):
        find_levels(nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1)))


@pytest.mark.parametrize(
    ("layers", "dims"),
    [
        ([nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)], 2),
        ([nn.ConvTranspose3d(1, 1, 2)], 3),
        ([nn.Conv1d(1, 1, 3), nn.Conv3d(1, 1, 1)], 3),  # channel attention is of no dimension
    ],
)
def test_convolutions_tell_the_number_of_axes(layers, dims):
    assert spatial_dims(nn.Sequential(*layers)) == dims
    assert spatial_dims(nn.Sequential(nn.Sequential(*layers))) == dims


def test_unclear_numbers_of_axes_are_refused():
    assert spatial_dims(nn.Conv2d(1, 1, 1)) == 2
    with pytest.raises(ValueError, match="Sequential has no 2D or 3D convolution"):
        spatial_dims(nn.Sequential(nn.Linear(2, 2), nn.Conv1d(1, 1, 1)))
    mixed = nn.Sequential(nn.Conv3d(1, 1, 1), nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(1, 1, 1)))
    with pytest.raises(ValueError, match=r"mixes 2D convolutions \(1\.1\) and 3D ones \(0\)"):
        Pyramid(mixed)


def test_strides_are_numbers_per_axis():
    assert as_stride(4, 3) == (4, 4, 4)
    assert as_stride([1, 4], 2) == (1, 4)
    with pytest.raises(ValueError, match=r"one or three .*\(z, y, x\), not \(4, 4\)"):
        as_stride((4, 4), 3)
    with pytest.raises(ValueError, match=r"one or two .*\(y, x\), not 0"):
        as_stride(0, 2)
    with pytest.raises(ValueError, match="not 4"):
        as_stride(2, 4)


def test_the_encoder_stays_untouched():
    net = tiny()
    keys = list(net.state_dict())
    pyramid = Pyramid(net)
    pyramid(torch.randn(1, 1, 64, 64, 64))
    assert pyramid.encoder is net
    assert list(net.state_dict()) == keys
    assert [k.removeprefix("encoder.") for k in pyramid.state_dict()] == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_hooks_go_after_a_failed_forward():
    pyramid = Pyramid(tiny())
    with pytest.raises(RuntimeError):
        pyramid(torch.randn(1, 2, 64, 64, 64))
    assert not any(m._forward_hooks for m in pyramid.modules())


def test_copies_and_pickles_run_on_their_own_weights():
    pyramid = Pyramid(tiny()).eval()
    x = torch.randn(1, 1, 64, 64, 64)
    expected = pyramid(x)
    for other in (copy.deepcopy(pyramid), pickle.loads(pickle.dumps(pyramid))):
        assert all(torch.equal(a, b) for a, b in zip(other(x), expected, strict=True))
        with torch.no_grad():
            other.encoder.conv1.weight.zero_()
        assert not torch.equal(other(x)[0], expected[0])
    assert torch.equal(pyramid(x)[0], expected[0])
