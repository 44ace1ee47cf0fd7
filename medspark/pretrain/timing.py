"""Where the time of a step goes: data, encoder, decoder, optimiser."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_Mark = float | torch.cuda.Event
PARTS = ("data", "encoder", "decoder", "optimiser")


class StepTimer(L.Callback):
    """Logs ``time/data``, ``time/encoder``, ``time/decoder``, ``time/optimiser`` and ``time/step``.

    Seconds per optimiser step, accumulated parts added up; they sum to ``time/step``. Data is the
    wait for the next batch and its way to the device, without validation. Encoder and decoder are
    forward and backward; the decoder includes densifying and the loss. The border between the two in
    the backward pass is the moment the gradient of the coarsest map is complete: everything behind the
    encoder was run later and is undone earlier. On a GPU, events on its stream are read, with one
    synchronisation in each step that is logged; other steps are not timed.

    Args:
        log_every: as the Trainer's.
    """

    def __init__(self, log_every: int) -> None:
        self.log_every = log_every
        self._marks: dict[str, _Mark] = {}
        self._sums = dict.fromkeys(PARTS, 0.0)
        self._handles: list[RemovableHandle] = []
        self._active = False
        self._cuda = False
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hooks the model: end of the encoder's forward pass, and of the decoder's backward pass."""
        pyramid = pl_module.get_submodule("spark.pyramid")
        self._handles = [pyramid.register_forward_hook(self._encoded)]
        self._step = trainer.global_step
        self._cuda = pl_module.device.type == "cuda"

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch is here."""
        self._active = self._due(trainer)
        self._mark("start")

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """The forward pass is complete."""
        self._mark("forward")

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The backward pass is complete."""
        self._mark("backward")

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Adds up, and logs if the step is complete."""
        self._mark("end")
        if self._active:
            self._add()
        stepped = trainer.global_step != self._step
        self._step = trainer.global_step
        if stepped:
            if self._active:
                for part, seconds in self._sums.items():
                    pl_module.log(f"time/{part}", seconds)
                pl_module.log("time/step", sum(self._sums.values()))
            self._sums = dict.fromkeys(PARTS, 0.0)
        self._active = self._due(trainer)
        self._mark("ready")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The wait for data begins anew."""
        self._mark("ready")

    def _due(self, trainer: L.Trainer) -> bool:
        # Lightning counts from 0 and logs where (step + 1) is a multiple.
        return (trainer.global_step + 1) % self.log_every == 0

    def _encoded(self, module: nn.Module, args: Any, maps: list[Tensor]) -> None:
        if module.training and self._active:
            self._mark("encoded")
            features = getattr(maps[-1], "features", maps[-1])
            features.register_hook(lambda gradient: self._mark("border"))

    def _mark(self, name: str) -> None:
        if not self._active:
            return
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks[name] = event
        else:
            self._marks[name] = time.perf_counter()

    def _add(self) -> None:
        self._sums["data"] += self._between("ready", "start")
        self._sums["encoder"] += self._between("start", "encoded")
        self._sums["decoder"] += self._between("encoded", "border")
        self._sums["encoder"] += self._between("border", "backward")
        self._sums["optimiser"] += self._between("backward", "end")
        self._marks.clear()

    def _between(self, first: str, second: str) -> float:
        a, b = self._marks.get(first), self._marks.get(second)
        if a is None or b is None:  # the first step of a run has no earlier one to wait from
            return 0.0
        if isinstance(a, float) or isinstance(b, float):
            return float(b) - float(a)  # type: ignore[arg-type]
        b.synchronize()
        return a.elapsed_time(b) / 1000
