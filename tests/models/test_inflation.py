"""2D weights in 3D networks: exact where the volume does not change along z."""

import pytest
import torch

from medspark.models.weights import init_from

from .weight_tools import below, last_map, resnet, rgb, saved


def pair(name, **options):
    two = resnet(name, spatial_dims=2, **options).double()
    return two, resnet(name, seed=2, **options).double()


def constant_along_z(depth, side=64):
    image = torch.randn(1, 1, side, side, dtype=torch.float64)
    return image, image.unsqueeze(2).repeat(1, 1, depth, 1, 1)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_centre_inflation_is_exact_everywhere(name, tmp_path):
    two, three = pair(name)
    report = init_from(three, saved(tmp_path, two.state_dict()))
    image, volume = constant_along_z(64)
    expected = last_map(two, image)
    found = last_map(three, volume)
    assert expected.abs().max() > 0.1
    assert found.shape[2] == 2
    assert (found - expected.unsqueeze(2)).abs().max() < 1e-10
    kernels = {k for k, v in three.state_dict().items() if v.ndim == 5}
    assert set(report.inflated) == kernels
    assert torch.equal(three.bn1.running_var, two.bn1.running_var)
    assert three.bn1.num_batches_tracked == 41


def test_mean_inflation_is_exact_away_from_borders(tmp_path):
    two, three = pair("resnet18", block_inplanes=[2, 2, 3, 3])
    init_from(three, saved(tmp_path, two.state_dict()), inflate="mean")
    image, volume = constant_along_z(512, side=32)
    expected = last_map(two, image).unsqueeze(2)
    error = (last_map(three, volume) - expected).abs().amax((0, 1, 3, 4))
    # The last stage sees 217 voxels to each side of 32 z: inside the volume for z = 7, 8, 9.
    assert error[7:10].max() < 1e-10
    assert error[[0, 1, -2, -1]].min() > 1e-6  # zeros beyond the border take part
    weight = three.conv1.weight
    assert torch.equal(weight, weight[:, :, :1].expand_as(weight))
    torch.testing.assert_close(weight.sum(2), two.conv1.weight, rtol=0, atol=1e-12)


def test_mean_inflation_sees_every_slice_and_centre_does_not(tmp_path):
    two, mean = pair("resnet10")
    centre = resnet(seed=2).double()
    path = saved(tmp_path, two.state_dict())
    init_from(mean, path, inflate="mean")
    init_from(centre, path)
    volume = torch.randn(1, 1, 32, 32, 32, dtype=torch.float64)
    changed = volume.clone()
    changed[:, :, 9] += 1  # an odd slice: the stem of stride 2 is centred on even ones
    assert torch.equal(last_map(centre, volume), last_map(centre, changed))
    assert not torch.equal(last_map(mean, volume), last_map(mean, changed))


def test_colour_images_into_a_grey_volume(tmp_path):
    source = rgb().double()
    target = resnet(seed=2).double()
    report = init_from(
        target, saved(tmp_path, {"state_dict": below("model.", source.state_dict())})
    )
    image, volume = constant_along_z(32)
    expected = last_map(source, image.repeat(1, 3, 1, 1)).unsqueeze(2)
    assert (last_map(target, volume) - expected).abs().max() < 1e-10
    assert "conv1.weight" in report.inflated and "conv1.weight" in report.adapted


def test_other_types_of_numbers(tmp_path):
    source, target = resnet(), resnet(seed=2)
    init_from(target, saved(tmp_path, {k: v.half() if v.is_floating_point() else v
                                       for k, v in source.state_dict().items()}))  # fmt: skip
    assert target.conv1.weight.dtype == torch.float32
    assert torch.equal(target.conv1.weight, source.conv1.weight.half().float())
    assert target.conv1.weight.requires_grad
