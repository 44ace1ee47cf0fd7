from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from medspark.data.io import Volume, read_volume
from medspark.data.leaks import find_leaks
from medspark.data.regions import (
    RegionSettings,
    Stretch,
    build_regions,
    even_resolution,
    main,
    places,
    read_stretches,
)
from medspark.data.task_body import body_mask, with_skin
from medspark.data.task_histogram import histogram_baseline, histograms
from medspark.data.tasks import load_task
from medspark.data.windows import Intensity
from medspark.finetune.metrics import classification_metrics

Writer = Callable[..., Path]
TABLE = Path(__file__).parents[2] / "benchmarks/body_region.csv"
HEADER = "volume,patient,region,split,low_mm,high_mm"
SMALL = RegionSettings(size=8, spacing=4.0, cubes={"train": 3, "test": 2})


def volume_of(hu: np.ndarray, spacing: tuple[float, float, float]) -> Volume:
    return Volume(hu, spacing, (0.0, 0.0, 0.0), np.eye(3), "CT", None, None, "LPS", "int16", [])


def body(shape: tuple[int, int, int], spacing: tuple[float, float, float], hu: int) -> np.ndarray:
    """A cylinder of one value in noisy air, 130 mm wide, its axis along z through the middle."""
    y, x = (
        (np.arange(n) + 0.5) * s - n * s / 2 for n, s in zip(shape[1:], spacing[1:], strict=True)
    )
    air = np.random.default_rng(0).normal(-1005, 10, shape)
    return np.where(np.add.outer(y**2, x**2) < 65**2, hu, air).astype(np.int16)


@pytest.fixture
def corpus(tmp_path: Path, write_image: Writer) -> Path:
    """Four people; a: two regions, 50 HU below and 90 HU above 100 mm; the others likewise."""
    for i, name in enumerate("abcd"):
        spacing = ((4.0, 3.0, 3.0), (5.0, 2.0, 2.0))[i % 2]
        shape = tuple(round(n / s) for n, s in zip((200, 180, 180), spacing, strict=True))
        hu = body(shape, spacing, 50)
        hu[round(100 / spacing[0]) :][hu[round(100 / spacing[0]) :] > 0] = 90
        write_image(tmp_path / f"corpus/{name}.nii.gz", hu, spacing)
    return tmp_path / "corpus"


def stretches() -> list[Stretch]:
    return [
        Stretch(f"{name}.nii.gz", f"p_{name}", region, split, low, high)
        for name, split in (("a", "train"), ("b", "train"), ("c", "test"), ("d", "test"))
        for region, low, high in (("low", 16, 70), ("high", 130, 184))
    ]


def test_resolution_becomes_that_of_the_coarsest_grid() -> None:
    """A sharp edge along z at 1 mm is spread like one that a 5 mm grid shows."""
    hu = np.full((120, 40, 40), -100, np.int16)
    hu[60:] = 300
    sharp, _ = even_resolution(volume_of(hu, (1.0, 4.0, 4.0)), RegionSettings())
    steps = np.diff(sharp.hu[:, 20, 20].astype(float))
    at = np.arange(len(steps)) * 2 + 2.0  # mm, the faces between voxels
    share = steps / steps.sum()
    centre = (share * at).sum()
    spread = (share * (at - centre) ** 2).sum()
    blur = (25 - 1) / (8 * math.log(2))
    # Linear interpolation to 4 mm and to 2 mm adds the variance of triangles, at most s^2 / 6 each.
    assert centre == pytest.approx(60, abs=0.2)
    assert blur < spread < blur + (16 + 4) / 6 + 0.5


def test_coarsest_grid_is_not_blurred() -> None:
    """At 5 mm nothing is missing: a 4 mm grid of it by linear interpolation alone."""
    hu = np.random.default_rng(0).integers(0, 100, (16, 16, 16)).astype(np.int16)
    settings = RegionSettings(spacing=5.0, coarse=5.0)
    even, inside = even_resolution(volume_of(hu, (5.0,) * 3), settings)
    np.testing.assert_array_equal(even.hu, hu)
    assert inside.all()


def test_grids_cannot_be_told_apart() -> None:
    """The same body from 2 mm and from 5 mm slices: equal but for a few HU away from its skin."""
    found = []
    for spacing in ((2.0, 2.0, 2.0), (5.0, 4.0, 4.0)):
        shape = tuple(round(n / s) for n, s in zip((160, 160, 160), spacing, strict=True))
        found.append(
            even_resolution(volume_of(body(shape, spacing, 60), spacing), RegionSettings())
        )
    (one, inside), (two, other) = found
    assert one.hu.shape == two.hu.shape == (80, 80, 80)
    assert (inside == other).mean() > 0.98
    gap = np.abs(one.hu.astype(int) - two.hu)[:, 20:-20, 20:-20]
    assert gap.max() <= 1


