"""Export to the public network, and files that are not what they say."""

import json
import os
import pickle

import monai.networks.nets as nets
import pytest
import torch

from medspark.models import create_encoder
from medspark.models.weights import init_from
from medspark.pretrain.export import export_encoder, load_encoder, load_plan, plan_path
from medspark.pretrain.plan import make_plan
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
    assert sorted(p.name for p in out.parent.iterdir()) == [
        "encoder.pt",
        "encoder.pt.card.md",
        "encoder.pt.json",
    ]


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


# Images, and nnU-Net's network

RESENC = {"features_per_stage": [4, 8, 8], "strides": [1, 2, [1, 2, 2]], "n_blocks_per_stage": 1}


def written(tmp_path, name, kwargs, strides, **entries):
    """A checkpoint of an encoder with values of its own."""
    encoder = create_encoder(name, **kwargs)
    generator = torch.Generator().manual_seed(3)
    for tensor in encoder.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.3 * (tensor.ndim > 1))
    plan = make_plan(
        method="spark",
        encoder={"name": name, "kwargs": kwargs},
        encoder_key="a.encoder",
        strides=strides,
        intensity={"window": {"name": "w", "low": -1000, "high": 1000}, "mean": 0.36, "std": 0.24},
        spacing=[2.0, 1.5, 1.5],
        crop=[32, 64, 64],
    )
    state = {f"a.encoder.{k}": v for k, v in encoder.state_dict().items()}
    path = tmp_path / f"{name}.ckpt"
    torch.save({"state_dict": state, "plan": plan, **entries}, path)
    return encoder.eval(), path


def test_encoder_of_images_goes_out_and_comes_back(tmp_path):
    kwargs = {"block_inplanes": [4, 4, 8, 8], "spatial_dims": 2}
    trained, path = written(tmp_path, "resnet18", kwargs, [[4, 4], [8, 8], [16, 16], [32, 32]])
    export_encoder(path, tmp_path / "e.pt")
    theirs = nets.ResNet(
        "basic", [2, 2, 2, 2], [4, 4, 8, 8], spatial_dims=2, n_input_channels=1,
        conv1_t_stride=2, feed_forward=False,
    )  # fmt: skip
    theirs.load_state_dict(torch.load(tmp_path / "e.pt", weights_only=True), strict=True)
    again, _ = load_encoder(tmp_path / "e.pt")
    started = create_encoder("resnet18", **kwargs)
    init_from(started, tmp_path / "e.pt")
    x = torch.randn(1, 1, 64, 64)
    expected = trained(x)
    assert expected.abs().sum() > 0
    for network in (theirs, again, started):
        assert torch.equal(network.eval()(x), expected)


def nnunet_network(classes, seed):
    """As nnU-Net builds it from plans."""
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    torch.manual_seed(seed)
    return ResidualEncoderUNet(
        1, 3, [4, 8, 8], torch.nn.Conv3d, [[3, 3, 3]] * 3, [[1, 1, 1], [2, 2, 2], [1, 2, 2]],
        [1, 1, 1], classes, [1, 1], conv_bias=True,
        norm_op=torch.nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=torch.nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=True,
    ).eval()  # fmt: skip


def start_as_nnunet_does(network, file):
    """All of the network but its segmentation layers must be in the file, in equal shape."""
    content = torch.load(file, weights_only=True)["network_weights"]
    state = network.state_dict()
    needed = [key for key in state if ".seg_layers." not in key]
    assert [key for key in needed if key not in content] == []
    assert [key for key in needed if content[key].shape != state[key].shape] == []
    network.load_state_dict({**state, **{key: content[key] for key in needed}})


def test_nnunet_starts_from_the_encoder(tmp_path):
    trained, path = written(tmp_path, "resenc", RESENC, [[1] * 3, [2] * 3, [2, 4, 4]])
    before = torch.random.get_rng_state()
    assert export_encoder(path, tmp_path / "u.pth", target="nnunet") == tmp_path / "u.pth.json"
    assert torch.equal(torch.random.get_rng_state(), before)
    network = nnunet_network(classes=5, seed=7)
    head = network.decoder.seg_layers[0].weight.clone()
    x = torch.randn(1, 1, 8, 16, 16)
    assert not torch.equal(network.encoder(x)[-1], trained(x)[-1])
    start_as_nnunet_does(network, tmp_path / "u.pth")
    for a, b, c in zip(network.encoder(x), network.decoder.encoder(x), trained(x), strict=True):
        assert torch.equal(a, c) and torch.equal(b, c)
    assert torch.equal(network.decoder.seg_layers[0].weight, head)
    assert network(x)[0].isfinite().all()


def test_nnunet_file_is_strict_seeded_and_without_copies(tmp_path):
    _, path = written(tmp_path, "resenc", RESENC, [[1] * 3, [2] * 3, [2, 4, 4]])
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        export_encoder(path, tmp_path / name, target="nnunet", seed=seed)
    a, b, c = (torch.load(tmp_path / n, weights_only=True)["network_weights"] for n in "abc")
    nnunet_network(classes=2, seed=7).load_state_dict(a, strict=True)
    assert all(torch.equal(value, b[key]) for key, value in a.items())
    fresh = "decoder.transpconvs.0.weight"
    assert not torch.equal(a[fresh], c[fresh])
    # He's SD for leaky slope 0.01, fan-in as torch counts it: nnU-Net's initialisation
    assert a[fresh].std().item() == pytest.approx((2 / (1 + 1e-4) / (8 * 4)) ** 0.5, rel=0.15)
    assert all(torch.equal(v, c[k]) for k, v in a.items() if "encoder." in k)
    held = {value.untyped_storage().data_ptr(): value.nbytes for value in a.values()}
    assert sum(held.values()) < 0.5 * sum(value.nbytes for value in a.values())


def test_encoder_comes_back_out_of_the_nnunet_file(tmp_path):
    trained, path = written(tmp_path, "resenc", RESENC, [[1] * 3, [2] * 3, [2, 4, 4]])
    export_encoder(path, tmp_path / "u.pth", target="nnunet")
    again, plan = load_encoder(tmp_path / "u.pth")
    assert plan == load_plan(path)
    started = create_encoder("resenc", **RESENC)
    report = init_from(started, tmp_path / "u.pth")
    assert report.prefix == "network_weights.encoder."
    for key, value in trained.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
        assert torch.equal(started.state_dict()[key], value)
    for content in ({"network_weights": 3}, {"network_weights": {1: 2}}):
        torch.save(content, tmp_path / "u.pth")
        with pytest.raises(ValueError, match="do not fit"):
            load_encoder(tmp_path / "u.pth")


def test_targets_that_cannot_be(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="'resnet10' is no part of nnU-Net"):
        export_encoder(checkpoint, tmp_path / "x" / "u.pth", target="nnunet")
    with pytest.raises(ValueError, match="encoder, nnunet"):
        export_encoder(checkpoint, tmp_path / "x" / "u.pth", target="keras")
    assert not (tmp_path / "x").exists()


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
