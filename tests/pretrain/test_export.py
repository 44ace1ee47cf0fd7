"""Export to the public network, and files that are not what they say."""

import json
import os
import pickle

import monai.networks.nets as nets
import pytest
import torch

from medspark.models import create_encoder
from medspark.pretrain.export import export_encoder, load_encoder, load_plan, plan_path
from medspark.pretrain.spark_module import SparKModule

PREFIX = "spark.pyramid.encoder."


def monai_net():
    return nets.ResNet(
        "basic",
        [1, 1, 1, 1],
        [4, 4, 8, 8],
        n_input_channels=1,
        conv1_t_stride=2,
        feed_forward=False,
    )


@pytest.fixture(scope="module")
def checkpoint(finished):
    return finished[1].last


def test_plan_says_how_to_use_the_encoder(checkpoint):
    plan = load_plan(checkpoint)
    assert plan["encoder"]["name"] == "resnet10"
    assert plan["strides"] == [[4] * 3, [8] * 3, [16] * 3, [32] * 3]
    assert plan["intensity"] == {"window": [-1000.0, 1000.0], "mean": 0.2, "std": 0.3}
    assert (plan["spacing"], plan["crop"]) == ([3.0, 1.5, 1.5], [64, 64, 64])
    assert plan["medspark_version"]
    assert plan["commit"]


def test_dense_outputs_of_the_exported_monai_net_are_those_of_the_encoder(checkpoint, tmp_path):
    trained = SparKModule.load_from_checkpoint(checkpoint, weights_only=True).spark.encoder.eval()
    out = tmp_path / "deep" / "encoder.pt"
    assert export_encoder(checkpoint, out) == plan_path(out)
    theirs = monai_net()
    theirs.load_state_dict(torch.load(out, weights_only=True), strict=True)
    x = torch.randn(2, 1, 64, 64, 64)
    expected = trained(x)
    assert expected.abs().sum() > 0
    assert torch.equal(theirs.eval()(x), expected)
    assert sorted(p.name for p in out.parent.iterdir()) == ["encoder.pt", "encoder.pt.json"]


def test_logits_of_a_network_with_its_head(tmp_path):
    # a head that pre-training does not use travels along
    kwargs = {"block_inplanes": [4, 4, 8, 8], "feed_forward": True, "num_classes": 3}
    spec = {"encoder": {"name": "resnet10", "kwargs": kwargs}, "width": 32}
    module = SparKModule(spec, {"max_steps": 1})
    content = {"state_dict": module.state_dict(), "plan": module.plan}
    torch.save(content, tmp_path / "a.ckpt")
    export_encoder(tmp_path / "a.ckpt", tmp_path / "a.pt")
    encoder, _ = load_encoder(tmp_path / "a.pt")
    x = torch.randn(1, 1, 64, 64, 64)
    assert torch.equal(encoder.eval()(x), module.spark.encoder.eval()(x))


def test_encoder_from_checkpoint_and_from_export_are_the_same(checkpoint, tmp_path):
    export_encoder(checkpoint, tmp_path / "e.pt")
    first, plan = load_encoder(checkpoint)
    second, again = load_encoder(tmp_path / "e.pt")
    assert plan == again
    a, b = first.state_dict(), second.state_dict()
    assert list(a) == list(create_encoder("resnet10", **plan["encoder"]["kwargs"]).state_dict())
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert first.conv1.weight.requires_grad


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile_ran",)


def damaged(content, path, **changes):
    torch.save({**content, **changes}, path)
    return path


def test_hostile_pickles_do_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.ckpt"
    torch.save({"plan": Hostile()}, path)
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Hostile()))
    for name in ("hostile.ckpt", "raw.ckpt"):
        for use in (load_plan, load_encoder, lambda p: export_encoder(p, tmp_path / "out.pt")):
            with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
                use(tmp_path / name)
    assert not (tmp_path / "hostile_ran").exists()
    assert not (tmp_path / "out.pt").exists()


def test_truncated_and_foreign_files(checkpoint, tmp_path):
    whole = checkpoint.read_bytes()
    for name, data in {"half": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
            load_encoder(tmp_path / name)
    torch.save([1], tmp_path / "list")
    with pytest.raises(ValueError, match="holds a list"):
        load_encoder(tmp_path / "list")
    torch.save({"state_dict": {}}, tmp_path / "no_plan")
    with pytest.raises(ValueError, match="no adaptation plan"):
        load_encoder(tmp_path / "no_plan")
    with pytest.raises(FileNotFoundError):
        load_encoder(tmp_path / "absent")


def test_plans_that_do_not_fit(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    plan, path = content["plan"], tmp_path / "bad.ckpt"
    cases = [
        ({**plan, "encoder": {"name": "os.system", "kwargs": {}}}, "unknown encoder"),
        ({**plan, "encoder": {"name": "resnet18", "kwargs": {"pretrained": True}}}, "no option"),
        # 40 GB of weights: refused by shape, before any memory is taken
        (
            {**plan, "encoder": {"name": "resnet10", "kwargs": {"block_inplanes": [20000] * 4}}},
            "do not fit",
        ),
        ({**plan, "encoder_key": "nowhere"}, "no weights below"),
        ({**plan, "strides": "x"}, "'strides'"),
        ({k: v for k, v in plan.items() if k != "spacing"}, "'spacing'"),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            load_encoder(damaged(content, path, plan=bad))


def test_missing_weights_and_bad_sidecar(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    state = {k: v for k, v in content["state_dict"].items() if not k.endswith("conv1.weight")}
    with pytest.raises(ValueError, match="do not fit"):
        load_encoder(damaged(content, tmp_path / "a.ckpt", state_dict=state))
    state = {**content["state_dict"], PREFIX + "bn1.bias": 3}
    with pytest.raises(ValueError, match="not a plain dict of tensors"):
        load_encoder(damaged(content, tmp_path / "a.ckpt", state_dict=state))
    export_encoder(checkpoint, tmp_path / "e.pt")
    plan_path(tmp_path / "e.pt").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        load_encoder(tmp_path / "e.pt")
    plan_path(tmp_path / "e.pt").write_text(json.dumps({"encoder": {}}))
    with pytest.raises(ValueError, match=r"'method'|'encoder_key'"):
        load_plan(tmp_path / "e.pt")


def test_commit_comes_from_the_checkout_else_from_the_binary(monkeypatch, tmp_path) -> None:
    from medspark.pretrain import plan
    from medspark.sparse._ext import load_extension

    extension = load_extension()
    built = extension.build_info()["commit"] if extension else "unknown"
    monkeypatch.setattr(plan.medspark, "__file__", str(tmp_path / "medspark" / "__init__.py"))
    assert plan.source_commit() == built