def test_couch_and_padding_vanish() -> None:
    """A thin plate under the body and two values of padding: all -1000 afterwards."""
    hu = body((40, 60, 60), (4.0, 3.0, 3.0), 60)
    hu[:, 57, 5:55] = 200  # 21 mm below the body
    hu[:, :, :3] = -1024
    even, inside = even_resolution(volume_of(hu, (4.0, 3.0, 3.0)), RegionSettings())
    y, x = (np.abs((np.arange(n) + 0.5) * 2 - 90) for n in even.hu.shape[1:])
    far = np.add.outer(y**2, x**2) > 78**2
    near = np.add.outer(y**2, x**2) < 55**2
    assert (even.hu[:, far] == -1000).all()
    assert not inside[:, far].any()
    assert inside[:, near].all()
    assert np.abs(even.hu[:, near].astype(int) - 60).max() <= 2


def test_lungs_count_as_body() -> None:
    """Air with tissue on three sides, also where the volume ends in it; between legs it does not."""
    ring = np.full((12, 40, 40), -1000, np.int16)
    ring[:, 5:35, 5:35] = 40
    ring[:, 10:30, 10:30] = -880
    found = body_mask(ring)
    assert found[:, 8:32, 5:35].all()
    assert found[:, 5:35, 8:32].all()
    assert not found[:, :, :5].any() and not found[:, 35:].any()
    cut = body_mask(np.ascontiguousarray(ring[:, :, :20]))
    assert cut[:, 8:32, 5:].all()
    assert not cut[:, :5].any()
    legs = np.full((12, 40, 40), -1000, np.int16)
    legs[:, 5:35, 2:15] = 40
    legs[:, 5:35, 25:38] = 40
    legs[:2] = 40  # joined at the feet's end, so that they are one part
    assert not body_mask(legs)[6, :, 16:24].any()


def test_skin_is_one_voxel_around() -> None:
    """A voxel becomes the cube around it; at a face nothing wraps round."""
    spot = np.zeros((5, 6, 7), bool)
    spot[0, 3, 6] = True
    expected = np.zeros_like(spot)
    expected[:2, 2:5, 5:] = True
    np.testing.assert_array_equal(with_skin(spot), expected)


def test_nothing_but_air() -> None:
    with pytest.raises(ValueError, match="no body"):
        body_mask(np.full((12, 12, 12), -1000, np.int16))


@pytest.mark.parametrize("spacing", [(6.0, 1.0, 1.0), (1.0, 0.5, 0.5)])
def test_grids_outside_the_range(spacing: tuple[float, float, float]) -> None:
    hu = np.zeros((30, 30, 30), np.int16)
    with pytest.raises(ValueError, match=r"edges from 0\.7 to 5\.0 mm can be made alike"):
        even_resolution(volume_of(hu, spacing), RegionSettings())


def test_places() -> None:
    """All different, centres between the heights, enough body, the same again, another by seed."""
    inside = np.zeros((60, 50, 50), bool)
    inside[:, 10:40, 10:40] = True
    row = Stretch("v", "p", "r", "train", 40, 60)
    settings = RegionSettings(size=16, step=2)
    found = places(inside, row, 40, settings)
    assert len(set(found)) == 40
    for z, y, x in found:
        assert 40 <= (z + 8) * 2 <= 60
        assert inside[z : z + 16, y : y + 16, x : x + 16].mean() >= 0.6
        assert max(y, x) + 16 <= 50
    assert {z for z, _, _ in found} == {12, 14, 16, 18, 20, 22}
    assert found == places(inside, row, 40, settings)
    assert found != places(inside, row, 40, replace(settings, seed=1))


def test_too_few_places() -> None:
    row = Stretch("v.nii", "p", "r", "train", 40, 60)
    with pytest.raises(ValueError, match=r"'v\.nii' has 0 places for cubes of r between 40 and 60"):
        places(np.zeros((60, 50, 50), bool), row, 1, RegionSettings(size=16))
    with pytest.raises(ValueError, match="smaller than a cube of 64 mm"):
        places(np.ones((60, 30, 50), bool), row, 1, RegionSettings())


