"""CUDA kernels against the float64 oracle on the CPU: values, bits, streams, counters, no waiting."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medspark.sparse import (
    BlockMask,
    BlockSparseTensor,
    Semantics,
    densify,
    launches,
    reset_launches,
    use_backend,
)
from medspark.sparse._ext import native
from medspark.sparse._op import check, check_device, has_cuda, launch
from medspark.sparse.ops import conv3d, global_pool, norm, pool3d, resample3d, transfer
from medspark.sparse.ops import densify as densify_module

CUDA = torch.device("cuda")
# Of the largest value: float32 and float64 sum hundreds of terms, bfloat16 rounds each result.
LIMIT = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


@pytest.fixture
def cuda_build() -> None:
    """Needs kernels for the GPU; pytest.mark.gpu has made sure that there is one."""
    if has_cuda():
        return
    message = "this build has no CUDA kernels: rebuild where nvcc is found (MEDSPARK_CUDA=ON)"
    if os.environ.get("MEDSPARK_REQUIRE_GPU", "") not in ("", "0"):
        pytest.fail(message)
    pytest.skip(message)


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.gpu(pytest.mark.usefixtures("cuda_build")(test))


def conv(**options: Any) -> Callable[[BlockSparseTensor, Tensor], Any]:
    def run(x: BlockSparseTensor, w: Tensor) -> Any:
        size = options.get("kernel", (3, 3, 3))
        groups = options.get("groups", 1)
        kernel = w[: 6 * (4 // groups) * size[0] * size[1] * size[2]].view(6, 4 // groups, *size)
        rest = {k: v for k, v in options.items() if k != "kernel"}
        return F.conv3d(x, kernel, w[-6:], **rest)  # type: ignore[arg-type]

    return run


def affine(norm: Callable[..., Any], *statistics: Any) -> Callable[..., Any]:
    return lambda x, w: norm(x, *statistics, w[:4], w[4:8], True)


# Each: what runs, and the launches that it must cause, forward and backward.
OPS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "conv 3": (conv(padding=1), {"conv3d", "conv3d_input", "conv3d_weight"}),
    "conv 3 stride 2": (conv(padding=1, stride=2), {"conv3d", "conv3d_input", "conv3d_weight"}),
    "conv 1x3x5 grouped": (
        conv(kernel=(1, 3, 5), padding=(0, 1, 2), groups=2),
        {"conv3d", "conv3d_input", "conv3d_weight"},
    ),
    "conv 7 stride 2": (conv(kernel=(7, 7, 7), padding=3, stride=2), {"conv3d", "conv3d_weight"}),
    "conv dilated": (conv(padding=2, dilation=2), {"conv3d", "conv3d_input"}),
    "conv to coarse voxels": (conv(kernel=(1, 1, 1), stride=8), {"conv3d", "conv3d_input"}),
    "max pool": (lambda x, w: F.max_pool3d(x, 3, 2, 1), {"max_pool3d", "max_pool3d_input"}),
    "avg pool": (lambda x, w: F.avg_pool3d(x, 3, 2, 1), {"avg_pool3d", "avg_pool3d_input"}),
    "batch norm": (affine(F.batch_norm, None, None), {"norm", "norm_input"}),
    "instance norm": (affine(F.instance_norm, None, None), {"norm", "norm_input"}),
    "global mean": (lambda x, w: F.adaptive_avg_pool3d(x, 1), {"global_pool", "global_pool_input"}),
    "global max": (lambda x, w: F.adaptive_max_pool3d(x, 1), {"global_pool", "global_pool_input"}),
    "densify": (lambda x, w: densify(x, w[:4]), {"densify", "gather", "sum_hidden"}),
    "densify onto": (
        lambda x, w: transfer.densify_onto(x, w[:4], BlockMask(x.mask.visible[:, ::2, ::2, ::2])),
        {"transfer", "sum_untransferred"},
    ),
    "interpolate finer": (
        lambda x, w: F.interpolate(x, scale_factor=2, mode="trilinear"),
        {"resample3d"},
    ),
    "interpolate coarser": (lambda x, w: F.interpolate(x, (8, 4, 2)), {"resample3d"}),
}


def run(
    op: Callable[..., Any],
    data: tuple[Tensor, Tensor, BlockMask],
    device: torch.device,
    dtype: torch.dtype,
    semantics: Semantics,
) -> list[Tensor]:
    """Dense result and gradients of the input and the parameters, all in float64 on the CPU."""
    x, w = (t.detach().to(device, dtype).requires_grad_() for t in data[:2])
    y = op(BlockSparseTensor.from_dense(x, data[2], semantics), w)
    dense = y.to_dense() if isinstance(y, BlockSparseTensor) else y
    weights = torch.randn(dense.shape, generator=torch.Generator().manual_seed(1))
    (dense * weights.to(device, dtype)).sum().backward()
    grads = (torch.zeros_like(t) if t.grad is None else t.grad for t in (x, w))
    return [t.detach().double().cpu() for t in (dense, *grads)]


@on_gpu
@pytest.mark.parametrize("semantics", [Semantics(), Semantics("all", "ignore", "active")], ids=str)
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_op_equals_the_oracle(name, dtype, semantics, ragged_mask) -> None:
    op, kernels = OPS[name]
    x, w = torch.randn(3, 4, 16, 16, 16).to(dtype), torch.randn(6 * 4 * 343 + 6).to(dtype)
    data = (x, w, ragged_mask((4, 4, 4)))
    with use_backend("reference"):
        exact = run(op, data, torch.device("cpu"), torch.float64, semantics)
    reset_launches()
    own = run(op, data, CUDA, dtype, semantics)
    counted = launches()
    assert {k + "_cuda" for k in kernels} <= set(counted), "a kernel did not run on the GPU"
    assert all(k.endswith("_cuda") for k in counted), "a CPU kernel ran"
    for what, a, b in zip(("output", "dx", "dw"), own, exact, strict=True):
        assert torch.isfinite(a).all(), what
        error = (a - b).abs().max() / b.abs().max().clamp(min=1e-30)
        assert error <= LIMIT[dtype], f"{what}: {error:.3g}"
    again = run(op, data, CUDA, dtype, semantics)
    assert all(torch.equal(a, b) for a, b in zip(own, again, strict=True)), "other bits"


@on_gpu
@pytest.mark.parametrize("name", OPS)
def test_op_without_any_visible_cell(name) -> None:
    data = (
        torch.randn(2, 4, 16, 16, 16),
        torch.randn(6 * 4 * 343 + 6),
        torch.zeros(2, 4, 4, 4) > 0,
    )
    own = run(OPS[name][0], (*data[:2], BlockMask(data[2])), CUDA, torch.float32, Semantics())
    assert all(torch.isfinite(t).all() for t in own)
    assert not own[1].any(), "a hidden voxel has a gradient"


class Block(nn.Module):
    """The basic block of a residual network."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(inside, outside, 3, stride, 1, bias=False)
        self.second = nn.Conv3d(outside, outside, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm3d(outside) for _ in range(2))
        plain = stride == 1 and inside == outside
        shortcut = (nn.Conv3d(inside, outside, 1, stride, bias=False), nn.BatchNorm3d(outside))
        self.shortcut = nn.Identity() if plain else nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """The 18-layer residual network in 3D, with narrow layers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, width, 7, 2, 3, bias=False)
        self.norm, self.pool = nn.BatchNorm3d(width), nn.MaxPool3d(3, 2, 1)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        blocks = []
        for i in range(4):
            blocks += [Block(widths[i], widths[i + 1], 1 if i == 0 else 2)]
            blocks += [Block(widths[i + 1], widths[i + 1], 1)]
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(8 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(self.pool(F.relu(self.norm(self.stem(x)))))
        logits: Tensor = self.head(F.adaptive_avg_pool3d(y, 1).flatten(1))
        return logits


def step(net: nn.Module, x: Tensor, mask: BlockMask) -> list[Tensor]:
    """Logits and all gradients of one training step."""
    net.zero_grad()
    logits = net(BlockSparseTensor.from_dense(x, mask))
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits).to(logits)).sum().backward()
    return [logits.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]


@pytest.fixture
def resnet() -> tuple[nn.Module, Tensor, BlockMask]:
    visible = torch.rand(3, 4, 4, 4) < 0.5
    visible[1] = False
    return ResNet18(), torch.randn(3, 1, 64, 64, 64), BlockMask(visible)


@on_gpu
def test_resnet18_trains_as_the_reference_does(resnet) -> None:
    net, x, mask = resnet
    with use_backend("reference"):
        exact = step(copy.deepcopy(net).double(), x.double(), mask)
    reset_launches()
    own = step(copy.deepcopy(net).double().to(CUDA), x.double().to(CUDA), mask.to(CUDA))
    counted = launches()
    convs = sum(isinstance(m, nn.Conv3d) for m in net.modules())
    assert counted["conv3d_cuda"] == counted["conv3d_weight_cuda"] == convs == 20
    assert counted["norm_cuda"] == counted["norm_input_cuda"] == 20
    assert len(own) == len(exact) > 40
    scale = max(t.abs().max().item() for t in exact)
    for a, b in zip(own, exact, strict=True):
        assert torch.allclose(a.cpu(), b, rtol=1e-8, atol=1e-9 * scale)


@on_gpu
def test_same_bits_every_time(resnet) -> None:
    net, x, mask = resnet
    net, x, mask = net.to(CUDA), x.to(CUDA), mask.to(CUDA)
    first = [t.clone() for t in step(copy.deepcopy(net), x, mask)]
    for _ in range(3):
        again = step(copy.deepcopy(net), x, mask)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@on_gpu
def test_a_training_step_never_waits_for_the_gpu(resnet) -> None:
    net, x, mask = resnet
    net, x, mask = net.to(CUDA), x.to(CUDA), mask.to(CUDA)
    step(net, x, mask)  # builds the mask's tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = net(BlockSparseTensor.from_dense(x, mask))
        logits.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_work_is_queued_on_the_current_stream(ragged_mask) -> None:
    mask = ragged_mask((4, 4, 4)).to(CUDA)
    net = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.InstanceNorm3d(8), nn.MaxPool3d(2)).to(
        CUDA
    )
    x = torch.randn(3, 1, 32, 32, 32, device=CUDA)
    with torch.no_grad():
        late, side = torch.zeros_like(x), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            expected = net(BlockSparseTensor.from_dense(x, mask)).to_dense()  # and fills its pool
            side.synchronize()
            torch.cuda._sleep(400_000_000)  # about 0.2 s: any other stream would read the zeros
            late.copy_(x)
            got = net(BlockSparseTensor.from_dense(late, mask)).to_dense()
        assert not side.query(), "something waited for the GPU"
        side.synchronize()
    assert torch.equal(got, expected)


@on_gpu
def test_the_current_device_stays(ragged_mask) -> None:
    mask = ragged_mask((2, 2, 2))
    before = torch.cuda.current_device()
    for index in range(torch.cuda.device_count()):
        x = torch.randn(3, 1, 8, 8, 8, device=f"cuda:{index}")
        y = F.conv3d(BlockSparseTensor.from_dense(x, mask), x.new_ones(2, 1, 3, 3, 3), padding=1)
        assert y.device == x.device
        assert torch.cuda.current_device() == before


@on_gpu
def test_tables_live_on_the_mask_and_are_copied_once(ragged_mask) -> None:
    level = ragged_mask((2, 2, 2)).to(CUDA).level((8, 8, 8))
    for per_sample in (True, False):
        starts = level.segment_starts(per_sample)
        assert starts.device.type == level.cells.device.type == "cuda"
        assert starts is level.segment_starts(per_sample)


@on_gpu
def test_a_mask_on_the_cpu_is_an_error_and_not_a_crash(ragged_mask) -> None:
    mask = ragged_mask((2, 2, 2))
    level = mask.level((8, 8, 8))
    features = torch.randn(level.n_blocks, 4, 4, 4, 2, device=CUDA)
    x = BlockSparseTensor(features, mask, (8, 8, 8))
    with pytest.raises(RuntimeError, match=r"mask\.to\(device\)"):
        F.conv3d(x, torch.ones(1, 2, 1, 1, 1, device=CUDA))
    with pytest.raises(RuntimeError, match="starts must be on cuda"):
        F.instance_norm(x)


def test_every_call_has_a_cuda_twin_with_the_same_arguments(monkeypatch, ragged_mask) -> None:
    if not has_cuda():
        pytest.skip("this build has no CUDA kernels")
    seen = set()

    def both(kernel: str, core: Any, like: Tensor, *addresses: int) -> None:
        launch(kernel, core, like, *addresses)
        size = getattr(native(), kernel + "_workspace", lambda _: None)(core)
        scratch = () if size is None else (like.new_empty(size, dtype=torch.uint8).data_ptr(),)
        # No machine has device -1: the twin takes its arguments, and stops before any launch.
        with pytest.raises(RuntimeError, match="medspark: cuda"):
            getattr(native(), kernel + "_cuda")(core, *addresses, *scratch, -1, 0)
        seen.add(kernel)

    for module in (conv3d, densify_module, global_pool, norm, pool3d, resample3d, transfer):
        monkeypatch.setattr(module, "launch", both)
    data = (torch.randn(3, 4, 16, 16, 16), torch.randn(6 * 4 * 343 + 6), ragged_mask((4, 4, 4)))
    for op, _ in OPS.values():
        run(op, data, torch.device("cpu"), torch.float32, Semantics())
    assert seen == {kernel for _, kernels in OPS.values() for kernel in kernels}


def test_a_device_without_kernels_is_named_with_a_cure() -> None:
    with pytest.raises(RuntimeError, match=r"x is on meta: .*use_backend\('reference'\)"):
        check(torch.empty(1, device="meta"), "x", (1,))


def test_a_build_without_cuda_says_what_to_do(monkeypatch) -> None:
    monkeypatch.setattr("medspark.sparse._op.has_cuda", lambda: False)

    class Elsewhere:
        device = torch.device("cuda", 0)

    with pytest.raises(RuntimeError, match="MEDSPARK_CUDA=ON"):
        check_device(Elsewhere(), "x")  # type: ignore[arg-type]
