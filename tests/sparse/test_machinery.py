"""What torch does around a network: compiling, checkpointing, hooks, copies, files, devices."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medspark.sparse import BlockMask, BlockSparseTensor, Semantics, launches, reset_launches

from .networks import monai_resnet, residual_encoder


class Residual(nn.Module):
    """Convolutions, norms, in-place functions, a residual sum and a gate."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv3d(channels, channels, 3, padding=1)
        self.norm = nn.InstanceNorm3d(channels, affine=True)
        self.second = nn.Conv3d(channels, channels, 3, padding=1)
        self.act = nn.LeakyReLU(0.1, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.act(self.norm(self.first(x))))
        y += x
        y = self.act(y)
        return y * torch.sigmoid(y.mean((2, 3, 4), keepdim=True))


def volume(
    size: int = 8, channels: int = 4, seed: int = 0, ratio: float = 0.5, cell: int = 4
) -> BlockSparseTensor:
    generator = torch.Generator().manual_seed(seed)
    mask = BlockMask.random(2, (size // cell,) * 3, ratio, generator)
    dense = torch.randn(2, channels, size, size, size, generator=generator)
    return BlockSparseTensor.from_dense(dense, mask)


def plain(y: Tensor | list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    many = y if isinstance(y, (list, tuple)) else [y]
    return [t.to_dense() if isinstance(t, BlockSparseTensor) else t for t in many]


def gradients(
    run: Callable[[Tensor], Tensor], net: nn.Module, x: BlockSparseTensor
) -> list[Tensor]:
    """Output, gradient of the features and gradients of the parameters."""
    net.zero_grad()
    leaf = x.features.detach().clone().requires_grad_()
    y = plain(run(x.with_features(leaf * 1)))
    sum(t.square().sum() for t in y).backward()
    assert leaf.grad is not None
    return [
        *(t.detach() for t in y),
        leaf.grad,
        *(p.grad for p in net.parameters() if p.grad is not None),
    ]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant) -> None:
    torch.manual_seed(0)
    one, two = Residual(), Residual()
    net = nn.Sequential(one, nn.ReLU(inplace=True), two)

    def saving(t: Tensor) -> Tensor:
        t = net[1](
            checkpoint(one, t, use_reentrant=reentrant)
        )  # changed in place after the segment
        return checkpoint(two, t, use_reentrant=reentrant)

    x = volume()
    expected, got = gradients(net, net, x), gradients(saving, net, x)
    assert len(expected) == len(got) == 2 + len(list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_nested_reentrant_checkpoints() -> None:
    net = Residual()
    inner = lambda t: checkpoint(net, t, use_reentrant=True)  # noqa: E731
    x = volume()
    expected = gradients(lambda t: net(net(t)), net, x)
    got = gradients(lambda t: checkpoint(lambda s: inner(inner(s)), t, use_reentrant=True), net, x)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


NETWORKS: dict[
    str, tuple[Callable[[], nn.Module], int, int, bool]
] = {  # network, size, cell, training
    "resnet10": (lambda: monai_resnet("resnet10"), 64, 32, True),
    "resnet10, cells of 16": (lambda: monai_resnet("resnet10"), 64, 16, True),
    "resnet50": (lambda: monai_resnet("resnet50"), 64, 32, False),
    "residual encoder": (residual_encoder, 32, 16, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_networks_equal_eager_in_one_graph(name) -> None:
    build, size, cell, training = NETWORKS[name]
    torch.manual_seed(0)
    net = build().train(training)
    twin = copy.deepcopy(net)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    reset_launches()
    for seed, ratio in ((0, 0.5), (1, 0.5), (2, 0.25)):  # other cells, then another number of them
        x = volume(size, 1, seed, ratio, cell)
        if training:
            expected, got = gradients(twin, twin, x), gradients(compiled, net, x)
        else:
            expected, got = plain(twin(x)), plain(compiled(x))
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    for a, b in zip(net.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)
    assert launches()["conv3d"] > 0
    assert isinstance(compiled(x), BlockSparseTensor | Tensor | list)


@pytest.mark.slow
def test_compiled_with_the_default_backend() -> None:
    net = Residual()
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True)
    x = volume()
    expected, got = gradients(net, net, x), gradients(compiled, net, x)
    for a, b in zip(expected, got, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    assert isinstance(compiled(x), BlockSparseTensor)


def test_a_graph_break_is_correct_where_a_level_is_new() -> None:
    """Grids that halving does not reach are built outside the graph."""
    net = nn.Sequential(nn.Conv3d(4, 2, 3, (3, 1, 1), 1), nn.ReLU(), nn.Conv3d(2, 2, 3, padding=1))
    generator = torch.Generator().manual_seed(0)
    mask = BlockMask.random(2, (6, 2, 2), 0.5, generator)
    x = BlockSparseTensor.from_dense(torch.randn(2, 4, 6, 4, 4), mask)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(net, backend="aot_eager")(x).to_dense(), net(x).to_dense())


def test_compiling_never_hides_a_foreign_graph() -> None:
    """What comes out of a reentrant checkpoint carries its node on the tensor, not on the features."""
    net, head = Residual(), Residual()
    torch._dynamo.reset()
    compiled = torch.compile(head, backend="aot_eager")
    x = volume()
    leaf = x.features.clone().requires_grad_()
    try:
        y = compiled(checkpoint(net, x.with_features(leaf * 1), use_reentrant=True))
        y.features.sum().backward()
    except (TypeError, RuntimeError):
        return  # refused aloud
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0
    assert net.first.weight.grad is not None


def test_module_hooks_see_sparse_tensors_and_gradients() -> None:
    net, x = Residual(), volume()
    expected = gradients(net, net, x)
    seen: dict[str, object] = {}
    net.register_forward_pre_hook(lambda m, args: seen.update(before=type(args[0])))
    net.register_forward_hook(lambda m, args, y: seen.update(after=type(y)))
    net.second.register_forward_hook(lambda m, args, y: y * 1)
    net.first.register_full_backward_hook(
        lambda m, given, out: seen.update(given=given[0], out=out[0])
    )
    got = gradients(net, net, x)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert seen["before"] is seen["after"] is BlockSparseTensor
    given, out = seen["given"], seen["out"]
    assert isinstance(given, Tensor) and isinstance(out, Tensor)
    assert given.shape == out.shape == x.features.shape  # gradients are packed, like features
    assert given.abs().sum() > 0


def test_tensor_hooks_and_leaves() -> None:
    net, x = Residual(), volume()
    x.requires_grad_()
    assert x.is_leaf and x.requires_grad
    y = net(x)
    y.retain_grad()
    caught: list[Tensor] = []
    y.register_hook(caught.append)
    y.features.square().sum().backward()
    assert torch.equal(caught[0], 2 * y.features) and torch.equal(y.grad, caught[0])
    leaf = x.features.detach().clone().requires_grad_()
    net(x.with_features(leaf)).features.square().sum().backward()
    assert torch.equal(x.grad, leaf.grad)  # packed, like features


def test_backward_from_a_sparse_tensor() -> None:
    net, x = Residual(), volume()
    seed = torch.randn_like(x.features)
    net(x).features.backward(seed)
    expected = net.first.weight.grad
    net.zero_grad()
    torch.autograd.backward([net(x)], [seed])
    assert torch.equal(net.first.weight.grad, expected)


@pytest.mark.parametrize("safe", [True, False])
def test_files_keep_values_mask_and_semantics(safe) -> None:
    dense, mask = torch.randn(2, 3, 8, 8, 8), BlockMask.random(2, (4, 4, 4), 0.5)
    x = BlockSparseTensor.from_dense(dense, mask, Semantics("every", "ignore", "active"))
    stored = io.BytesIO()
    torch.save({"x": x, "mask": mask}, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=safe)
    assert torch.equal(loaded["x"].to_dense(), x.to_dense())
    assert loaded["x"].semantics == x.semantics and loaded["mask"].equals(mask)
    twin = copy.deepcopy(x)
    assert torch.equal(twin.to_dense(), x.to_dense()) and twin.features is not x.features


def test_a_hostile_file_is_refused() -> None:
    from medspark.sparse.tensor import rebuild

    with pytest.raises(ValueError, match="features of a"):
        rebuild(
            torch.zeros(9, 1, 1, 1, 1),
            torch.ones(1, 2, 2, 2, dtype=torch.bool),
            (4, 4, 4),
            "any",
            "zero",
            "kernel",
        )
    with pytest.raises(TypeError, match="boolean"):
        rebuild(
            torch.zeros(8, 2, 2, 2, 1), torch.ones(1, 2, 2, 2), (4, 4, 4), "any", "zero", "kernel"
        )


def test_meta_device_gives_shapes_without_values() -> None:
    with torch.device("meta"):
        net = monai_resnet("resnet18")
    x = volume(64, 1, cell=32).to("meta")
    assert x.device.type == "meta" and x.mask.device.type == "meta"
    y = net(x)
    assert y.shape == (2, 3) and y.device.type == "meta"
    pyramid = net.layer1(net.maxpool(net.act(net.bn1(net.conv1(x)))))
    assert isinstance(pyramid, BlockSparseTensor) and pyramid.shape == (2, 64, 16, 16, 16)
    assert pyramid.features.shape == (x.level.n_blocks, 8, 8, 8, 64)


def test_moving_between_types_and_devices() -> None:
    x = volume()
    assert x.to("cpu") is x and x.to(torch.float32) is x and x.cpu() is x
    assert x.to("cpu", torch.float64).dtype == x.double().dtype == torch.float64
    assert x.to(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    assert x.to(memory_format=torch.channels_last_3d) is x
    assert x.type_as(x.half()).dtype == torch.float16
    if torch.cuda.is_available():
        assert x.pin_memory().features.is_pinned()


def test_the_dense_twin_exports() -> None:
    net = Residual().eval()
    dense = torch.randn(2, 4, 8, 8, 8)
    program = torch.export.export(net, (dense,))
    assert torch.allclose(program.module()(dense), net(dense), atol=1e-6)
    all_shown = BlockMask(torch.ones(2, 2, 2, 2, dtype=torch.bool))
    sparse = net(BlockSparseTensor.from_dense(dense, all_shown)).to_dense()
    assert torch.allclose(program.module()(dense), sparse, atol=1e-5)


def test_gradient_accumulation_equals_one_batch() -> None:
    net = Residual()
    mask = BlockMask.random(4, (2, 2, 2), 0.5, torch.Generator().manual_seed(1))
    dense = torch.randn(4, 4, 8, 8, 8).double()
    net = net.double()
    net(BlockSparseTensor.from_dense(dense, mask)).features.square().sum().backward()
    whole = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        part = BlockMask(mask.visible[half])
        net(BlockSparseTensor.from_dense(dense[half], part)).features.square().sum().backward()
    for a, p in zip(whole, net.parameters(), strict=True):
        assert torch.allclose(a, p.grad, rtol=1e-10, atol=1e-10)


SYNTAX: dict[str, Callable[[Tensor], Tensor]] = {
    "cat of a tuple": lambda x: torch.cat((x.relu(), x * 2), 1),
    "cat of a list": lambda x: torch.cat([x.relu(), x, x], dim=1),
    "cat by name": lambda x: torch.cat(tensors=(x, x.relu()), dim=1),
    "operators": lambda x: 2 * x - (-x) ** 2 / 3 + 1,
    "in place": lambda x: x.clone().mul_(2).add_(x).relu_(),
    "slices": lambda x: x[:, 1:3] + x.chunk(2, dim=1)[0],
    "scale": lambda x: x * x.new_tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1, 1),
    "channels last": lambda x: F.layer_norm(x.permute(0, 2, 3, 4, 1), (4,)).permute(0, 4, 1, 2, 3),
    "padding": lambda x: F.conv3d(F.pad(x, (0, 1, 0, 1, 0, 1)), torch.ones(2, 4, 2, 2, 2)),
    "resize": lambda x: F.interpolate(x, scale_factor=2.0, mode="trilinear"),
    "pools": lambda x: F.avg_pool3d(F.max_pool3d(x, 2), 2),
    "groups": lambda x: F.group_norm(x, 2),
}


@pytest.mark.parametrize("name", SYNTAX)
def test_compiled_syntax_equals_eager(name) -> None:
    """Dynamo must ask the tensor about everything: what it overlooks would run on packed memory."""
    torch._dynamo.reset()
    for x in (volume(), volume(seed=1, ratio=0.25)):
        expected = SYNTAX[name](x)
        got = torch.compile(SYNTAX[name], fullgraph=True, backend="aot_eager")(x)
        assert type(got) is type(expected) is BlockSparseTensor
        assert got.shape == expected.shape and torch.equal(got.to_dense(), expected.to_dense())


def test_compiling_refuses_what_eager_refuses() -> None:
    for function in (lambda x: torch.fft.fftn(x), lambda x: x.relu().flatten(1)):
        torch._dynamo.reset()
        with pytest.raises((NotImplementedError, RuntimeError)):
            torch.compile(function, backend="aot_eager")(volume())
