"""Mixed precision: types under autocast as in the dense network, accuracy, and the gradient scaler."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medspark.sparse import BlockMask, BlockSparseTensor, launches, reset_launches, use_backend

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(params=HALVES)
def half(request: pytest.FixtureRequest) -> torch.dtype:
    return HALVES[request.param]


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.forward = function


class ChannelsLast(nn.Module):
    """The middle of a ConvNeXt block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.wide = nn.LayerNorm(4), nn.Linear(4, 8)
        self.act, self.narrow = nn.GELU(), nn.Linear(8, 4)
        self.gamma = nn.Parameter(torch.full((4,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(self.act(self.wide(self.norm(x.permute(0, 2, 3, 4, 1)))))
        return x + (self.gamma * y).permute(0, 4, 1, 2, 3)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.act = nn.AdaptiveAvgPool3d(1), nn.ReLU()
        self.down, self.up = nn.Conv3d(4, 2, 1), nn.Conv3d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.act(self.down(self.pool(x)))).sigmoid()


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv3d(4, 6, 3, padding=1),
    "strided conv": lambda: nn.Conv3d(4, 6, 3, 2, 1, bias=False),
    "depthwise conv": lambda: nn.Conv3d(4, 4, 3, padding=1, groups=4),
    "transposed conv": lambda: nn.ConvTranspose3d(4, 6, 2, 2),
    "batch norm": lambda: nn.BatchNorm3d(4),
    "batch norm, eval": lambda: nn.BatchNorm3d(4).eval(),
    "instance norm": lambda: nn.InstanceNorm3d(4, affine=True),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "max pool": lambda: nn.MaxPool3d(2),
    "avg pool": lambda: nn.AvgPool3d(2),
    "adaptive avg pool": lambda: nn.AdaptiveAvgPool3d(1),
    "adaptive max pool": lambda: nn.AdaptiveMaxPool3d(1),
    "mean": lambda: Apply(lambda x: x.mean((2, 3, 4))),
    "amax": lambda: Apply(lambda x: x.amax((2, 3, 4))),
    "relu": lambda: nn.ReLU(),
    "leaky relu, in place": lambda: nn.Sequential(nn.Identity(), nn.LeakyReLU(inplace=True)),
    "gelu": lambda: nn.GELU(),
    "silu": lambda: nn.SiLU(),
    "prelu": lambda: nn.PReLU(4),
    "softplus": lambda: nn.Softplus(),
    "sigmoid": lambda: nn.Sigmoid(),
    "dropout": lambda: nn.Dropout(0.5),
    "channel dropout": lambda: nn.Dropout3d(0.5),
    "upsample": lambda: nn.Upsample(scale_factor=2),
    "upsample, linear": lambda: nn.Upsample(scale_factor=2, mode="trilinear"),
    "sum of two types": lambda: Apply(lambda x: x + x.float()),
    "sum into": lambda: Apply(lambda x: x.clone().add_(x.float())),
    "product of two types": lambda: Apply(lambda x: x.float() * x),
    "cat of two types": lambda: Apply(lambda x: torch.cat([x, x.float()], 1)),
    "square": lambda: Apply(lambda x: x**2),
    "exp": lambda: Apply(torch.exp),
    "channels last": ChannelsLast,
    "gate": Gate,
}


class Small(nn.Module):
    """Stem, residual block, pool, head; each sample for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv3d(1, 8, 3, padding=1), nn.Conv3d(8, 8, 3, padding=1)
        self.norm1, self.norm2 = (nn.InstanceNorm3d(8, affine=True) for _ in range(2))
        self.act, self.pool, self.head = (
            nn.LeakyReLU(inplace=True),
            nn.MaxPool3d(2),
            nn.Linear(8, 3),
        )
        self.deep = nn.Conv3d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.stem(x)))
        y = self.act(self.norm2(self.block(y)) + y)
        return self.head(self.deep(self.pool(y)).mean((2, 3, 4)))


def resnet() -> nn.Module:
    from monai.networks.nets import resnet10

    net: nn.Module = resnet10(
        n_input_channels=1, conv1_t_stride=2, num_classes=3, widen_factor=0.25
    )
    return net


def residual_encoder() -> nn.Module:
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    net: nn.Module = ResidualEncoderUNet(
        input_channels=1, n_stages=3, features_per_stage=(8, 16, 24), conv_op=nn.Conv3d,
        kernel_sizes=3, strides=(1, 2, 2), n_blocks_per_stage=(1, 2, 2), num_classes=2,
        n_conv_per_stage_decoder=1, conv_bias=True, norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    ).encoder  # fmt: skip
    return net


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "small": Small,
    "resnet10": resnet,
    "residual encoder": residual_encoder,
}


def volume(channels: int, size: int, cells: int = 2) -> tuple[Tensor, BlockMask]:
    """Three samples: some, no and all cells visible."""
    generator = torch.Generator().manual_seed(4)
    visible = torch.rand(3, cells, cells, cells, generator=generator) < 0.5
    visible[0, 0, 0, 0], visible[1], visible[2] = True, False, True
    return torch.randn(3, channels, size, size, size, generator=generator), BlockMask(visible)


def types(net: nn.Module, x: Tensor, half: torch.dtype) -> dict[str, list[torch.dtype]]:
    """Output type of each module, in a forward pass under autocast."""
    found: dict[str, list[torch.dtype]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            many = output if isinstance(output, (list, tuple)) else [output]
            found.setdefault(name, []).extend(t.dtype for t in many)

        return hook

    hooks = [m.register_forward_hook(note(n or "result")) for n, m in net.named_modules()]
    with torch.autocast(x.device.type, half):
        net(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_the_types_of_the_dense_layer(name, half, device) -> None:
    net = LAYERS[name]().to(device)
    x, mask = volume(4, 8)
    for dtype in (torch.float32, half):
        given = x.to(device, dtype)
        sparse = BlockSparseTensor.from_dense(given, mask)
        assert types(net, sparse, half) == types(net, given, half), f"input {dtype}"


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_the_types_of_the_dense_network(name, half) -> None:
    net = NETWORKS[name]()
    size = 64 if name == "resnet10" else 16
    x, mask = volume(1, size)
    dense = types(net, x, half)
    sparse = types(net, BlockSparseTensor.from_dense(x, mask), half)
    assert dense.keys() == sparse.keys()
    differing = {
        key: (sparse[key], wanted) for key, wanted in dense.items() if sparse[key] != wanted
    }
    assert not differing, f"(sparse, dense) types: {differing}"


@contextmanager
def precision(half: torch.dtype | None) -> Iterator[None]:
    with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
        yield


def weighted(y: Any) -> Tensor:
    """A loss in float32 of one or several outputs."""
    many = y if isinstance(y, (list, tuple)) else [y]
    generator = torch.Generator().manual_seed(3)
    total = torch.zeros((), dtype=torch.float64)
    for t in many:
        dense = t.to_dense() if isinstance(t, BlockSparseTensor) else t
        total = total + (dense.double() * torch.randn(dense.shape, generator=generator)).mean()
    return total


def run(
    net: nn.Module, x: Tensor, mask: BlockMask, half: torch.dtype | None, backend: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients, from parameters in the type of `x`."""
    net = copy.deepcopy(net).to(x.dtype)
    leaf = x.clone().requires_grad_()
    with use_backend(backend), precision(half):  # type: ignore[arg-type]
        loss = weighted(net(BlockSparseTensor.from_dense(leaf, mask)))
    loss.backward()
    grads = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    assert leaf.grad is not None
    return loss.detach(), {**grads, "input": leaf.grad}


def distance(got: Tensor, exact: Tensor, floor: float) -> float:
    # torch's own 16-bit conv3d backward leaves NaN in some runs; those entries give no measure.
    error = (got.double() - exact).nan_to_num(0.0)
    return (error.norm() / max(exact.norm().item(), floor)).item()


@pytest.mark.parametrize("name", ["small", "residual encoder"])
def test_autocast_is_as_accurate_as_torchs(name, half) -> None:
    net = NETWORKS[name]()
    x, mask = volume(1, 16)
    exact, exact_grads = run(net, x.double(), mask, None, "reference")
    torchs, torch_grads = run(net, x, mask, half, "reference")
    reset_launches()
    own, own_grads = run(net, x, mask, half, "native")
    convs = sum(isinstance(m, nn.Conv3d) for m in dict.fromkeys(net.modules()))
    assert launches()["conv3d"] == launches()["conv3d_weight"] == convs, "a convolution fell back"
    rounding = torch.finfo(half).eps
    assert abs(own - exact) <= 2 * abs(torchs - exact) + rounding * abs(exact)
    floor = 1e-2 * max(g.norm().item() for g in exact_grads.values())
    assert own_grads.keys() == exact_grads.keys()
    errors = []
    for key, wanted in exact_grads.items():
        got = own_grads[key]
        assert got.dtype == torch.float32 and torch.isfinite(got).all(), key
        own_error, limit = (distance(g[key], wanted, floor) for g in (own_grads, torch_grads))
        # One parameter has few numbers, whose errors are chance; over all of them chance evens out.
        assert own_error <= 4 * (limit + rounding), key
        errors.append((own_error, limit))
    total = torch.tensor(errors).norm(dim=0)
    assert total[0] <= 1.5 * total[1] + rounding


def test_disabled_regions_and_float64_are_left_alone(half) -> None:
    x, mask = volume(4, 8)
    conv = nn.Conv3d(4, 4, 3, padding=1)
    sparse = BlockSparseTensor.from_dense(x, mask)
    expected = conv(sparse)
    with torch.autocast("cpu", half):
        assert conv(sparse).dtype == half
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(conv(sparse).features, expected.features)
    assert conv(sparse).dtype == torch.float32


class Trainer:
    """The usual loop of mixed precision, step by step."""

    def __init__(self, half: torch.dtype | None, **scaler: Any) -> None:
        torch.manual_seed(0)
        self.half, self.net = half, Small()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1, momentum=0.9)
        self.scaler = torch.amp.GradScaler("cpu", **scaler)
        self.x, self.mask = volume(1, 16)

    def backward(self, samples: slice = slice(None), gain: float = 1.0) -> Tensor:
        mask = BlockMask(self.mask.visible[samples])
        with precision(self.half):
            y = self.net(BlockSparseTensor.from_dense(self.x[samples], mask))
        target = torch.eye(3)[samples]
        loss = F.mse_loss(y.float(), target, reduction="sum") * gain
        self.scaler.scale(loss).backward()
        return loss.detach()

    def grads(self) -> dict[str, Tensor]:
        self.scaler.unscale_(self.optimizer)
        return {n: p.grad.clone() for n, p in self.net.named_parameters() if p.grad is not None}


