"""Masked patch loss against loops that spell the definition out."""

import math

import pytest
import torch

from medspark.losses import (
    constant_baseline,
    masked_patch_loss,
    patchify,
    standardise,
    unpatchify,
)

CELL = (2, 4, 3)
CELLS = {2: (4, 3), 3: CELL}
both = pytest.mark.parametrize("dims", [2, 3])


def volumes(channels=2, batch=2, seed=0, dims=3):
    """Prediction, target and mask; in 2D the last two axes."""
    g = torch.Generator().manual_seed(seed)
    shape = (batch, channels, *(4, 8, 9)[-dims:])
    target = torch.randn(shape, generator=g, dtype=torch.float64) * 3 + 5
    prediction = torch.randn(shape, generator=g, dtype=torch.float64)
    visible = torch.rand(batch, *(2, 2, 3)[-dims:], generator=g) < 0.4
    return prediction, target, visible


def cells(visible):
    """(sample, slices of the voxels) of every hidden cell."""
    size = CELLS[visible.ndim - 1]
    for b, *cell in (~visible).nonzero().tolist():
        yield b, tuple(slice(i * n, (i + 1) * n) for i, n in zip(cell, size, strict=True))


def loop_loss(prediction, target, visible, normalise=True, eps=1e-6, floor=0.0):
    per_patch = []
    for b, where in cells(visible):
        x = target[(b, slice(None), *where)].flatten().tolist()
        p = prediction[(b, slice(None), *where)].flatten().tolist()
        if normalise:
            mean = sum(x) / len(x)
            var = sum((v - mean) ** 2 for v in x) / (len(x) - 1)  # unbiased
            x = [(v - mean) / math.sqrt(max(var, floor) + eps) for v in x]
        per_patch.append(sum((a - b) ** 2 for a, b in zip(p, x, strict=True)) / len(x))
    return sum(per_patch) / len(per_patch)


def test_patches_are_row_major_cells_and_unpatchify_is_the_inverse():
    volume = torch.arange(2 * 3 * 4 * 8 * 9).reshape(2, 3, 4, 8, 9)
    patches = patchify(volume, CELL)
    assert patches.shape == (2, 2 * 2 * 3, 3 * 24)
    # cell (1, 0, 2) is number 1*6 + 0*3 + 2
    assert torch.equal(patches[1, 8], volume[1, :, 2:4, 0:4, 6:9].flatten())
    assert torch.equal(unpatchify(patches, (4, 8, 9), CELL), volume)


def test_patches_of_images_are_row_major_cells_too():
    image = torch.arange(2 * 3 * 8 * 9).reshape(2, 3, 8, 9)
    patches = patchify(image, (4, 3))
    assert patches.shape == (2, 2 * 3, 3 * 12)
    # cell (1, 2) is number 1*3 + 2
    assert torch.equal(patches[1, 5], image[1, :, 4:8, 6:9].flatten())
    assert torch.equal(unpatchify(patches, (8, 9), (4, 3)), image)


@both
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("floor", [0.0, 12.0])
def test_loss_equals_the_loop(dims, normalise, floor):
    prediction, target, visible = volumes(dims=dims)
    loss = masked_patch_loss(
        prediction, target, visible, CELLS[dims], normalise=normalise, variance_floor=floor
    )
    expected = loop_loss(prediction, target, visible, normalise, floor=floor)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@both
def test_only_hidden_patches_carry_gradient(dims):
    prediction, target, visible = volumes(dims=dims)
    prediction.requires_grad_()
    masked_patch_loss(prediction, target, visible, CELLS[dims]).backward()
    hidden = torch.zeros_like(prediction, dtype=torch.bool)
    for b, where in cells(visible):
        hidden[(b, slice(None), *where)] = True
    assert (prediction.grad[~hidden] == 0).all()
    assert (prediction.grad[hidden] != 0).all()


