"""Official SparK on images: our 2D ops, and the whole 3D model at depth 1, against masked dense tensors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from medspark.losses import masked_patch_loss
from medspark.models import LightDecoder, SparK
from medspark.sparse import BlockMask, BlockSparseTensor, densify, launches

from . import spark2d_oracle as oracle

CHANNELS, STRIDES = (
    (6, 8, 12),
    (1, 2, 2),
)  # of the stages, behind a stem and a pool of stride 2 each
TOTAL = [(1, 4, 4), (1, 8, 8), (1, 16, 16)]
IMAGE = (4, 2, 48, 64)  # 3 x 4 cells of the total stride 16


def conv(
    axes: int, c_in: int, c_out: int, k: int, stride: int = 1, bias: bool = False
) -> nn.Module:
    """A 2D convolution, or the 3D one that does the same to every slice."""
    if axes == 2:
        return nn.Conv2d(c_in, c_out, k, stride, k // 2, bias=bias)
    kernel, steps, pads = (1, k, k), (1, stride, stride), (0, k // 2, k // 2)
    return nn.Conv3d(c_in, c_out, kernel, steps, pads, bias=bias)


def norm(axes: int, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if axes == 2 else nn.BatchNorm3d(channels)


class Block(nn.Module):
    """Basic residual block. Its shortcut has a bias and no norm behind, so the bias must be masked."""

    def __init__(self, axes: int, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(axes, c_in, c_out, 3, stride), norm(axes, c_out)
        self.conv2, self.norm2 = conv(axes, c_out, c_out, 3), norm(axes, c_out)
        self.shortcut = conv(axes, c_in, c_out, 1, stride, bias=True)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


class Encoder(nn.Module):
    """Stem, max pool and three stages, as an ordinary network writes them; knows of no mask."""

    def __init__(self, axes: int, c_in: int) -> None:
        super().__init__()
        widths = (CHANNELS[0], *CHANNELS)
        self.stem, self.norm = conv(axes, c_in, widths[0], 7, 2), norm(axes, widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        if axes == 3:
            self.pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.stages = nn.ModuleList(
            Block(axes, a, b, s) for a, b, s in zip(widths, CHANNELS, STRIDES, strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.pool(self.relu(self.norm(self.stem(x))))
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class Level2D(nn.Module):
    """Densify on images, from public parts."""

    def __init__(self, channels: int, width: int, coarsest: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.mask_token = nn.Parameter(torch.zeros(channels))
        same = coarsest and channels == width
        kernel = 1 if coarsest else 3
        self.projection = (
            nn.Identity() if same else nn.Conv2d(channels, width, kernel, padding=kernel // 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.projection(densify(self.norm(x), self.mask_token))
        return y


class Spark2D(nn.Module):
    """SparK on images from what the package has in 2D; the decoder runs on volumes of depth 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = Encoder(2, IMAGE[1])
        self.decoder = LightDecoder(TOTAL, width, IMAGE[1])
        pairs = zip(CHANNELS, self.decoder.level_widths, strict=True)
        self.densify = nn.ModuleList(Level2D(c, w, i == 2) for i, (c, w) in enumerate(pairs))

    def forward(self, image: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        maps = self.encoder(BlockSparseTensor.from_dense(image, BlockMask(visible)))
        dense = [level(x).unsqueeze(2) for level, x in zip(self.densify, maps, strict=True)]
        prediction = self.decoder(dense).squeeze(2)
        loss = masked_patch_loss(prediction, image, visible, (16, 16))
        return loss, prediction, [x.to_dense() for x in maps]


class Depth1(nn.Module):
    """The package's own 3D model on volumes of one slice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        decoder = LightDecoder(TOTAL, width, IMAGE[1])
        self.model = SparK(Encoder(3, IMAGE[1]), decoder, strides=TOTAL, in_channels=IMAGE[1])

    def forward(self, image: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        volume, mask = image.unsqueeze(2), BlockMask(visible[:, None])
        output = self.model(volume, mask)
        assert output.cell == (1, 16, 16)
        return output.loss, output.prediction.squeeze(2), []


def slices(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The 2D weights that act on a volume of one slice, under the oracle's names."""
    found = {}
    for name, tensor in state.items():
        name = name.removeprefix("model.").replace("pyramid.encoder.", "encoder.")
        found[name] = tensor[:, :, tensor.shape[2] // 2] if tensor.ndim == 5 else tensor
    return found


def randomise(model: nn.Module) -> nn.Module:
    """Weights large enough that tokens, biases and the bound of ReLU6 all matter."""
    generator = torch.Generator().manual_seed(0)
    model.double().train()
    with torch.no_grad():
        for p in model.parameters():
            scale = 2.0 if p.ndim == 1 else (2 / p[0].numel()) ** 0.5
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * scale)
    return model


def case(counts: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(*IMAGE, generator=generator, dtype=torch.float64)
    visible = BlockMask.random(IMAGE[0], (3, 4), 0.6, generator).visible  # 5 of 12 in each sample
    if counts == "unequal":
        visible[1], visible[2] = False, True
    return image, visible


def close(got: Tensor, expected: Tensor, what: str, bound: float = 1e-10) -> None:
    assert got.shape == expected.shape, what
    scale = expected.abs().max()
    assert scale > 0, what
    assert (got - expected).abs().max() <= bound * scale, what


@pytest.mark.parametrize("counts", ["official", "unequal"])
@pytest.mark.parametrize("width", [16, 32], ids=["no projection", "projection"])
@pytest.mark.parametrize("build", [Spark2D, Depth1])
def test_step_equals_the_official_formulation(build, width, counts) -> None:
    image, visible = case(counts)
    model = randomise(build(width))
    state = {k: v.clone() for k, v in slices(model.state_dict()).items()}
    names = dict(slices(dict(model.named_parameters())))
    state |= {k: state[k].requires_grad_() for k in names}
    before = launches().get("conv3d", 0)
    own_loss, own_prediction, own_maps = model(image, visible)
    assert launches()["conv3d"] == before + 10  # the encoder's convolutions, all of them sparse
    own_loss.backward()
    loss, prediction, maps = oracle.spark(state, image, visible, STRIDES, count_eps=0.0)
    loss.backward()

    close(own_loss, loss, "loss")
    close(own_prediction, prediction, "prediction")
    for i, (own, theirs) in enumerate(zip(own_maps, maps, strict=False)):
        close(own, theirs, f"map {i}")
    check_gradients(model, state)
    buffers = slices(dict(model.named_buffers()))
    moved = [k for k in buffers if "running" in k]
    assert len(moved) == 2 * (7 + 3 + 8)  # encoder, densify, decoder
    for name in moved:
        close(buffers[name], state[name], name)


def check_gradients(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Every parameter's; weights off the one slice must have none."""
    gradients = {k: p.grad for k, p in model.named_parameters()}
    assert all(g is not None for g in gradients.values())
    for name, grad in slices(gradients).items():  # type: ignore[arg-type]
        theirs = state[name].grad
        assert theirs is not None, name
        close(grad, theirs, name)
    for name, grad in gradients.items():
        assert grad is not None
        if grad.ndim == 5:
            centre = grad[:, :, grad.shape[2] // 2]
            assert grad.abs().sum() == pytest.approx(centre.abs().sum().item(), rel=1e-12), name


def test_official_code_counts_the_hidden_patches_and_a_little_more() -> None:
    """It divides by their number + 1e-8, the package by their number (at least 1)."""
    image, visible = case("unequal")
    prediction = torch.randn(image.shape, dtype=torch.float64)
    own = masked_patch_loss(prediction, image, visible, (16, 16))
    official, hidden = oracle.loss(prediction, image, visible), (~visible).sum()
    close(own, official * (hidden + 1e-8) / hidden, "loss", 1e-13)
    everything = torch.ones_like(visible)
    assert oracle.loss(prediction, image, everything) == 0
    assert masked_patch_loss(prediction, image, everything, (16, 16)) == 0


def test_hidden_pixels_change_nothing() -> None:
    """Ours leaves them out; the oracle's product needs them finite."""
    image, visible = case("official")
    mask = oracle.at(visible, image) > 0
    state = slices(randomise(Spark2D(16)).state_dict())
    expected = oracle.encode(state, image, visible, STRIDES)
    for fill in (0.0, torch.nan):
        model = randomise(Spark2D(16))
        maps = model.encoder(
            BlockSparseTensor.from_dense(torch.where(mask, image, fill), BlockMask(visible))
        )
        for i, (own, theirs) in enumerate(zip(maps, expected, strict=True)):
            close(own.to_dense(), theirs, f"map {i}")
