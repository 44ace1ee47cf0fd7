"""The classifier module: what trains, what does not, and what it computes."""

import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from medspark.finetune.module import ClassifierModule, lr_scale
from medspark.models.encoders import create_encoder

TINY = {"block_inplanes": [4, 4, 8, 8]}


def tiny_encoder(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return create_encoder("resnet10", **TINY)


def batches() -> DataLoader:
    x = torch.randn(8, 1, 32, 32, 32, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, torch.arange(8) % 2, torch.arange(8)), 4)


def trainer_of(**options) -> L.Trainer:
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return L.Trainer(accelerator="cpu", **dict.fromkeys(quiet, False), **options)


def train(module: ClassifierModule, steps: int = 3) -> None:
    trainer_of(max_steps=steps).fit(module, batches())


def copies(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_linear_mode_leaves_every_encoder_tensor_alone():
    module = ClassifierModule(tiny_encoder(), 2, mode="linear", lr=0.1)
    before, head = copies(module.pyramid.encoder), module.head.weight.clone()
    train(module)
    after = module.pyramid.encoder.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert not torch.equal(head, module.head.weight)


def test_linear_mode_outlives_a_call_of_train():
    module = ClassifierModule(tiny_encoder(), 2, mode="linear", dropout=0.5).train()
    assert module.dropout.training
    assert [n for n, m in module.pyramid.named_modules() if m.training] == []
    before = copies(module.pyramid)
    module(torch.randn(2, 1, 32, 32, 32))
    after = module.pyramid.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_full_mode_moves_weights_and_statistics():
    module = ClassifierModule(tiny_encoder(), 2, mode="full", lr=0.1)
    before = copies(module.pyramid.encoder)
    train(module)
    after = module.pyramid.encoder.state_dict()
    for name in ("conv1.weight", "bn1.weight", "bn1.running_mean", "layer4.0.conv2.weight"):
        assert not torch.equal(before[name], after[name]), name


def test_features_are_the_mean_of_the_last_stage():
    encoder = tiny_encoder().eval()
    module = ClassifierModule(encoder, 3, mode="linear").eval()
    x = torch.randn(2, 1, 64, 64, 64)
    kept = []
    encoder.layer4.register_forward_hook(lambda m, args, out: kept.append(out))
    with torch.no_grad():
        logits = module(x)
    assert kept[0].shape == (2, 8, 2, 2, 2)
    expected = kept[0].mean(dim=(2, 3, 4)) @ module.head.weight.T + module.head.bias
    torch.testing.assert_close(logits, expected)


def test_encoder_may_learn_slower_and_vectors_do_not_decay():
    module = ClassifierModule(tiny_encoder(), 2, lr=1.0, encoder_lr_scale=0.1, weight_decay=0.3)
    groups = module.parameter_groups()
    options = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert options[id(module.head.weight)] == (1.0, 0.3)
    assert options[id(module.head.bias)] == (1.0, 0.0)
    assert options[id(module.pyramid.encoder.conv1.weight)] == (0.1, 0.3)
    assert options[id(module.pyramid.encoder.bn1.weight)] == (0.1, 0.0)
    assert len(options) == len(list(module.parameters()))


def test_linear_mode_trains_the_head_only():
    module = ClassifierModule(tiny_encoder(), 2, mode="linear")
    trained = [p for group in module.parameter_groups() for p in group["params"]]
    assert {id(p) for p in trained} == {id(module.head.weight), id(module.head.bias)}


class Watch(L.Callback):
    """The rate of every group at every step, and the encoder at the start of every epoch."""

    def __init__(self) -> None:
        self.rates: list[dict[str, float]] = []
        self.encoders: list[dict[str, torch.Tensor]] = []
        self.training: list[set[bool]] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        groups = trainer.optimizers[0].param_groups
        self.rates.append({group["name"]: group["lr"] for group in groups})
        self.training.append({m.training for m in module.pyramid.modules()})

    def on_train_epoch_end(self, trainer, module):
        self.encoders.append(copies(module.pyramid.encoder))


def test_freeze_then_open_freezes_and_then_opens_at_the_rates_of_full():
    module = ClassifierModule(
        tiny_encoder(),
        2,
        mode="freeze_then_open",
        lr=0.01,
        encoder_lr_scale=0.2,
        layer_decay=0.5,
        open_at=2,
    )
    start, watch = copies(module.pyramid.encoder), Watch()
    trainer_of(max_epochs=6, callbacks=[watch]).fit(module, batches())
    # Two epochs of two steps: weights, affine and statistics of the encoder are the first bits.
    for encoder in watch.encoders[:2]:
        assert [n for n, v in encoder.items() if not torch.equal(v, start[n])] == []
    assert watch.training == [{False}] * 4 + [{True}] * 8
    moved = watch.encoders[2]
    for name in ("conv1.weight", "bn1.weight", "bn1.running_mean", "layer4.0.conv2.weight"):
        assert not torch.equal(moved[name], start[name]), name
    peaks = {"head": 0.01} | {f"stage {s}": 0.01 * 0.2 * 0.5 ** (5 - s) for s in range(5)}
    assert [set(rates) for rates in watch.rates] == [set(peaks)] * 12
    for step, rates in enumerate(watch.rates):
        for name, peak in peaks.items():
            frozen = peak if name == "head" else 0.0
            expected = frozen if step < 4 else peak * lr_scale(step - 4, 8)
            assert rates[name] == pytest.approx(expected), (step, name)
    # The published code ended at a fifth of what was meant: here each group reaches its own peak.
    assert {n: max(r[n] for r in watch.rates[4:]) for n in peaks} == pytest.approx(peaks)


def test_full_mode_has_the_same_rates_as_freeze_then_open_after_opening():
    module = ClassifierModule(tiny_encoder(), 2, lr=0.01, encoder_lr_scale=0.2, layer_decay=0.5)
    watch = Watch()
    trainer_of(max_epochs=4, callbacks=[watch]).fit(module, batches())
    assert watch.rates[0]["stage 4"] == pytest.approx(0.01 * 0.2 * 0.5)
    assert [r["head"] for r in watch.rates] == pytest.approx(
        [0.01 * lr_scale(s, 8) for s in range(8)]
    )


def fixed_logits(module: ClassifierModule, logits: torch.Tensor) -> ClassifierModule:
    module.forward = lambda x: logits[: len(x)]
    module.log = lambda *args, **kwargs: None
    return module


def test_class_weights_and_label_smoothing_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.5, 1.5], [0.0, 0.0]])
    label = torch.tensor([0, 0, 1])
    logp = logits.log_softmax(1)
    nll = -logp[torch.arange(3), label]
    options = {"class_weights": [1.0, 3.0]}
    module = fixed_logits(ClassifierModule(tiny_encoder(), 2, **options), logits)
    batch = (torch.zeros(3, 1, 8, 8, 8), label, torch.arange(3))
    expected = (nll[0] + nll[1] + 3 * nll[2]) / 5
    torch.testing.assert_close(module.training_step(batch, 0), expected)
    smooth = fixed_logits(ClassifierModule(tiny_encoder(), 2, label_smoothing=0.2), logits)
    expected = (0.8 * nll + 0.2 * -logp.mean(dim=1)).mean()
    torch.testing.assert_close(smooth.training_step(batch, 0), expected)


