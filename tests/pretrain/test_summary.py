"""The page of a run: it stands alone, and says what the run logged."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
import torch
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from medspark.pretrain.summary import read_history, write_summary


class Balanced(HTMLParser):
    """Raises where a tag is closed that is not open."""

    VOID = ("meta", "img", "!doctype")

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def page(finished):
    return finished[1].summary.read_text()


def test_stands_alone(finished, page):
    assert finished[1].summary == finished[0] / "summary.html"
    assert "http" not in page
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page) == []
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 4  # curves, and panels of the first, middle and last validation
    for picture in pictures:
        assert imread(io.BytesIO(base64.b64decode(picture))).std() > 0.05


def test_says_what_was_logged(finished, page):
    history, metrics = read_history(finished[0]), finished[1].metrics
    losses = history["val/loss"]
    assert f"{metrics['val/loss']:.4f} at the end" in page
    best = min(losses, key=lambda step: losses[step])
    assert f"best {losses[best]:.4f} after step {best + 1}" in page
    assert f"{metrics['val/constant']:.4f} on the same masks" in page
    times = sorted(history["time/decoder"].values())
    assert f"<td>decoder</td><td>{(times[2] + times[3]) / 2 * 1000:.1f} ms</td>" in page
    for row in ("<td>seed</td><td>5</td>", "<td>optim.lr</td><td>0.003</td>"):
        assert row in page
    assert "After step 2." in page and "After step 6." in page


def test_text_of_users_is_escaped(finished, tmp_path):
    content = torch.load(finished[1].last, weights_only=True)
    content["hyper_parameters"]["intensity"] = {"window": "<script>alert(1)</script>"}
    (tmp_path / "checkpoints").mkdir()
    torch.save(content, tmp_path / "checkpoints" / "last.ckpt")
    text = write_summary(tmp_path).read_text()
    assert "&lt;script&gt;" in text and "<script>" not in text
    assert "No step was timed" in text


def test_tensorboard_has_curves_and_pictures(finished):
    events = EventAccumulator(str(finished[0] / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    history = read_history(finished[0])
    names = ("loss", "lr", "weight_decay", "grad_norm", "visible")
    times = ("step", "data", "encoder", "decoder", "optimiser")
    for name in [*(f"train/{n}" for n in names), *(f"time/{n}" for n in times)]:
        logged = {e.step: e.value for e in events.Scalars(name)}
        assert logged == pytest.approx(history[name], rel=1e-5), name
    assert {e.value for e in events.Scalars("train/visible")} == {0.375}  # 3 of 8 cells
    assert [e.step for e in events.Images("panel")] == [2, 4, 6]
