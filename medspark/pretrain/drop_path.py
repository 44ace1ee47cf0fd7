"""Stochastic depth for networks that have none (Huang et al., arXiv 1603.09382).

The networks are those of public libraries and stay as they are. The last module of a residual branch
gets a forward hook for the time of one forward pass, which multiplies the branch by 0 or 1 / (1 - p)
per sample, just before the network adds the shortcut. Copies, checkpoints and exported encoders carry
no trace of it, and its draws are arguments, so they can depend on the sample alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

# Class of a residual block -> its module whose output is added to the shortcut.
_BRANCH_ENDS = {
    "ResNetBlock": "bn2",  # MONAI
    "ResNetBottleneck": "bn3",
    "BasicBlockD": "conv2",  # nnU-Net
    "BottleneckD": "conv3",
}


def branch_ends(network: nn.Module) -> list[nn.Module]:
    """The last module of each residual branch, in the order of the network.

    Raises:
        ValueError: no residual block of a known class.
    """
    found = [
        module.get_submodule(_BRANCH_ENDS[type(module).__name__])
        for module in network.modules()
        if type(module).__name__ in _BRANCH_ENDS
    ]
    if not found:
        raise ValueError(
            f"drop path knows the residual blocks {', '.join(_BRANCH_ENDS)}, and "
            f"{type(network).__name__} has none of them; set drop_path to 0"
        )
    return found


def drop_rates(blocks: int, rate: float) -> list[float]:
    """Probability to drop each block: from 0 at the first to ``rate`` at the last, linearly."""
    return [rate * i / max(blocks - 1, 1) for i in range(blocks)]


@contextmanager
def drop_path(network: nn.Module, rate: float, draws: Tensor) -> Iterator[None]:
    """While it is open, a forward pass of ``network`` leaves out residual branches.

    Sample b loses branch k where ``draws[b, k] < drop_rates(...)[k]``; others are scaled so that the
    expectation stays. Works on plain and on block-sparse tensors.

    Args:
        network: with residual blocks of a known class.
        rate: of the last block.
        draws: uniform in [0, 1), [B, blocks], on the network's device.

    Raises:
        ValueError: unknown blocks, or draws for another number of them.
    """
    ends = branch_ends(network)
    if draws.ndim != 2 or draws.shape[1] != len(ends):
        raise ValueError(f"draws {tuple(draws.shape)} should be [B, {len(ends)}]")

    with ExitStack() as hooks:
        for k, (module, p) in enumerate(zip(ends, drop_rates(len(ends), rate), strict=True)):
            keep = draws[:, k] >= p

            def scale(
                module: nn.Module, args: object, out: Tensor, keep: Tensor = keep, p: float = p
            ) -> Tensor:
                return out * (keep.to(out.dtype) / (1 - p)).view(-1, *(1,) * (out.ndim - 1))

            if p > 0:
                hooks.callback(module.register_forward_hook(scale).remove)
        yield
