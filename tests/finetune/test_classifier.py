"""The file of a classifier: what is in it, and what is refused."""

import pytest
import torch

from medspark.data.windows import Intensity
from medspark.finetune.classifier import (
    fitting_spec,
    load_classifier,
    make_plan,
    save_classifier,
)
from medspark.finetune.knn import NearestNeighbours
from medspark.finetune.module import ClassifierModule
from medspark.models.encoders import encoder_from_spec

SPEC = {"name": "resnet10", "kwargs": {"block_inplanes": [4, 4, 8, 8]}}
GEOMETRY = {
    "size": [32, 32, 32],
    "spacing": [1.5, 1.5, 1.5],
    "patch_mm": [48.0, 48.0, 48.0],
    "patch_mm_low": [48.0, 48.0, 48.0],
    "patch_mm_high": [48.0, 48.0, 48.0],
}


def plan_of(**options):
    defaults = {
        "encoder": SPEC,
        "mode": "full",
        "class_names": ["a", "b"],
        "intensity": Intensity.named("lung").as_dict(),
        "grey": False,
        "dims": 3,
        "geometry": GEOMETRY,
    }
    return make_plan(**(defaults | options))


@pytest.fixture
def module():
    torch.manual_seed(3)
    found = ClassifierModule(encoder_from_spec(SPEC), 2)
    found.feature_mean += 0.5
    return found


def test_file_is_plain_and_gives_the_same_answers(tmp_path, module):
    pretrained = {"method": "medspark", "spacing": [2.0] * 3, "secret": 1, "medspark_version": "1"}
    path = save_classifier(tmp_path / "best.ckpt", module, plan_of(pretrained=pretrained))
    content = torch.load(path, weights_only=True)
    assert set(content) == {"state_dict", "plan"}
    assert content["plan"]["pretrained"] == {
        "method": "medspark",
        "spacing": [2.0] * 3,
        "medspark_version": "1",
    }
    assert set(content["plan"]["versions"]) == {"medspark", "torch"}
    x = torch.randn(3, 1, 32, 32, 32)
    with torch.no_grad():
        expected = module.eval()(x).softmax(1)
    torch.testing.assert_close(load_classifier(path).probabilities(x), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.ckpt"]


def test_neighbours_come_back(tmp_path):
    weights = [1.0, 2.0]
    module = NearestNeighbours(encoder_from_spec(SPEC), 2, 5, 3, 0.2, class_weights=weights)
    module.remember(torch.randn(5, 8), torch.tensor([0, 1, 1, 0, 1]))
    plan = plan_of(mode="knn", knn={"k": 3, "temperature": 0.2, "references": 5})
    path = save_classifier(tmp_path / "best.ckpt", module, plan)
    x = torch.randn(3, 1, 32, 32, 32)
    found = load_classifier(path).probabilities(x)
    torch.testing.assert_close(found, module.probabilities(module.features(x)))
    assert found.std(0).min() > 0


def test_weights_of_another_network_are_refused(tmp_path, module):
    other = {"name": "resnet10", "kwargs": {"block_inplanes": [4, 4, 8, 16]}}
    path = save_classifier(tmp_path / "best.ckpt", module, plan_of(encoder=other))
    with pytest.raises(ValueError, match="do not fit"):
        load_classifier(path)


def test_classifier_without_its_network_is_refused(tmp_path, module):
    path = save_classifier(tmp_path / "best.ckpt", module, plan_of(encoder=None))
    with pytest.raises(ValueError, match="does not say which network"):
        load_classifier(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}}, "holds no classifier"),
        ({"plan": {"encoder": SPEC}, "state_dict": {}}, "holds no classifier"),
        ([1, 2], "holds a list, not a checkpoint"),
        ({"plan": {"format": "medspark-classifier", "version": 2}}, "version 2"),
        ({"plan": {"format": "medspark-classifier", "version": 1}}, "entry 'encoder'"),
        ({"plan": plan_of()}, "do not fit"),
        (
            {"plan": {**plan_of(), "encoder": {"name": "os.system"}}, "state_dict": {}},
            "unknown enc",
        ),
        (
            {"plan": {**plan_of(mode="knn", knn={"k": 9, "temperature": 1, "references": 5})}},
            "out of range",
        ),
        (
            {
                "plan": {
                    **plan_of(mode="knn", knn={"k": 1, "temperature": 1, "references": 1 << 60})
                }
            },
            "out of range",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "f.ckpt")
    with pytest.raises(ValueError, match=message):
        load_classifier(tmp_path / "f.ckpt")


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"plan": torch.nn.Linear(1, 1)}, tmp_path / "f.ckpt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_classifier(tmp_path / "f.ckpt")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_classifier(tmp_path / "none.ckpt")


def test_spec_is_written_only_if_it_fits():
    encoder = encoder_from_spec(SPEC)
    assert fitting_spec(encoder, SPEC) == SPEC
    assert fitting_spec(encoder, {"name": "resnet18", "kwargs": SPEC["kwargs"]}) is None
    assert fitting_spec(encoder, {"name": "resnet10", "kwargs": {}}) is None
    assert fitting_spec(encoder, None) is None