def test_build(corpus: Path, tmp_path: Path) -> None:
    """Splits, classes and voxels: each cube is the stretch that the table says."""
    out = build_regions(corpus, stretches(), tmp_path / "task", SMALL)
    task = load_task(out)
    assert (task.class_names, task.warnings) == (["high", "low"], [])
    counts = Counter((s.split, s.patient, s.label_name) for s in task.samples)
    assert counts == {
        ("train", "p_a", "low"): 2, ("train", "p_b", "low"): 1, ("test", "p_c", "low"): 1,
        ("train", "p_a", "high"): 2, ("train", "p_b", "high"): 1, ("test", "p_c", "high"): 1,
        ("test", "p_d", "low"): 1, ("test", "p_d", "high"): 1,
    }  # fmt: skip
    with (out / "provenance.csv").open() as file:
        origin = {row["file"]: row for row in csv.DictReader(file)}
    for sample in task.samples:
        voxels, spacing = task.read(sample)
        assert voxels.shape == (8, 8, 8)
        assert spacing == (4.0, 4.0, 4.0)
        row = origin[sample.id]
        even, _ = even_resolution(read_volume(corpus / row["volume"]), SMALL)
        z, y, x = (round(float(row[f"{axis}_mm"]) / 4) for axis in "zyx")
        np.testing.assert_array_equal(voxels, even.hu[z : z + 8, y : y + 8, x : x + 8])
        level = np.median(voxels[voxels > 0])
        assert abs(level - {"low": 50, "high": 90}[sample.label_name]) <= 2


def test_same_bytes_twice(corpus: Path, tmp_path: Path) -> None:
    def build(name: str) -> dict[str, bytes]:
        out = build_regions(corpus, stretches(), tmp_path / name, SMALL)
        return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*.*")}

    assert build("one") == build("two")


def test_all_or_nothing(corpus: Path, tmp_path: Path) -> None:
    """A volume that fails late leaves no folder, and an existing one is not touched."""
    (tmp_path / "out").mkdir()
    (corpus / "d.nii.gz").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"'d\.nii\.gz': the name ends in"):
        build_regions(corpus, stretches(), tmp_path / "out/task", SMALL)
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(FileExistsError, match="remove it"):
        build_regions(corpus, stretches(), tmp_path / "out", SMALL)


def test_bad_requests(corpus: Path, tmp_path: Path) -> None:
    rows = stretches()
    with pytest.raises(ValueError, match="the split 'test' has no high"):
        build_regions(corpus, rows[:5], tmp_path / "task", SMALL)
    with pytest.raises(ValueError, match="leaves the folder 'corpus'"):
        build_regions(corpus, [replace(rows[0], volume="../x")], tmp_path / "task", SMALL)
    with pytest.raises(FileNotFoundError, match="no volume 'x' in"):
        build_regions(corpus, [replace(rows[0], volume="x")], tmp_path / "task", SMALL)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["volume,patient,region,split,low_mm"], r"lacks the column\(s\) high_mm"),
        ([HEADER], "has no rows"),
        ([HEADER, "v,p,r,train,1,x"], "line 2: low_mm and high_mm must be numbers"),
        ([HEADER, "v,p,r,train,9,9"], "0 <= low_mm < high_mm"),
        ([HEADER, "v,p,r,train,nan,9"], "0 <= low_mm < high_mm"),
        ([HEADER, "v,p,,train,1,9"], "needs names"),
        ([HEADER, "v,p,r,train,1,9", "w,p,q,test,1,9"], "line 3: patient 'p' is in two splits"),
        ([HEADER, "v,p,r,train,1,9", "w,p,r,train,1,9"], "'r' of 'p' comes twice"),
    ],
)
def test_bad_tables(tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "t.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read_stretches(tmp_path / "t.csv")


def test_command(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{s.volume},{s.patient},{s.region},{s.split},{s.low_mm},{s.high_mm}"
            for s in stretches()]  # fmt: skip
    (tmp_path / "t.csv").write_text("\n".join([HEADER, *rows]))
    words = ["--corpus", str(corpus), "--table", str(tmp_path / "t.csv"), "--spacing", "4"]
    main([*words, "--out", str(tmp_path / "task"), "--size", "8"])
    assert "wrote the task" in capsys.readouterr().out
    assert len(load_task(tmp_path / "task").split("train")) == 240
    with pytest.raises(SystemExit) as error:
        main([*words, "--out", str(tmp_path / "task")])
    assert error.value.code == 1
    assert "exists: remove it" in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("--corpus", "--table", "--out", "low_mm"))