def test_scaling_by_a_power_of_two_is_exact_in_bfloat16() -> None:
    plain, scaled = Trainer(torch.bfloat16, enabled=False), Trainer(torch.bfloat16)
    assert plain.backward() == scaled.backward()
    expected = {n: p.grad for n, p in plain.net.named_parameters() if p.grad is not None}
    got = scaled.grads()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_scaling_saves_gradients_that_float16_would_lose() -> None:
    plain = Trainer(torch.float16, enabled=False)
    scaled = Trainer(torch.float16, init_scale=2.0**20)
    full = Trainer(None, enabled=False)
    gain = 1e-8
    for trainer in (plain, scaled, full):
        trainer.backward(gain=gain)
    lost, kept = plain.net.deep.weight.grad, scaled.grads()["deep.weight"]
    exact = full.net.deep.weight.grad
    assert lost is not None and exact is not None
    assert distance(kept, exact.double(), 0.0) < 0.02 < 0.2 < distance(lost, exact.double(), 0.0)


def test_an_overflow_skips_the_step_and_lowers_the_scale(half) -> None:
    trainer = Trainer(half, init_scale=2.0**127, backoff_factor=2.0**-120)
    before = {k: v.clone() for k, v in trainer.net.state_dict().items()}
    trainer.backward(gain=100.0)
    assert not all(torch.isfinite(p.grad).all() for p in trainer.net.parameters())  # type: ignore[arg-type]
    trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    assert all(torch.equal(v, before[k]) for k, v in trainer.net.state_dict().items())
    assert trainer.scaler.get_scale() == 2.0**7 and not trainer.optimizer.state
    trainer.optimizer.zero_grad()
    trainer.backward(gain=0.01)
    trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    assert trainer.scaler.get_scale() == 2.0**7
    assert all(not torch.equal(p, before[n]) for n, p in trainer.net.named_parameters())


