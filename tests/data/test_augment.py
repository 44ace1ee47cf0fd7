from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from medspark.data.augment import PRESETS, Augmentation, affine, augmentation, rotation, smooth

ONE = np.ones(3)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(size=(8, 10, 12)).astype(np.float32))


@pytest.fixture
def cube() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(size=(9, 9, 9)).astype(np.float32))


@pytest.mark.parametrize("move", [(2, 0, 0), (0, -3, 0), (0, 0, 1), (1, 2, -4)])
def test_translation_moves_voxels_exactly(x: torch.Tensor, move: tuple[int, ...]) -> None:
    """Content goes `move` voxels on; what comes in is the patch mirrored at its face."""
    moved = affine(x, np.eye(3), move, ONE)
    near = [(abs(m), abs(m)) for m in move]
    padded = np.pad(x.numpy(), near, mode="symmetric")
    box = tuple(slice(abs(m) - m, abs(m) - m + n) for m, n in zip(move, x.shape, strict=True))
    np.testing.assert_allclose(moved, padded[box], atol=2e-5)


@pytest.mark.parametrize(("axis", "plane"), [(0, (1, 2)), (1, (0, 2)), (2, (0, 1))])
def test_quarter_rotation_is_rot90(cube: torch.Tensor, axis: int, plane: tuple[int, int]) -> None:
    angles = [0.0, 0.0, 0.0]
    angles[axis] = math.pi / 2
    turned = affine(cube, rotation(angles, 3), (0, 0, 0), ONE)
    np.testing.assert_allclose(turned, torch.rot90(cube, 1, plane), atol=2e-5)


def test_quarter_rotation_of_a_picture(cube: torch.Tensor) -> None:
    turned = affine(cube[0], rotation((math.pi / 2, 0, 0), 2), (0, 0), np.ones(2))
    np.testing.assert_allclose(turned, torch.rot90(cube[0], 1, (0, 1)), atol=2e-5)


def test_rotations_are_composed_x_first() -> None:
    """z-vector by 90 degrees about x lands on y, which 90 degrees about z bring to x."""
    end = rotation((math.pi / 2, 0, math.pi / 2), 3) @ [1, 0, 0]
    np.testing.assert_allclose(end, [0, 0, 1], atol=1e-12)


def test_thick_slices_stay_thick() -> None:
    """Slices twice as thick: a quarter turn about x exchanges 2 mm along z and 1 mm along y."""
    x = torch.zeros(9, 18, 3)
    x[6] = 1  # a plane 2 voxels above the centre: 4 mm
    turned = affine(x, rotation((0, 0, math.pi / 2), 3), (0, 0, 0), np.array([2.0, 1.0, 1.0]))
    # 4 mm from the centre of y (between voxels 8 and 9) and 2 mm wide: voxels 12 and 13
    profile = turned[4, :, 1].numpy()
    assert profile.argmax() in (12, 13)
    assert profile[12:14].sum() == pytest.approx(1.5, abs=0.01)  # of 2, linear interpolation
    assert abs((profile * (np.arange(18) - 8.5)).sum() / profile.sum() - 4) < 1e-3