def test_each_hidden_patch_counts_the_same_whatever_its_sample():
    prediction, target, visible = volumes()
    visible[0], visible[1] = True, False
    visible[0, 0, 0, 0] = False  # 1 hidden in sample 0, 12 in sample 1
    loss = masked_patch_loss(prediction, target, visible, CELL)
    assert loss.item() == pytest.approx(loop_loss(prediction, target, visible), rel=1e-12)


def test_nothing_hidden_is_zero_with_a_zero_gradient():
    prediction, target, visible = volumes()
    prediction.requires_grad_()
    loss = masked_patch_loss(prediction, target, torch.ones_like(visible), CELL)
    loss.backward()
    assert loss.item() == 0
    assert (prediction.grad == 0).all()


def test_floor_keeps_air_noise_small_and_leaves_tissue_alone():
    g = torch.Generator().manual_seed(0)
    air = -1 + 0.001 * torch.randn(1, 1, 50, generator=g)
    tissue = torch.randn(1, 1, 50, generator=g)
    official, _, _ = standardise(air, variance_floor=0.0)
    floored, _, scale = standardise(air, variance_floor=0.01)
    assert official.var() > 0.3
    assert floored.var() < 1e-3
    assert scale.item() == pytest.approx(math.sqrt(0.01 + 1e-6))
    assert torch.equal(standardise(tissue, variance_floor=0.01)[0], standardise(tissue)[0])


@both
@pytest.mark.parametrize(("normalise", "floor"), [(True, 0.0), (True, 12.0), (False, 0.0)])
def test_no_constant_beats_the_baseline(dims, normalise, floor):
    _, target, visible = volumes(dims=dims)
    cell, options = CELLS[dims], {"normalise": normalise, "variance_floor": floor}
    baseline = constant_baseline(target, visible, cell, **options).item()
    losses = [
        masked_patch_loss(torch.full_like(target, c), target, visible, cell, **options).item()
        for c in torch.linspace(-2, 8, 101).tolist()
    ]
    assert min(losses) >= baseline - 1e-9
    assert min(losses) == pytest.approx(baseline, rel=1e-3)


def test_baseline_of_the_official_target_is_known():
    _, target, visible = volumes()
    n = 2 * math.prod(CELL)
    assert constant_baseline(target, visible, CELL, eps=0.0).item() == pytest.approx((n - 1) / n)


def test_autocast_does_not_lower_the_precision():
    prediction, target, visible = volumes()
    prediction, target = prediction.float(), target.float()
    expected = masked_patch_loss(prediction, target, visible, CELL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = masked_patch_loss(prediction, target, visible, CELL)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    low = masked_patch_loss(prediction.bfloat16(), target, visible, CELL)
    assert low.dtype == torch.float32


def test_errors_name_the_numbers():
    prediction, target, visible = volumes()
    with pytest.raises(ValueError, match=r"\(4, 8, 9\).*\(2, 4, 4\)"):
        masked_patch_loss(prediction, target, visible, (2, 4, 4))
    with pytest.raises(ValueError, match="differ in shape"):
        masked_patch_loss(prediction[:1], target, visible, CELL)
    with pytest.raises(ValueError, match="needs bool"):
        masked_patch_loss(prediction, target, visible.float(), CELL)
    with pytest.raises(ValueError, match="one value"):
        masked_patch_loss(target[:, :1], target[:, :1], torch.zeros(2, 4, 8, 9).bool(), (1, 1, 1))
    with pytest.raises(ValueError, match="do not fill"):
        unpatchify(torch.zeros(1, 3, 24), (4, 8, 9), CELL)
    prediction, target, visible = volumes(dims=2)
    with pytest.raises(ValueError, match=r"\(8, 9\).*\(2, 4, 3\)"):
        masked_patch_loss(prediction, target, visible, CELL)
    with pytest.raises(ValueError, match=r"needs bool \(2, 2, 3\)"):
        masked_patch_loss(prediction, target, visible[:, None], (4, 3))