def histogram_task(folder: Path, levels: tuple[int, int], write_image: Writer) -> Path:
    """Two classes of noise about a level of HU, 20 + 20 in training, 60 + 60 in test."""
    rng, rows = np.random.default_rng(0), ["file,patient,label,label_name,split"]
    for i in range(160):
        patch = rng.normal(levels[i % 2], 30, (6, 6, 6)).astype(np.int16)
        write_image(folder / f"{i}.mha", patch)
        rows.append(f"{i}.mha,p{i},{i % 2},{'ab'[i % 2]},{'train' if i < 40 else 'test'}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder


def test_histogram_baseline(tmp_path: Path, write_image: Writer) -> None:
    """Perfect where the levels differ, at chance where only noise does."""
    task = load_task(histogram_task(tmp_path / "far", (0, 40), write_image))
    probabilities, labels = histogram_baseline(task)
    assert labels.tolist() == [0, 1] * 60
    assert probabilities.sum(dim=1).tolist() == pytest.approx([1] * 120)
    assert classification_metrics(probabilities, labels)["auc"] > 0.99
    same = load_task(histogram_task(tmp_path / "same", (0, 0), write_image))
    auc = classification_metrics(*histogram_baseline(same))["auc"]
    assert 0.35 < auc < 0.65


def test_histogram_values(tmp_path: Path, write_image: Writer) -> None:
    """Half below the window, a quarter in its middle, a quarter above: shares 1/2, 1/4, 1/4."""
    patch = np.repeat(np.array([-1024, -1024, 0, 3000], np.int16), 16).reshape(4, 4, 4)
    write_image(tmp_path / "a.mha", patch)
    (tmp_path / "labels.csv").write_text("file,patient,label,label_name,split\na.mha,p,0,a,train")
    task = load_task(tmp_path)
    (row,) = histograms(task, task.samples, Intensity.named("wide"))
    expected = torch.zeros(64, dtype=torch.float64)
    expected[[0, 32, 63]] = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).sqrt()
    torch.testing.assert_close(row, expected)


def test_histogram_needs_every_class(tmp_path: Path, write_image: Writer) -> None:
    task = load_task(histogram_task(tmp_path / "t", (0, 40), write_image))
    kept = [s for s in task.samples if s.split == "test" or s.label == 0]
    with pytest.raises(ValueError, match="the split 'train' has no sample of class 'b'"):
        histogram_baseline(replace(task, samples=kept))


def test_table_of_the_corpus(real_data: Path) -> None:
    """Patients as the corpus names them, nothing non-commercial, every region in every split."""
    with (real_data / "ct/manifest.csv").open() as file:
        manifest = {row["file"]: row for row in csv.DictReader(file)}
    rows = read_stretches(TABLE)
    for row in rows:
        assert manifest[row.volume]["patient"] == row.patient
        assert manifest[row.volume]["non_commercial"] == "no"
    assert {(s.region, s.split) for s in rows} == {
        (region, split)
        for region in ("abdomen", "chest", "leg", "pelvis", "thigh")
        for split in ("train", "val", "test")
    }
    with (real_data / "tasks/sts_tumour_patches/labels.csv").open() as file:
        tested = {row["patient"] for row in csv.DictReader(file) if row["split"] == "test"}
    assert {s.split for s in rows if s.patient in tested} == {"test"}


@pytest.mark.slow
def test_body_region(real_data: Path, tmp_path: Path) -> None:
    """The first patient of each region and split: no leaks, and regions show what they must."""
    cubes = {"train": 18, "val": 6, "test": 6}
    settings = RegionSettings(cubes=cubes)
    first = {(s.region, s.split): s for s in read_stretches(TABLE)[::-1]}
    out = build_regions(real_data / "ct", list(first.values()), tmp_path / "task", settings)
    task = load_task(out)
    assert Counter(s.split for s in task.samples) == {k: 5 * n for k, n in cubes.items()}
    assert find_leaks(task) == []
    voxels = {s.id: task.read(s)[0] for s in task.samples}
    assert {v.shape for v in voxels.values()} == {(32, 32, 32)}
    assert min(v.min() for v in voxels.values()) == -1000

    def share(region: str, low: int, high: int) -> float:
        chosen = [voxels[s.id] for s in task.samples if s.label_name == region]
        return float(np.mean([((v > low) & (v < high)).mean() for v in chosen]))

    assert share("chest", -980, -600) > 0.2  # lung
    assert max(share(r, -980, -600) for r in ("abdomen", "pelvis", "thigh", "leg")) < 0.12
    assert share("thigh", 0, 100) > 0.35  # muscle
    stored = sitk.ReadImage(str(out / task.samples[0].id))
    assert stored.GetSpacing() == (2.0, 2.0, 2.0)
