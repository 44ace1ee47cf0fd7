"""What is drawn, read back from the artists, against numbers made by hand."""

import os
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from medspark.finetune.metrics import classification_metrics
from medspark.finetune.pictures import (
    DPI,
    confusion_figure,
    reliability_figure,
    roc_figure,
    wrap_name,
    write_pictures,
)

LONG = [
    "left lung, upper lobe including the lingula",
    "spine (lumbar vertebrae and sacrum, with surrounding muscles and fat)",
    "head_and_neck_region_of_patients_with_oropharyngeal_carcinoma",
    "Donaudampfschifffahrtselektrizitaetenhauptbetriebswerkbauunterbeamtengesellschaft",
    "costs $5 or $6",
    "_hidden",
    "a\nbroken  name",
    "",
    "pelvis",
]


def two_columns(positive):
    p = torch.tensor(positive, dtype=torch.float64)
    return torch.stack([1 - p, p], dim=1)


def random_split(n, n_classes, present=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.tensor(present if present is not None else range(n_classes))
    labels = allowed[torch.randint(0, len(allowed), (n,), generator=generator)]
    logits = torch.randn(n, n_classes, generator=generator)
    logits[torch.arange(n), labels] += 2
    return logits.softmax(dim=1), labels


def texts(figure: Figure) -> list[Text]:
    figure.draw_without_rendering()
    beyond = [t for axis in figure.axes for t in labels_beyond(axis)]
    found = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    return [t for t in found if t not in beyond]


def labels_beyond(axis: Axes) -> list[Text]:
    """Labels of ticks outside the limits, which matplotlib keeps but does not draw."""
    ticks = [
        (axis.get_xlim(), 0, axis.get_xticklabels()),
        (axis.get_ylim(), 1, axis.get_yticklabels()),
    ]
    return [
        t
        for limits, i, labels in ticks
        for t in labels
        if not min(limits) - 1e-9 <= t.get_position()[i] <= max(limits) + 1e-9
    ]


def words(figure: Figure) -> str:
    return "\n".join(t.get_text() for t in texts(figure))


def curves(figure: Figure):
    return [line for line in figure.axes[0].lines if line.get_label() != "chance"]


def test_binary_roc_goes_through_the_counted_points():
    figure = roc_figure(
        two_columns([0.1, 0.6, 0.6, 0.9, 0.3]), torch.tensor([0, 0, 1, 1, 1]), ["healthy", "tumour"]
    )
    (curve,) = curves(figure)
    # Thresholds from the top: 0.9 takes one positive, 0.6 one of each (a tie: a slope), 0.3, 0.1.
    expected = [[0, 0], [0, 1 / 3], [1 / 2, 2 / 3], [1 / 2, 1], [1, 1]]
    np.testing.assert_allclose(curve.get_xydata(), expected, atol=1e-6)
    assert curve.get_label() == "AUC 0.750"
    assert "ROC of tumour" in words(figure) and "3 of 5 samples are positive" in words(figure)
    chance = next(line for line in figure.axes[0].lines if line.get_label() == "chance")
    np.testing.assert_array_equal(chance.get_xydata(), [[0, 0], [1, 1]])


def test_each_class_has_its_curve_and_its_area():
    probabilities, labels = random_split(80, 4)
    figure = roc_figure(probabilities, labels, list("abcd"))
    areas = []
    for c, curve in enumerate(curves(figure)):
        positive = labels == c
        for x, y in curve.get_xydata()[1:-1]:  # every corner is the rates of some threshold
            called = probabilities[:, c, None] >= probabilities[None, :, c]
            rates = torch.stack(
                [called[~positive].double().mean(0), called[positive].double().mean(0)]
            )
            assert (rates.T - torch.tensor([x, y])).abs().sum(1).min() < 1e-6
        areas.append(np.trapezoid(curve.get_ydata(), curve.get_xdata()))
        assert f"AUC {areas[-1]:.3f}, n = {int(positive.sum())}\n{'abcd'[c]}" == curve.get_label()
    auc = classification_metrics(probabilities, labels)["auc"]
    assert np.mean(areas) == pytest.approx(auc, abs=1e-6)
    assert f"mean AUC {auc:.3f}, 4 of 4 classes, n = 80" in words(figure)


def test_twenty_curves_differ_without_colour():
    figure = roc_figure(*random_split(200, 20), [f"class {i}" for i in range(20)])
    styles = {(line.get_linestyle(), line.get_marker()) for line in curves(figure)}
    assert len(curves(figure)) == len(styles) == 20


def test_absent_classes_have_no_curve_and_are_named():
    figure = roc_figure(*random_split(60, 5, present=[0, 2, 4]), list("abcde"))
    assert [curve.get_label()[-1] for curve in curves(figure)] == ["a", "c", "e"]
    assert "No sample, so no curve: b, d" in words(figure)
    assert "3 of 5 classes" in words(figure)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_one_class_gives_a_note_instead_of_a_curve(n_classes):
    split = random_split(10, n_classes, present=[1])
    figure = roc_figure(*split, ["benign", "malignant", "other"][:n_classes])
    assert curves(figure) == []
    assert "AUC undefined:\nevery sample is\nmalignant" in words(figure)


def test_reliability_shows_the_bins_of_the_ece():
    # Top probabilities 0.95 (right), 0.95 (wrong), 0.62 (right): bins (14/15, 1] and (9/15, 10/15].
    probabilities, labels = two_columns([0.95, 0.05, 0.62]), torch.tensor([1, 1, 1])
    figure = reliability_figure(probabilities, labels)
    upper, lower = figure.axes
    bars, counts = upper.patches, [bar.get_height() for bar in lower.patches]
    assert len(bars) == 15 and counts == [0] * 9 + [1, 0, 0, 0, 0, 2]
    assert bars[9].get_height() == 1 and bars[14].get_height() == 0.5
    assert np.isnan(bars[3].get_height())
    np.testing.assert_allclose([bar.get_x() for bar in bars], np.arange(15) / 15)
    np.testing.assert_allclose([bar.get_width() for bar in bars], 1 / 15)
    diagonal, points = upper.lines
    np.testing.assert_array_equal(diagonal.get_xydata(), [[0, 0], [1, 1]])
    np.testing.assert_allclose(points.get_xydata()[[9, 14]], [[0.62, 1], [0.95, 0.5]])
    gaps = [np.diff(p.vertices[:, 1])[0] for p in upper.collections[0].get_paths()]
    np.testing.assert_allclose([gaps[9], gaps[14]], [0.62 - 1, 0.95 - 0.5])
    assert [t.get_text() for t in lower.texts] == ["1", "2"]
    ece = (0.38 + 2 * 0.45) / 3
    assert f"ECE {ece:.3f}\nn = 3, 15 bins of width 0.067" in words(figure)


def test_confusion_has_counts_and_shares_of_the_true_class():
    probabilities = torch.eye(3)[[0, 0, 1, 2, 2]]
    figure = confusion_figure(probabilities, torch.tensor([0, 1, 1, 1, 0]), ["a", "b", "c"])
    image = figure.axes[0].images[0]
    share = image.get_array()
    expected = [[1 / 2, 0, 1 / 2], [1 / 3, 1 / 3, 1 / 3]]
    np.testing.assert_allclose(np.ma.getdata(share)[:2], expected)
    assert np.ma.getmaskarray(np.ma.masked_invalid(share))[2].all()  # no sample: no shares
    assert (image.norm.vmin, image.norm.vmax) == (0, 1)
    cells = {t.get_position(): t.get_text() for t in figure.axes[0].texts}
    assert cells[0, 0] == "1\n50%" and cells[2, 1] == "1\n33%" and cells[1, 0] == "0\n0%"
    assert len(cells) == 6
    rows = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert rows == ["a\n(n = 2)", "b\n(n = 3)", "c\n(n = 0)"]
    # Recalls 1/2 and 1/3; F1 2/4, 2/4 and 0 for c, which is predicted.
    assert "balanced accuracy 0.417, macro F1 0.333" in words(figure)


def test_numbers_in_cells_stand_out_from_their_ground():
    split = random_split(400, 6)
    axis = confusion_figure(*split, list("abcdef")).axes[0]
    image = axis.images[0]
    for text in axis.texts:
        column, row = text.get_position()
        ground = image.cmap(image.norm(image.get_array()[row, column]))[:3]
        ink = {"white": 1.0, "black": 0.0, "0.55": 0.55}[text.get_color()]
        assert abs(float(np.dot(ground, [0.299, 0.587, 0.114])) - ink) > 0.35


CASES = {
    "binary": (random_split(96, 2), ["healthy tissue", "tumour"]),
    "binary, long names": (random_split(96, 2), LONG[1:3]),
    "long names": (random_split(300, 9), LONG),
    "twenty": (random_split(400, 20), [f"{LONG[i % 9]} {i}" for i in range(20)]),
    "absent": (random_split(60, 9, present=[0, 8]), LONG),
    "single": (random_split(20, 2, present=[1]), ["benign", LONG[2]]),
    "empty": ((torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)), list("abc")),
    "one sample": (random_split(1, 3), list("abc")),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("kind", "case"),
    [(kind, case) for kind in ("roc", "confusion") for case in CASES]
    + [("reliability", "binary"), ("reliability", "empty")],  # has no names
)
def test_no_text_is_cut_off_and_no_labels_overlap(kind, case):
    split, names = CASES[case]
    draw = {"roc": roc_figure, "confusion": confusion_figure, "reliability": reliability_figure}
    figure = draw[kind](*split, *([names] if kind != "reliability" else []))
    shown = texts(figure)
    for text in shown:
        box = text.get_window_extent()
        inside = figure.bbox.padded(1)
        assert inside.contains(*box.min) and inside.contains(*box.max), text.get_text()
    for axis in figure.axes:
        for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
            boxes = [t.get_window_extent() for t in labels if t in shown]
            for a, b in pairwise(boxes):
                assert not a.padded(-1).overlaps(b.padded(-1)), (case, kind)