def trilinear(x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Values at places `[..., 3]` (voxels) that lie between voxels of `x`."""
    low = np.floor(places).astype(int)
    share = places - low
    found = np.zeros(places.shape[:-1])
    for corner in np.ndindex(2, 2, 2):
        weight = np.where(corner, share, 1 - share).prod(axis=-1)
        found += weight * x[tuple(np.moveaxis(low + corner, -1, 0))]
    return found


def test_affine_by_its_definition() -> None:
    """Rotation, zoom, shift and unequal voxels in one, away from the faces."""
    mm = np.array([2.0, 1.0, 1.5])
    matrix = rotation((0.1, -0.05, 0.2), 3) * 1.1
    move = np.array([0.4, -0.7, 0.2])
    x = np.random.default_rng(4).normal(size=(24, 30, 36)).astype(np.float32)
    moved = affine(torch.from_numpy(x), matrix, move, mm).numpy()
    centre = (np.array(x.shape) - 1) / 2
    inner = np.stack(np.meshgrid(*(np.arange(8, n - 8) for n in x.shape), indexing="ij"), -1)
    from_centre = (inner - move - centre) * mm
    source = (from_centre @ np.linalg.inv(matrix).T) / mm + centre
    np.testing.assert_allclose(moved[8:-8, 8:-8, 8:-8], trilinear(x, source), atol=1e-4)


def test_zoom_enlarges() -> None:
    x = torch.zeros(1, 21, 21)
    x[0, 10, 13] = 1
    big = affine(x, np.eye(3) * 2, (0, 0, 0), ONE)
    assert np.unravel_index(int(big[0].argmax()), (21, 21)) == (10, 16)


def test_blur_is_gaussian() -> None:
    x = torch.zeros(17, 17, 17)
    x[8, 8, 8] = 1
    blurred = smooth(x, (1.5, 0.0, 1.0))
    along_z, along_x = (
        np.where(
            np.abs(np.arange(17) - 8) <= reach, np.exp(-(((np.arange(17) - 8) / sd) ** 2) / 2), 0
        )
        for sd, reach in ((1.5, 5), (1.0, 3))
    )
    expected = np.zeros((17, 17, 17))
    expected[:, 8, :] = np.outer(along_z / along_z.sum(), along_x / along_x.sum())
    np.testing.assert_allclose(blurred, expected, atol=1e-6)
    assert blurred.sum().item() == pytest.approx(1, abs=1e-5)


def test_blur_keeps_a_plane_of_one_value() -> None:
    np.testing.assert_allclose(smooth(torch.full((3, 4, 5), 2.5), (2, 2, 2)), 2.5, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 10, 12), (10, 12)])
def test_nothing_at_zero_strength(x: torch.Tensor, shape: tuple[int, ...]) -> None:
    patch = x.flatten()[: math.prod(shape)].reshape(shape)
    for index in range(5):
        assert torch.equal(PRESETS["none"](patch, (0, 0, index)), patch)


def test_function_of_the_key_alone(x: torch.Tensor) -> None:
    strong = PRESETS["strong"]
    first = strong(x, (1, 2, 3))
    np.random.default_rng().random(7)
    torch.rand(3)
    assert torch.equal(first, strong(x, (1, 2, 3)))
    for key in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert not torch.equal(first, strong(x, key))


def test_input_is_not_changed(x: torch.Tensor) -> None:
    before = x.clone()
    for preset in PRESETS.values():
        for index in range(4):
            preset(x, (0, 0, index)).add_(1)
    assert torch.equal(x, before)


@pytest.mark.parametrize("axis", range(3))
def test_only_allowed_axes_are_mirrored(x: torch.Tensor, axis: int) -> None:
    allowed = (axis == 0, axis == 1, axis == 2)
    mirrored = 0
    for index in range(60):
        y = Augmentation(flips=allowed)(x, (0, 0, index))
        assert torch.equal(y, x) or torch.equal(y, x.flip(axis))
        mirrored += not torch.equal(y, x)
    assert 18 <= mirrored <= 42


def test_picture_uses_the_last_two_axes(x: torch.Tensor) -> None:
    only_x = Augmentation(flips=(True, False, True))
    seen = {bool(torch.equal(only_x(x[0], (0, 0, i)), x[0].flip(1))) for i in range(20)}
    assert seen == {True, False}
    assert all(not torch.equal(only_x(x[0], (0, 0, i)), x[0].flip(0)) for i in range(20))


def test_quarter_turns(cube: torch.Tensor) -> None:
    """All four where the plane is square, two where it is not, in voxels or mm."""
    turn = Augmentation(quarter_turns=True)

    def seen(patch: torch.Tensor, spacing: tuple[float, ...] | None) -> set[int]:
        found = set()
        for i in range(60):
            y = turn(patch, (0, 0, i), spacing)
            assert y.shape == patch.shape
            found |= {k for k in range(4) if torch.equal(y, torch.rot90(patch, k, (-2, -1)))}
        return found

    assert seen(cube, None) == {0, 1, 2, 3}
    assert seen(cube, (3, 1, 1)) == {0, 1, 2, 3}
    assert seen(cube, (1, 2, 1)) == {0, 2}
    assert seen(cube[..., :7].clone(), None) == {0, 2}


def test_ranges_of_the_values(x: torch.Tensor) -> None:
    change = Augmentation(contrast=0.2, brightness=0.3)
    pairs = [np.polyfit(x.flatten(), change(x, (0, 0, i)).flatten(), 1) for i in range(200)]
    scale, shift = np.array(pairs).T
    assert 0.8 <= scale.min() < 0.83
    assert 1.17 < scale.max() <= 1.2
    assert -0.3 <= shift.min() < -0.26
    assert 0.26 < shift.max() <= 0.3


def test_ranges_of_the_places() -> None:
    """A bright voxel strays as far as the shift allows, on each axis, and no farther."""
    x = torch.zeros(20, 30, 40)
    x[10, 15, 20] = 1
    strays = []
    for i in range(120):
        y = Augmentation(translate=0.1)(x, (0, 0, i)).numpy()
        grid = np.indices(y.shape).reshape(3, -1)
        strays.append(grid @ y.ravel() / y.sum() - (10, 15, 20))
    far = np.abs(strays).max(axis=0)
    assert (far <= np.array([2, 3, 4]) + 1e-3).all()
    assert (far > np.array([1.8, 2.7, 3.6])).all()


def test_noise_has_the_drawn_size() -> None:
    x = torch.zeros(24, 24, 24)
    sds = [Augmentation(noise=0.4)(x, (0, 0, i)).std().item() for i in range(60)]
    assert max(sds) <= 0.41
    assert max(sds) > 0.36
    assert min(sds) < 0.05


def test_one_change_leaves_the_draw_of_others(x: torch.Tensor) -> None:
    """Switching noise off, say, moves nothing else."""
    both = Augmentation(flips=(True,) * 3, brightness=0.2, translate=0.1)
    for i in range(8):
        y, z = both(x, (0, 0, i)), Augmentation(flips=(True,) * 3, brightness=0.2)(x, (0, 0, i))
        moved = Augmentation(translate=0.1)(x, (0, 0, i))
        assert not torch.equal(y, z)
        assert not torch.equal(moved, x)
        flips = [a for a in range(3) if np.random.default_rng([0, 0, i]).random(3)[a] < 0.5]
        shift = (z - x.flip(flips)).mean()
        alone = Augmentation(brightness=0.2)(x, (0, 0, i)) - x
        np.testing.assert_allclose(alone, float(shift), atol=1e-5)
        at = Augmentation(flips=(True,) * 3, translate=0.1)(x, (0, 0, i))
        np.testing.assert_allclose(y - at, float(shift), atol=1e-5)


def test_strong_keeps_the_patch_recognisable() -> None:
    ball = np.zeros((32, 32, 32), np.float32)
    z, y, x = np.ogrid[:32, :32, :32]
    ball[(z - 16) ** 2 + (y - 16) ** 2 + (x - 16) ** 2 < 81] = 2
    for i in range(10):
        found = PRESETS["strong"](torch.from_numpy(ball), (0, 0, i)).numpy()
        assert found.shape == ball.shape
        assert np.isfinite(found).all()
        assert np.corrcoef(found.ravel(), ball.ravel())[0, 1] > 0.6


def test_names() -> None:
    assert augmentation(True) is PRESETS["light"]
    assert augmentation(False) is PRESETS["none"]
    own = Augmentation(noise=1)
    assert augmentation(own) is own
    with pytest.raises(ValueError, match="unknown augmentation 'mild'"):
        augmentation("mild")


@pytest.mark.parametrize(
    "bad", [{"noise": -1}, {"rotate": (1.0, math.nan, 0.0)}, {"contrast": 1.0}, {"flips": (True,)}]
)
def test_impossible_strengths(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must be|need three"):
        Augmentation(**bad)  # type: ignore[arg-type]


def test_wrong_axes(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="2 or 3 axes"):
        PRESETS["light"](x[None], (0, 0, 0))
