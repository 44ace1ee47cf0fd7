from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from medspark.data.windows import WINDOWS, Intensity, Window, finish


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("wide", -1000, 1000), ("soft_tissue", -160, 240), ("lung", -1350, 150), ("brain", 0, 80),
     ("bone", -500, 1300), ("abdomen", -150, 250), ("mediastinum", -125, 225)],
)  # fmt: skip
def test_named_windows(name: str, low: float, high: float) -> None:
    window = WINDOWS[name]
    assert (window.name, window.low, window.high) == (name, low, high)
    assert window.width == high - low
    assert window.level == (low + high) / 2


def test_normalise_by_hand() -> None:
    intensity = Intensity(Window("w", -100, 300), mean=0.5, std=0.25)
    hu = np.array([-2000, -100, 0, 100, 300, 3000], dtype=np.int16)
    expected = np.array([-2, -2, -1, 0, 2, 2], dtype=np.float32)
    got = intensity.normalise(hu)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-6)
    tensor = intensity.normalise(torch.from_numpy(hu))
    assert tensor.dtype == torch.float32
    torch.testing.assert_close(tensor, torch.from_numpy(expected))


def test_input_is_left_alone() -> None:
    intensity = Intensity.named("wide")
    array, tensor = np.zeros(3, np.float32), torch.zeros(3)
    intensity.normalise(array)
    intensity.normalise(tensor)
    assert (array == 0).all()
    assert (tensor == 0).all()


@pytest.mark.parametrize("name", WINDOWS)
def test_to_hu_inverts(name: str) -> None:
    intensity = Intensity.named(name)
    hu = np.linspace(intensity.window.low, intensity.window.high, 50).astype(np.float32)
    np.testing.assert_allclose(intensity.to_hu(intensity.normalise(hu)), hu, atol=0.01)
    tensor = torch.from_numpy(hu)
    torch.testing.assert_close(
        intensity.to_hu(intensity.normalise(tensor)), tensor, atol=0.01, rtol=0
    )


def test_dict_round_trip_is_json() -> None:
    intensity = Intensity.named("lung")
    assert Intensity.from_dict(json.loads(json.dumps(intensity.as_dict()))) == intensity


@pytest.mark.parametrize(
    "values", [{}, {"window": {"name": "w", "low": 0}, "mean": 0, "std": 1},
               {"window": {"name": "w", "low": 0, "high": 1}, "mean": 0, "std": 1, "other": 2}],
)  # fmt: skip
def test_from_dict_errors(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not an intensity record"):
        Intensity.from_dict(values)


def test_errors() -> None:
    with pytest.raises(ValueError, match="unknown window 'bones'"):
        Intensity.named("bones")
    with pytest.raises(ValueError, match="below high"):
        Window("w", 5, 5)
    with pytest.raises(ValueError, match="std 0"):
        Intensity(WINDOWS["wide"], 0.0, 0.0)


def test_finish_mirrors_each_sample_along_its_own_axes(device: torch.device) -> None:
    """All eight combinations in one batch, to the bit what numpy gives one by one."""
    intensity = Intensity.named("soft_tissue")
    hu = np.random.default_rng(0).integers(-1024, 3071, (8, 1, 4, 5, 6)).astype(np.int16)
    flips = torch.tensor([[bool(code & bit) for bit in (4, 2, 1)] for code in range(8)])
    got = finish(torch.from_numpy(hu.copy()).to(device), flips, intensity)
    assert (got.dtype, got.device.type) == (torch.float32, device.type)
    for sample, original, axes in zip(got.cpu(), hu, flips.tolist(), strict=True):
        mirrored = np.flip(original, [1 + axis for axis in range(3) if axes[axis]])
        np.testing.assert_array_equal(sample.numpy(), intensity.normalise(mirrored))


def test_finished_batches_share_no_memory() -> None:
    """The memory of a batch belongs to it alone, for as long as something refers to it."""
    intensity, none = Intensity.named("wide"), torch.zeros(2, 3, dtype=torch.bool)
    batches = [
        finish(torch.full((2, 1, 64, 64, 64), k, dtype=torch.int16), none, intensity)[1:]
        for k in range(5)
    ]
    for k, batch in enumerate(batches):
        assert torch.equal(batch, intensity.normalise(torch.full((1, 1, 64, 64, 64), k)))
