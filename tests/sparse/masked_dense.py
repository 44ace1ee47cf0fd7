"""Oracle of whole networks: torch's dense functions with `where(mask, x, 0)` in front of each.

It shares no code with `medspark.sparse`. Norms and means see the list of active voxels; what a function
leaves at hidden voxels is cut off before the next function that looks beyond a single voxel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

REACHING = {
    "conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d", "max_pool2d", "max_pool3d",
    "avg_pool2d", "avg_pool3d", "interpolate", "pad", "norm",
}  # fmt: skip


def same_random(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Random numbers of MONAI's drop connect, the same in every precision."""
    if func is torch.rand and "dtype" in kwargs:
        return func(*args, **{**kwargs, "dtype": torch.float32}).to(kwargs["dtype"])
    return func(*args, **kwargs)


class MaskedDense(TorchFunctionMode):
    """Runs a network for plain tensors `[B, C, *spatial]` as if only the visible cells existed."""

    def __init__(self, visible: Tensor) -> None:
        super().__init__()
        self.visible = visible

    def mask(self, x: Any) -> Tensor | None:
        """Active voxels `[B, *spatial]` of a level, None of what has no space."""
        grid = self.visible.shape[1:]
        if not isinstance(x, Tensor) or x.ndim != len(grid) + 2 or x.shape[2:].numel() == 1:
            return None
        coarse = [min(n, g) for n, g in zip(x.shape[2:], grid, strict=True)]
        pool = F.adaptive_max_pool3d if len(grid) == 3 else F.adaptive_max_pool2d
        cells: Tensor = pool(self.visible[:, None].float(), coarse)[:, 0] > 0
        for axis, (n, g) in enumerate(zip(x.shape[2:], coarse, strict=True), start=1):
            assert n % g == 0, f"{tuple(x.shape)} does not map onto {tuple(grid)}"
            cells = cells.repeat_interleave(n // g, dim=axis)
        return cells

    def keep(self, x: Any) -> Any:
        """`x` at active voxels, 0 elsewhere."""
        if hasattr(x, "is_padded"):  # its inside was masked before
            return x
        mask = self.mask(x)
        return x if mask is None else torch.where(mask[:, None], x, x.new_zeros(()))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("batch_norm", "instance_norm", "group_norm"):
            return self._norm(name, func, *args, **kwargs)
        if name in ("adaptive_avg_pool2d", "adaptive_avg_pool3d"):
            return self._mean(args[0])[(...,) + (None,) * (args[0].ndim - 2)]
        if name == "mean" and args[1:2] == ((2, 3),) and args[0].ndim == 4:
            return self._mean(args[0])[..., None, None]
        if name in REACHING:
            args = (self.keep(args[0]), *args[1:])
        y = same_random(func, args, kwargs)
        if name == "pad":
            y.is_padded = True
        return y

    def _mean(self, x: Tensor) -> Tensor:
        mask = self.mask(x)
        assert mask is not None
        rows = zip(x.movedim(1, -1), mask, strict=True)
        return torch.stack([s[m].sum(0) / max(int(m.sum()), 1) for s, m in rows])

    def _norm(self, name: str, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mask = self.mask(x)
        assert mask is not None
        y = torch.zeros_like(x).movedim(1, -1)
        if name == "batch_norm":
            y = y.index_put((mask,), func(x.movedim(1, -1)[mask], *args, **kwargs))
            return y.movedim(-1, 1)
        samples = []
        for empty, sample, m in zip(y, x.movedim(1, -1), mask, strict=True):
            rows = func(sample[m].T[None], *args, **kwargs)[0].T if m.any() else sample[m]
            samples.append(empty.index_put((m,), rows))
        return torch.stack(samples).movedim(-1, 1)
