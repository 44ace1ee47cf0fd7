"""Which types autocast gives the arguments of ops that do not run torch's own function."""

from __future__ import annotations

import torch
from torch import Tensor

from medspark.sparse.tensor import BlockSparseTensor, like


def autocast(x: Tensor) -> torch.dtype | None:
    """The type to which torch would cast the arguments of a convolution of `x`; None: as they are."""
    kind = "cpu" if x.is_cpu else x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def widened(x: BlockSparseTensor, device: str) -> BlockSparseTensor:
    """`x` in float32 where autocast on this type of device gives torch's own op float32.

    Pools of volumes on the CPU, group norm and interpolation on CUDA.
    """
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    if narrow and x.device.type == device and torch.is_autocast_enabled(device):
        return like(x, x.features.float())
    return x