def test_validation_is_that_of_the_whole_split_weighted_and_not_smoothed():
    module = ClassifierModule(tiny_encoder(), 2, class_weights=[1.0, 3.0], label_smoothing=0.3)
    module.eval()
    loader = batches()
    uneven = DataLoader(loader.dataset, 3)  # batches of 3, 3 and 2
    found = trainer_of().validate(module, uneven, verbose=False)[0]
    x, label, _ = loader.dataset.tensors
    module.eval()
    with torch.no_grad():
        logp = module(x).log_softmax(1)
    weights = torch.tensor([1.0, 3.0])[label]
    expected = (weights * -logp[torch.arange(8), label]).sum() / weights.sum()
    assert found["val/loss"] == pytest.approx(expected.item(), rel=1e-5)
    scores = logp[:, 1]
    pairs = [(a, b) for a in scores[label == 1] for b in scores[label == 0]]
    auc = sum(float(a > b) + 0.5 * float(a == b) for a, b in pairs) / len(pairs)
    assert found["val/auc"] == pytest.approx(auc)


@pytest.mark.parametrize("kind", ["training", "validation"])
def test_loss_that_is_not_finite_stops_with_advice(kind):
    module = ClassifierModule(tiny_encoder(), 2, lr=0.25)
    with torch.no_grad():
        module.head.bias[0] = float("nan")
    trainer = trainer_of(max_epochs=1)
    step = {"training": trainer.fit, "validation": trainer.validate}[kind]
    with pytest.raises(FloatingPointError, match=rf"{kind} loss is nan in epoch 0.*now 0.25"):
        step(module, batches())


def test_pooled_features_are_taken_as_they_are_and_standardised():
    module = ClassifierModule(tiny_encoder(), 3, mode="linear").eval()
    module.feature_mean, module.feature_sd = torch.arange(8.0), torch.full((8,), 2.0)
    x = torch.randn(2, 1, 64, 64, 64)
    with torch.no_grad():
        pooled = module.features(x)
        expected = (pooled - torch.arange(8.0)) / 2 @ module.head.weight.T + module.head.bias
        torch.testing.assert_close(module(x), expected)
        torch.testing.assert_close(module(pooled), expected)


def test_images():
    encoder = create_encoder("resnet10", **TINY, spatial_dims=2).eval()
    module = ClassifierModule(encoder, 2, mode="linear").eval()
    kept = []
    encoder.layer4.register_forward_hook(lambda m, args, out: kept.append(out))
    with torch.no_grad():
        logits = module(torch.randn(2, 1, 64, 96))
    assert kept[0].shape == (2, 8, 2, 3)
    expected = kept[0].mean(dim=(2, 3)) @ module.head.weight.T + module.head.bias
    torch.testing.assert_close(logits, expected)


def test_learning_rate_warms_up_and_follows_a_cosine():
    assert [lr_scale(step, 100) for step in (0, 1, 4)] == pytest.approx([0.2, 0.4, 1.0])
    assert lr_scale(5, 100) == pytest.approx(1.0)
    assert lr_scale(5 + 95 // 5, 100) == pytest.approx(0.5 * (1 + math.cos(math.pi / 5)))
    assert lr_scale(100, 100) == pytest.approx(0.0)
    assert lr_scale(0, 1) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mode": "frozen"}, "linear, full"), ({"n_classes": 1}, "at least two classes")],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ClassifierModule(tiny_encoder(), **{"n_classes": 2, **options})
