from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from medspark.data.tasks import Sample, Task, split_by_patient

PARTS = {"train": 0.6, "val": 0.2, "test": 0.2}


def task_of(counts: dict[str, dict[int, int]], classes: int = 2) -> Task:
    """Patients with so many samples of each class."""
    samples = [
        Sample(f"{patient}-{label}-{i}", patient, label, "abcdef"[label], "old")
        for patient, labels in counts.items()
        for label, n in labels.items()
        for i in range(n)
    ]
    return Task("toy", Path("."), samples, list("abcdef"[:classes]))


def patients(task: Task) -> dict[str, str]:
    return {s.patient: s.split for s in task.samples}


def test_whole_patients_and_like_shares() -> None:
    """50 patients of one class or both: shares of samples and of classes are as asked."""
    task = task_of({f"p{i}": {0: 2 + i % 3, 1: i % 2 * 3} for i in range(50)})
    drawn = split_by_patient(task, PARTS, seed=0)
    assert len(set(patients(drawn).items())) == 50
    assert all(patients(drawn)[s.patient] == s.split for s in drawn.samples)
    for label in (0, 1):
        held = Counter(s.split for s in drawn.samples if s.label == label)
        for split, share in PARTS.items():
            assert held[split] / held.total() == pytest.approx(share, abs=0.03)


def test_only_splits_change() -> None:
    task = task_of({f"p{i}": {i % 2: 2} for i in range(9)})
    drawn = split_by_patient(task, PARTS, seed=0)
    assert [replace(s, split="old") for s in drawn.samples] == task.samples
    assert {s.split for s in task.samples} == {"old"}


def test_depends_on_the_seed_alone() -> None:
    task = task_of({f"p{i}": {i % 2: 2} for i in range(20)})
    turned = replace(task, samples=task.samples[::-1])
    first = patients(split_by_patient(task, PARTS, seed=5))
    assert first == patients(split_by_patient(turned, PARTS, seed=5))
    assert first != patients(split_by_patient(task, PARTS, seed=6))


def test_rare_class_is_in_every_split() -> None:
    """Three patients of class 1 among 40: one for each split, though train's share is larger."""
    task = task_of({f"p{i}": {1 if i < 3 else 0: 4} for i in range(40)})
    for seed in range(5):
        drawn = split_by_patient(task, PARTS, seed)
        assert sorted(s for p, s in patients(drawn).items() if p in ("p0", "p1", "p2")) == [
            "test", "train", "val",
        ]  # fmt: skip
        assert drawn.warnings == []


def test_missing_class_is_said() -> None:
    task = task_of({"p": {1: 3}, **{f"q{i}": {0: 3} for i in range(10)}})
    drawn = split_by_patient(task, PARTS, seed=0)
    assert drawn.split("train")
    assert drawn.warnings == [
        "too few patients: the split 'val' has none of class 'b'",
        "too few patients: the split 'test' has none of class 'b'",
    ]


def test_no_split_is_empty() -> None:
    """As many patients as splits, whatever their classes."""
    drawn = split_by_patient(task_of({"p": {0: 1}, "q": {0: 1}, "r": {1: 9}}), PARTS, seed=0)
    assert sorted(patients(drawn).values()) == ["test", "train", "val"]


@pytest.mark.parametrize("parts", [{"train": 0.5, "test": 0.4}, {"train": 1.2, "test": -0.2}, {}])
def test_bad_fractions(parts: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="positive and add up to 1"):
        split_by_patient(task_of({"p": {0: 1}, "q": {1: 1}}), parts, seed=0)


def test_too_few_patients() -> None:
    with pytest.raises(ValueError, match=r"2 patient\(s\) cannot fill 3 splits"):
        split_by_patient(task_of({"p": {0: 1}, "q": {1: 1}}), PARTS, seed=0)
