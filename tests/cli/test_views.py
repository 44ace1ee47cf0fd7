"""`medspark views`: the settings it offers and the sheet it writes."""

from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from matplotlib.image import imread
from omegaconf import OmegaConf

from medspark.cli.main import main
from medspark.data.phantom import make_phantom
from medspark.data.store import Record, Store, write_array
from medspark.data.views import PRESETS, ViewPolicy
from medspark.data.views_draw import Shot
from medspark.data.views_sheet import describe

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = ["views.size=[16,16,16]", "views.edge_mm=[30,40]", "progress=false"]


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    made = Store.create(tmp_path / "store")
    hu = make_phantom(3, (40, 48, 48), (2.0, 2.0, 2.0)).hu
    write_array(made.volume_path("a"), hu)
    made.put([Record("a", "a.mha", "p", size=hu.shape, spacing=(2.0, 2.0, 2.0))])
    return made


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_option_is_its_preset(name):
    """The files exist for people to read and change; the presets are what code uses."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("views", [f"views={name}", "store=store"])
    settings = OmegaConf.to_container(config.views)
    assert ViewPolicy.from_dict(settings) == PRESETS[name]
    assert settings.keys() == PRESETS[name].as_dict().keys()


def test_there_is_an_option_for_every_preset():
    assert {path.stem for path in (CONFIGS / "views").glob("*.yaml")} == set(PRESETS)


def test_sheet_is_written(store, tmp_path, capsys):
    out = tmp_path / "sheets" / "views.png"
    assert main(["views", "store=store", f"out={out}", "samples=2", *SMALL]) == 0
    assert "2 samples, 2 views of each" in capsys.readouterr().out
    picture = imread(out)
    assert picture.shape[1] > 500
    grey = picture[..., 0]
    assert ((grey > 0.1) & (grey < 0.9)).mean() > 0.05  # tissue, neither paper nor air
    assert [path.name for path in out.parent.iterdir()] == ["views.png"]
    again = tmp_path / "again.png"
    assert main(["views", "store=store", f"out={again}", "samples=2", *SMALL]) == 0
    assert np.array_equal(imread(again), picture)
    assert main(["views", "store=store", f"out={again}", "samples=2", "seed=1", *SMALL]) == 0
    assert not np.array_equal(imread(again), picture)


def test_slices_in_a_sheet(store, tmp_path):
    line = [
        "views",
        "store=store",
        "views=swav_2d",
        "crop=[1,30,30]",
        "samples=1",
        "progress=false",
    ]
    assert main([*line, "out=flat.png"]) == 0
    assert imread(tmp_path / "flat.png").shape[1] > 2000


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["views.noise=-1"], "noise"),
        (["volume=b"], "no volume 'b'"),
        (["samples=0"], "at least one"),
        (["window=wod"], "unknown window 'wod'"),
        (["views=simclr_2d", "crop=[8,8,8]"], "one voxel deep"),
    ],
)
def test_mistakes_are_told_in_a_line(store, capsys, wrong, told):
    assert main(["views", "store=store", "progress=false", *wrong]) == 1
    text = capsys.readouterr().err
    assert text.startswith("medspark views: error: ")
    assert told in text
    assert text.count("\n") == 1


def test_caption_says_what_was_done():
    shot = Shot(2, (8, 8, 8), (10.0, 20.0, 30.0), (60.0, 62.0, 61.0), (3.4, -5.0, 0.0),
                (False, False, True), 4.5, 0.2, 1.25, 1.1, -12.0, (-160.0, 240.0), 9.0, (1, 2),
                (((0, 0, 0), (1, 1, 1)),))  # fmt: skip
    assert describe(shot, (12.0, 20.0, 25.0), local=True).split("\n") == [
        "small 62 mm, W400 L40",
        "moved -2/+0/+5 mm, turned 3/-5/0°, mirror x",
        "HU+ x1.10 -12, noise 9",
        "slices 4.5 mm, blur 1.2 mm, 1 cut out",
    ]
