"""A loss or gradient that is not finite: stop, say where and why, keep the state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import lightning as L
import torch
from torch import Tensor

from medspark.pretrain.checkpoints import write_whole

_SHOWN = 3  # names listed in a message


@dataclass
class Part:
    """One batch of a step: what is needed to repeat it.

    Attributes:
        samples: their numbers in the run.
        batch: [B, C, D, H, W].
        visible: the mask, bool [B, Gz, Gy, Gx].
        loss: of the batch; None before it is known.
    """

    samples: Sequence[int]
    batch: Tensor = field(repr=False)
    visible: Tensor = field(repr=False)
    loss: Tensor | None = None


def check_loss(module: L.LightningModule, parts: Sequence[Part]) -> None:
    """Stops the run if the loss of the last part is NaN or infinite.

    Raises:
        FloatingPointError: it is; the message says where the state lies.
    """
    loss = parts[-1].loss
    if loss is not None and not torch.isfinite(loss):
        _stop(module, parts, f"the loss is {loss.item()}")


def check_gradients(module: L.LightningModule, parts: Sequence[Part], norm: Tensor) -> None:
    """Stops the run if the gradient norm is NaN or infinite, before the weights take the step.

    With a loss scale (16-bit floats) such gradients are part of the search for it: that step is left
    out, and the run goes on.

    Raises:
        FloatingPointError: it is; the message says where the state lies.
    """
    scaled = getattr(module.trainer.precision_plugin, "scaler", None) is not None
    if not scaled and not torch.isfinite(norm):
        bad = _not_finite({n: p.grad for n, p in module.named_parameters()})
        where = f" in {_listed(bad)}" if bad else " (each gradient is finite, their norm overflows)"
        _stop(module, parts, f"the loss is finite, the gradient is not{where}")


def _stop(module: L.LightningModule, parts: Sequence[Part], what: str) -> NoReturn:
    samples = [n for part in parts for n in part.samples]
    path = _save(module, parts)
    raise FloatingPointError(
        f"{what} at step {module.trainer.global_step} (samples {samples[0]} to {samples[-1]} on "
        f"process {module.global_rank}). {_cause(module, parts)}. The weights have not taken this step; "
        f"batch, masks, weights and gradients' names are in {path}"
    )


def _cause(module: L.LightningModule, parts: Sequence[Part]) -> str:
    for part in parts:
        bad = (~torch.isfinite(part.batch)).flatten(1).sum(1).tolist()
        for number, count in zip(part.samples, bad, strict=True):
            if count:
                return (
                    f"Sample {number} holds {count} values that are not finite: check its volume in "
                    "the store, and the HU window"
                )
    weights = _not_finite(dict(module.named_parameters()))
    if weights:
        return f"Weights were not finite before it ({_listed(weights)}): go back to a checkpoint"
    largest = max(part.batch.abs().max().item() for part in parts)
    return (
        f"Batch and weights are finite (largest input {largest:.3g}): resume from the last checkpoint "
        "with a lower optim.lr, a smaller trainer.gradient_clip or trainer.precision=32-true"
    )


def _save(module: L.LightningModule, parts: Sequence[Part]) -> Path:
    """Writes what the step saw, as plain tensors and values; it holds voxels of the batch."""
    step, rank = module.trainer.global_step, module.global_rank
    folder = Path(module.trainer.default_root_dir) / "failure"
    gradients = {n: p.grad for n, p in module.named_parameters()}
    state = {
        "step": step,
        "rank": rank,
        "samples": [list(part.samples) for part in parts],
        "batches": [part.batch.cpu() for part in parts],
        "visible": [part.visible.cpu() for part in parts],
        "losses": [float("nan") if part.loss is None else part.loss.item() for part in parts],
        "bad_gradients": _not_finite(gradients),
        "state_dict": module.state_dict(),
        "optimizer_states": [o.state_dict() for o in module.trainer.optimizers],
        "hyper_parameters": dict(module.hparams),
    }
    path = folder / f"step_{step:06d}_rank_{rank}.pt"
    write_whole(path, lambda file: torch.save(state, file))
    return path


def _not_finite(tensors: dict[str, Tensor | None]) -> list[str]:
    return [n for n, t in tensors.items() if t is not None and not torch.isfinite(t).all()]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