def test_names_break_where_words_end_and_say_when_cut():
    assert wrap_name("left lung", 26) == "left lung"
    assert wrap_name("head_and_neck_region", 10) == "head_and_\nneck_\nregion"
    assert wrap_name("one two three four", 9, 1) == "one two…"
    assert wrap_name("abcdefghij", 4, 3) == "abcd\nefgh\nij"
    assert wrap_name("abcdefghij", 4, 2) == "abcd\nefg…"
    assert wrap_name("$5 or $6") == r"\$5 or \$6"


def test_pictures_are_written_whole(tmp_path):
    split = random_split(40, 3)
    paths = write_pictures(tmp_path / "new", *split, list("abc"))
    assert [p.name for p in paths] == ["roc.png", "reliability.png", "confusion.png"]
    assert sorted(os.listdir(tmp_path / "new")) == sorted(p.name for p in paths)
    height, width = imread(paths[1]).shape[:2]
    assert (width, height) == (6.2 * DPI, 7.0 * DPI)
    before = [p.read_bytes() for p in paths]
    assert [p.read_bytes() for p in write_pictures(tmp_path / "new", *split, list("abc"))] == before


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    split = random_split(40, 3)
    (path, *_) = write_pictures(tmp_path, *split, list("abc"))
    before = path.read_bytes()

    def fill_the_disk(self, target, **options):
        target.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", fill_the_disk)
    with pytest.raises(OSError, match="no space"):
        write_pictures(tmp_path, *random_split(40, 3, seed=1), list("abc"))
    assert path.read_bytes() == before
    assert len(os.listdir(tmp_path)) == 3


def test_names_must_fit_the_classes(tmp_path):
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        write_pictures(tmp_path / "pictures", *random_split(9, 3), ["a", "b"])
    assert not (tmp_path / "pictures").exists()
