"""The positive control is solvable, not by the histogram, and not after shuffling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medspark.data.control import (
    CLASS_NAMES,
    WINDOW,
    FibrePhantoms,
    fibre_phantom,
    write_control_task,
)
from medspark.data.leaks import check_leaks
from medspark.data.task_histogram import histogram_baseline
from medspark.data.tasks import load_task
from medspark.data.windows import Intensity


def lean(volume: np.ndarray) -> float:
    """Covariance of the slopes along y and x after smoothing: its sign is the direction."""
    k = np.stack(np.meshgrid(*[np.fft.fftfreq(n) for n in volume.shape], indexing="ij"))
    radius = np.sqrt((k**2).sum(0))
    band = np.exp(-0.5 * ((radius - 1 / 7) / 0.04) ** 2)
    smooth = np.fft.ifftn(np.fft.fftn(volume.astype(float)) * band).real
    return float((np.diff(smooth, axis=1)[:, :, :-1] * np.diff(smooth, axis=2)[:, :-1]).mean())


def test_classes_are_mirror_images() -> None:
    one, other = fibre_phantom(3, 8, 0), fibre_phantom(3, 8, 1)
    np.testing.assert_array_equal(one[:, :, ::-1], other)
    assert one.dtype == np.int16
    assert not np.array_equal(one, fibre_phantom(3, 10, 0))
    assert not np.array_equal(one, fibre_phantom(4, 8, 0))
    np.testing.assert_array_equal(one, fibre_phantom(3, 8, 0))


def test_direction_can_be_told_and_shuffling_takes_it_away() -> None:
    """By a filter made for it; no threshold is fitted."""
    plain, shuffled = (FibrePhantoms(5, 60, shuffled=s) for s in (False, True))
    labels = np.arange(60) % 2 == 1
    right = [(lean(plain[i][0].numpy()) > 0) == labels[i] for i in range(60)]
    chance = [(lean(shuffled[i][0].numpy()) > 0) == labels[i] for i in range(60)]
    assert np.mean(right) > 0.95
    assert 0.3 < np.mean(chance) < 0.7


def test_shuffled_phantoms_keep_their_histogram() -> None:
    plain, shuffled = (FibrePhantoms(5, 60, shuffled=s)[7] for s in (False, True))
    assert torch.equal(plain.flatten().sort().values, shuffled.flatten().sort().values)
    assert not torch.equal(plain, shuffled)
    expected = Intensity.named(WINDOW).normalise(fibre_phantom(5, 7, 1))
    np.testing.assert_array_equal(plain[0].numpy(), expected)


def test_a_task_with_splits_of_its_own(tmp_path: Path) -> None:
    task = load_task(
        write_control_task(tmp_path / "a", {"train": (7, 10), "test": (0, 6)}, size=16)
    )
    assert task.class_names == list(CLASS_NAMES)
    assert [s.label for s in task.split("train")] == [0, 1] * 5
    assert check_leaks(task) == []
    hu, spacing = task.read(task.split("test")[3])
    np.testing.assert_array_equal(hu, fibre_phantom(0, 3, 1, 16))
    assert spacing == (1.5, 1.5, 1.5)
    with pytest.raises(ValueError, match="series of its own"):
        write_control_task(tmp_path / "b", {"train": (7, 10), "test": (7, 6)})


def test_the_histogram_tells_nothing(tmp_path: Path) -> None:
    """With a hundred labels; of several test sets the mean is at chance."""
    from medspark.finetune.metrics import classification_metrics

    found = []
    for series in range(4):
        splits = {"train": (10 + series, 100), "test": (20 + series, 100)}
        task = load_task(write_control_task(tmp_path / str(series), splits, size=16))
        result = histogram_baseline(task, intensity=Intensity.named(WINDOW))
        found.append(classification_metrics(*result)["auc"])
    assert abs(np.mean(found) - 0.5) < 0.06, found
