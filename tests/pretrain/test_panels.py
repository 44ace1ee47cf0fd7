"""Panels show the right slices, in the right units."""

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from medspark.pretrain.panels import Display, make_panel, save_panel


@pytest.fixture
def scene():
    g = torch.Generator().manual_seed(0)
    volume = torch.rand(8, 12, 16, generator=g)
    visible = torch.zeros(2, 3, 4, dtype=torch.bool)
    visible[0] = True
    rebuilt = volume.clone()
    rebuilt[4:] += 0.25
    return volume, rebuilt, visible


def images(figure):
    """3 x 4 arrays as drawn."""
    axes = [a for a in figure.axes if a.get_images()]
    return [axes[4 * i : 4 * i + 4] for i in range(3)]


def test_slices_units_and_masks(scene):
    volume, rebuilt, visible = scene
    show = Display(scale=2000.0, offset=-1000.0, window=(-160.0, 240.0), unit="HU")
    figure = make_panel(volume, rebuilt, visible, display=show, position=(5, 7, 9), title="a title")
    grid = images(figure)
    hu = volume.numpy() * 2000 - 1000
    expected = [hu[5], hu[:, 7], hu[:, :, 9]]
    for row, truth in zip(grid, expected, strict=True):
        shown = [axis.get_images()[0].get_array() for axis in row]
        np.testing.assert_allclose(shown[0], truth, rtol=1e-6)
        assert row[0].get_images()[0].get_clim() == (-160.0, 240.0)
    axial = [axis.get_images()[0].get_array() for axis in grid[0]]
    assert axial[1].mask.all()  # z = 5 is in the hidden half
    np.testing.assert_allclose(axial[3], 500.0, rtol=1e-3)
    coronal = [axis.get_images()[0].get_array() for axis in grid[1]]
    assert not coronal[1].mask[:4].any()
    assert coronal[1].mask[4:].all()
    assert (coronal[3][:4] == 0).all()
    assert figure.get_suptitle() == "a title"
    assert "z = 5" in grid[0][0].get_ylabel()


def test_two_reconstructions_and_the_error_of_the_first(scene):
    volume, rebuilt, visible = scene
    blind = rebuilt + 0.5
    figure = make_panel(volume, rebuilt, visible, blind=blind, position=(5, 7, 9))
    axes = [a for a in figure.axes if a.get_images()]
    assert len(axes) == 15
    shown = [axis.get_images()[0].get_array() for axis in axes[:5]]
    for found, expected in zip(shown[2:], (rebuilt, blind, (rebuilt - volume).abs()), strict=True):
        np.testing.assert_allclose(found, expected[5].numpy(), rtol=1e-5, atol=1e-6)
    titles = [axis.get_title() for axis in axes[:5]]
    assert "true mean and SD" in titles[2] and "neighbours" in titles[3]


def test_head_up_front_up_and_aspect_in_mm(scene):
    grid = images(make_panel(*scene, spacing=(5.0, 1.0, 2.0)))
    assert [row[0].get_images()[0].origin for row in grid] == ["upper", "lower", "lower"]
    assert [row[0].get_aspect() for row in grid] == [0.5, 2.5, 5.0]


def test_the_planes_cut_hidden_cells(scene):
    volume, rebuilt, visible = scene
    visible = torch.ones(2, 3, 4, dtype=torch.bool)
    visible[1, 2, 3] = False
    for row in images(make_panel(volume, rebuilt, visible)):
        assert np.ma.getmaskarray(row[1].get_images()[0].get_array()).any()


def test_written_whole(scene, tmp_path):
    path = save_panel(tmp_path / "deep" / "panel.png", *scene, spacing=(3.0, 1.0, 1.0))
    assert imread(path).std() > 0.1
    assert [p.name for p in path.parent.iterdir()] == ["panel.png"]


def test_constant_volumes_can_be_drawn(tmp_path):
    flat = torch.zeros(4, 4, 4)
    save_panel(tmp_path / "flat.png", flat, flat, torch.ones(1, 1, 1, dtype=torch.bool))


def test_wrong_shapes(scene):
    volume, rebuilt, visible = scene
    with pytest.raises(ValueError, match="takes volume and reconstruction"):
        make_panel(volume[None], rebuilt[None], visible)
    with pytest.raises(ValueError, match="8 voxels do not divide into 3 cells"):
        make_panel(volume, rebuilt, torch.ones(3, 3, 4, dtype=torch.bool))