def test_two_parts_of_a_batch_add_up_to_the_batch(half) -> None:
    exact = Trainer(None, enabled=False)
    whole, parts = Trainer(half), Trainer(half)
    exact.backward()
    whole.backward()
    parts.backward(slice(0, 1))
    parts.backward(slice(1, 3))
    once, twice = whole.grads(), parts.grads()
    for key, parameter in exact.net.named_parameters():
        assert parameter.grad is not None
        wanted, floor = parameter.grad.double(), 1e-2
        limit = 2 * distance(once[key], wanted, floor) + torch.finfo(half).eps
        assert distance(twice[key], wanted, floor) <= limit, key


def test_clipping_sees_unscaled_gradients(half) -> None:
    trainer = Trainer(half, init_scale=2.0**10)
    trainer.backward()
    grads = trainer.grads()
    norm = torch.nn.utils.clip_grad_norm_(trainer.net.parameters(), 0.5)
    expected = torch.stack([g.norm() for g in grads.values()]).norm()
    assert torch.allclose(norm, expected) and expected > 0.5
    for name, parameter in trainer.net.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, grads[name] * (0.5 / expected), rtol=1e-4)
    before = copy.deepcopy(trainer.net.state_dict())
    trainer.scaler.step(trainer.optimizer)
    moved = [(p - before[n]).norm() for n, p in trainer.net.named_parameters()]
    assert torch.allclose(torch.stack(moved).norm(), torch.tensor(0.1 * 0.5), rtol=1e-3)


def test_training_learns_as_in_float32(half) -> None:
    low, full = Trainer(half, init_scale=2.0**8), Trainer(None, enabled=False)
    losses: dict[bool, list[float]] = {}
    for trainer in (low, full):
        kept = losses[trainer is low] = []
        for _ in range(12):
            trainer.optimizer.param_groups[0]["lr"] = 0.002
            trainer.optimizer.zero_grad()
            kept.append(trainer.backward().item())
            trainer.scaler.step(trainer.optimizer)
            trainer.scaler.update()
    assert losses[True][-1] < 0.5 * losses[True][0]
    assert torch.allclose(torch.tensor(losses[True]), torch.tensor(losses[False]), rtol=0.1)
