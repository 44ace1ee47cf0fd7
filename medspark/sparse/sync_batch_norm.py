"""Batch norm over the active voxels of all processes.

torch's `nn.SyncBatchNorm` refuses CPU tensors and bypasses `__torch_function__`, so unlike the other norms
it cannot meet a BlockSparseTensor unmodified; `convert_sync_batchnorm` puts this one in its place.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medspark.sparse.tensor import BlockSparseTensor


def _accumulation(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _statistics(rows: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, mean and biased variance per channel over all processes, float64, the same bits on each.

    The sums of squares about each process's own mean are merged as in Chan et al., "Updating formulae
    and a pairwise algorithm for computing sample variances" (1979). One collective; float64, because
    float32 cannot count beyond 2^24 voxels.
    """
    count, channels = rows.shape
    local = torch.zeros(1 + 2 * channels, dtype=torch.float64, device=rows.device)
    if count:
        centre = rows.mean(0, dtype=_accumulation(rows))
        deviation = rows - centre
        # What rounding left of the mean: small, yet it matters to the distance between two means.
        shift = deviation.sum(0).double() / count
        local[0], local[1 : 1 + channels] = count, centre + shift
        local[1 + channels :] = deviation.square_().sum(0) - count * shift.square()
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group)
    counts, means, squares = torch.stack(gathered).split([1, channels, channels], dim=1)
    total = counts.sum()
    some = total.clamp(min=1)
    mean = (counts * means).sum(0) / some
    squares = (squares + counts * (means - mean).square()).sum(0)
    return total, mean, squares / some


class _SyncNorm(torch.autograd.Function):
    """Normalises rows `[N, C]`; gradients of weight and bias stay sums over this process's rows."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        total, mean, var = _statistics(rows, group)
        kind = _accumulation(rows)
        # All statistics are known now, which makes it a fixed affine map per channel.
        a, b = (None if t is None else t.to(kind) for t in (weight, bias))
        y = F.batch_norm(rows, mean.to(kind), var.to(kind), a, b, training=False, eps=eps)
        ctx.save_for_backward(rows, weight, mean, (var + eps).rsqrt(), total)
        ctx.group, ctx.bias_dtype = group, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(total, mean, var)
        return y, total, mean, var

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, mean, scale, total = ctx.saved_tensors
        kind = _accumulation(rows)
        grad, normalised = grad.to(kind), (rows - mean.to(kind)).mul_(scale.to(kind))
        local = torch.stack([grad.sum(0), (grad * normalised).sum(0)]).double()
        dx = None
        if ctx.needs_input_grad[0]:  # also on a process without rows: the others wait for it
            sums = local.clone()
            dist.all_reduce(sums, group=ctx.group)
            shift, slope = (sums / total.clamp(min=1)).to(kind)
            gain = scale if weight is None else scale * weight
            dx = normalised.mul_(-slope).add_(grad).sub_(shift).mul_(gain.to(kind)).to(rows.dtype)
        dw = None if weight is None else local[1].to(weight.dtype)
        db = None if ctx.bias_dtype is None else local[0].to(ctx.bias_dtype)
        return dx, dw, db, None, None


class SyncBatchNorm(_BatchNorm):
    """`torch.nn.SyncBatchNorm` for BlockSparseTensors and CPU tensors too; the same state_dict.

    In training, statistics cover all active voxels of all processes of the group, whose counts may
    differ and may be 0 (a plain tensor: all values). Every process must call forward, and backward if
    any does. Otherwise, and without a process group, it is plain batch norm. Plain CUDA tensors take
    torch's own way. 16-bit inputs are accumulated in float32. No subclass of `torch.nn.SyncBatchNorm`,
    because DistributedDataParallel refuses those on the CPU.

    Args:
        num_features: channels.
        eps: added to the variance.
        momentum: of the running statistics; None averages them over all steps.
        affine: whether there is a weight and a bias per channel.
        track_running_stats: whether running statistics are kept, and used in evaluation.
        process_group: processes that share statistics; None for all.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: whether there is a bias if `affine`.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2 or input.shape[1] != self.num_features:
            raise ValueError(
                f"SyncBatchNorm of {self.num_features} channels got an input of {tuple(input.shape)}"
            )

    def forward(self, input: Tensor) -> Tensor:
        """Normalises `[B, C, ...]`, plain or a BlockSparseTensor.

        Raises:
            ValueError: a wrong number of axes or channels, or, in training, one active voxel in all.
        """
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return super().forward(input)
        if not isinstance(input, BlockSparseTensor) and input.is_cuda:
            return nn.SyncBatchNorm.forward(cast("Any", self), input)
        group = self.process_group or dist.group.WORLD
        if dist.get_world_size(group) < 2:
            return super().forward(input)
        self._check_input_dim(input)
        if isinstance(input, BlockSparseTensor):
            return input.with_features(self._normalise(input.features, group))
        return self._normalise(input.movedim(1, -1), group).movedim(-1, 1).contiguous()

    def _normalise(self, x: Tensor, group: Any) -> Tensor:
        """`x` is `[..., C]`."""
        rows = x.flatten(0, -2)
        y: Tensor
        y, total, mean, var = _SyncNorm.apply(rows, self.weight, self.bias, self.eps, group)
        # More than one row here is more than one row in all: only then the total, which may be on a
        # GPU, need not be waited for.
        if rows.shape[0] < 2 and total < 2:
            if total == 1:
                raise ValueError(
                    "Expected more than 1 value per channel when training, got one active voxel in "
                    "the batch of all processes"
                )
        elif self.track_running_stats:
            self._update_running(mean, var * (total / (total - 1)))
        return y.view(x.shape)

    def _update_running(self, mean: Tensor, var: Tensor) -> None:
        """Exponential averages, or cumulative ones where momentum is None, of unbiased variances."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            momentum = self.momentum
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
            for running, new in ((self.running_mean, mean), (self.running_var, var)):
                running.lerp_(new.to(running.dtype), momentum)


def convert_sync_batchnorm(module: nn.Module, process_group: Any | None = None) -> nn.Module:
    """Replaces each batch norm of a network by `SyncBatchNorm`.

    Like `torch.nn.SyncBatchNorm.convert_sync_batchnorm`: BatchNorm1d, 2d, 3d and torch's SyncBatchNorm
    are converted at any depth; parameters and buffers are handed over themselves, so optimizers, the
    state_dict, devices and sharing stay as they are. A module used twice stays one module.

    Args:
        module: changed in place, unless it is a batch norm itself.
        process_group: processes to share statistics with; None keeps the group of a SyncBatchNorm and
            otherwise takes all processes.

    Returns:
        The network.

    Raises:
        TypeError: a lazy batch norm that has not seen an input yet.
    """
    return _convert(module, process_group, {})


def _convert(module: nn.Module, group: Any, done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in done:
        return done[module]
    converted = done[module] = _twin(module, group) if isinstance(module, _BatchNorm) else module
    for name, child in module._modules.items():
        if child is not None:
            converted._modules[name] = _convert(child, group, done)
    return converted


def _twin(module: _BatchNorm, group: Any) -> SyncBatchNorm:
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        raise TypeError(f"run {type(module).__name__} on an input once before it is converted")
    twin = SyncBatchNorm(
        module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats,
        group or getattr(module, "process_group", None), device="meta",
    )  # fmt: skip
    twin._parameters.update(module._parameters)
    twin._buffers.update(module._buffers)
    return twin.train(module.training)
