"""LAMB, the optimiser of large batches (You et al., arXiv 1904.00962, algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor


class Lamb(torch.optim.Optimizer):
    """Adam's update, scaled per parameter tensor by the ratio of two norms.

    With gradient g, after clipping all gradients together to ``max_grad_norm``, and t = 1, 2, ...::

        m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
        u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * w
        w = w - lr * r * u,            r = |w| / |u|

    The trust ratio ``r`` is 1 where either norm is 0, and in groups without weight decay: norms,
    biases and tokens take a plain Adam step, as in SparK.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled from the moments, yet inside the trust ratio.
        max_grad_norm: greatest norm of the gradient of all groups together; 0 for none.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
    ) -> None:
        if min(lr, eps, weight_decay, max_grad_norm) < 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(
                f"lr {lr}, eps {eps}, weight_decay {weight_decay} and max_grad_norm {max_grad_norm} "
                f"must not be negative, betas {betas} must lie in [0, 1)"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0}
        super().__init__(params, defaults)
        self.max_grad_norm = max_grad_norm

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update; ``closure`` computes loss and gradients before it, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        lists = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        scale = self._clip_factor([p.grad for params in lists for p in params])
        for group, params in zip(self.param_groups, lists, strict=True):
            if params:
                self._update(group, params, scale)
        return loss

    def _clip_factor(self, gradients: list[Any]) -> Tensor | None:
        if not self.max_grad_norm or not gradients:
            return None
        norm = torch.nn.utils.get_total_norm(gradients)
        return self.max_grad_norm / norm.clamp(min=self.max_grad_norm)

    def _update(self, group: dict[str, Any], params: list[Any], scale: Tensor | None) -> None:
        (b1, b2), decay = group["betas"], group["weight_decay"]
        group["step"] += 1
        first, second = self._moments(params)
        gradients: list[Any] = [p.grad for p in params]
        if scale is not None:
            gradients = list(torch._foreach_mul(gradients, scale))
        torch._foreach_lerp_(first, gradients, 1 - b1)
        torch._foreach_mul_(second, b2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - b2)
        roots = torch._foreach_div(second, 1 - b2 ** group["step"])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        updates = torch._foreach_div(first, 1 - b1 ** group["step"])
        torch._foreach_div_(updates, roots)
        if decay != 0:
            torch._foreach_add_(updates, params, alpha=decay)
            for update, ratio in zip(updates, _trust_ratios(params, updates), strict=True):
                update.mul_(ratio)
        torch._foreach_add_(params, updates, alpha=-group["lr"])

    def _moments(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        for p in params:
            if not self.state[p]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        return [self.state[p]["exp_avg"] for p in params], [
            self.state[p]["exp_avg_sq"] for p in params
        ]


def _trust_ratios(params: list[Tensor], updates: tuple[Tensor, ...]) -> list[Tensor]:
    pairs = zip(torch._foreach_norm(params), torch._foreach_norm(updates), strict=True)
    # Both branches of `where` stay finite; no value leaves the device.
    return [torch.where((w > 0) & (u > 0), w / u, 1.0) for w, u in pairs]
