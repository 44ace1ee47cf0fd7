"""The reconstruction without ground-truth statistics uses nothing that was hidden."""

import dataclasses

import torch

from medspark.models.spark import SparKOutput, TargetOptions
from medspark.pretrain.blind import blind_reconstruction
from medspark.sparse import BlockMask


def output_of(volume, prediction, visible, normalise=True):
    mask = BlockMask(torch.tensor(visible).view(1, 1, 1, -1))
    target = TargetOptions(normalise=normalise, eps=0.0)
    return SparKOutput(torch.zeros(()), prediction, mask, volume, (2, 2, 2), target)


def volume_of(cells):
    """[1, 1, 2, 2, 2 n]: random cells with the given (mean, SD), exactly."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for mean, sd in cells:
        x = torch.randn(1, 1, 2, 2, 2, generator=generator, dtype=torch.float64)
        parts.append((x - x.mean()) / x.std() * sd + mean)
    return torch.cat(parts, dim=-1)


def test_statistics_are_those_of_visible_cells_by_distance():
    volume = volume_of([(10.0, 1.0), (99.0, 9.0), (40.0, 4.0), (99.0, 9.0)])
    prediction = torch.randn(volume.shape, dtype=torch.float64)
    blind = blind_reconstruction(output_of(volume, prediction, [True, False, True, False]))
    assert torch.equal(blind[..., 0:2], volume[..., 0:2])
    assert torch.equal(blind[..., 4:6], volume[..., 4:6])
    # Cell 1 lies between the two; cell 3 is 1 and 3 cells away, so the weights are .9 and .1.
    middle, last = prediction[..., 2:4], prediction[..., 6:8]
    assert torch.allclose(blind[..., 2:4], middle * 2.5 + 25)
    assert torch.allclose(blind[..., 6:8], last * (0.9 * 4 + 0.1) + 0.9 * 40 + 1)


def test_hidden_voxels_change_nothing():
    volume = volume_of([(10.0, 1.0), (99.0, 9.0), (40.0, 4.0)])
    output = output_of(volume, torch.randn(volume.shape), [True, False, True])
    other = volume.clone()
    other[..., 2:4] = -1e6 * torch.rand(2, 2, 2, dtype=torch.float64)
    changed = dataclasses.replace(output, volume=other)
    assert torch.equal(blind_reconstruction(output), blind_reconstruction(changed))
    assert not torch.equal(output.reconstruction, changed.reconstruction)


def test_perfect_prediction_is_right_up_to_brightness_and_contrast():
    volume = volume_of([(10.0, 2.0), (30.0, 8.0)])
    truth = volume[..., 2:4]
    prediction = (volume - 30) / 8
    output = output_of(volume, prediction, [True, False])
    assert torch.allclose(output.reconstruction, volume)
    assert torch.allclose(blind_reconstruction(output)[..., 2:4], (truth - 30) / 8 * 2 + 10)


def test_raw_targets_need_no_statistics():
    volume = volume_of([(10.0, 1.0), (99.0, 9.0)])
    output = output_of(volume, torch.randn_like(volume), [True, False], normalise=False)
    assert torch.equal(blind_reconstruction(output), output.reconstruction)
