"""Lightning module of SparK pre-training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
import torch
from torch import Tensor

from medspark.data.loader import CropBatch
from medspark.models.spark import SparKOutput, build_spark
from medspark.pretrain.drop_path import branch_ends, drop_path
from medspark.pretrain.failure import Part, check_gradients, check_loss
from medspark.pretrain.order import generator_of, sample_numbers, seed_of
from medspark.pretrain.plan import make_plan
from medspark.pretrain.schedule import build_optimizer, optim_options, set_step
from medspark.sparse import BlockMask, convert_sync_batchnorm


class SparKModule(L.LightningModule):
    """Pre-trains a SparK model on batches [B, C, D, H, W] of normalised intensities.

    Every draw is a function of the seed and of the number of a sample (masks, drop path) or step
    (random layers of the network), so a run on two processes sees the masks of one process with the
    joint batch, and a resumed run those of an uninterrupted one. With several processes, batch norms
    share their statistics. Hyper-parameters are plain dicts and lists, so checkpoints load with
    ``weights_only=True``.

    Args:
        spec: of the model, see ``medspark.models.spark_spec``.
        optim: ``max_steps`` and any of ``OPTIM_DEFAULTS`` in ``medspark.pretrain.schedule``.
        intensity: how HU became network input; only stored.
        spacing: mm (z, y, x) of the volumes; only stored.
        crop: voxels (z, y, x) of the crops; only stored.
        seed: of the masks.

    Raises:
        ValueError: a spec or options that do not fit.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        optim: dict[str, Any],
        intensity: dict[str, Any] | None = None,
        spacing: list[float] | None = None,
        crop: list[int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.optim = optim_options(optim)
        self.spark = build_spark(spec)
        if self.optim["drop_path"]:
            branch_ends(self.spark.encoder)  # an encoder without known blocks is told of at once
        self.plan = make_plan(
            method="spark",
            encoder=spec["encoder"],
            encoder_key="spark.pyramid.encoder",
            strides=[list(s) for s in self.spark.pyramid.strides],
            intensity=intensity,
            spacing=None if spacing is None else [float(s) for s in spacing],
            crop=None if crop is None else [int(c) for c in crop],
        )
        self.seed = seed
        self._parts: list[Part] = []
        self._seen = 0
        self._sums = torch.zeros(3, dtype=torch.float64)

    def configure_model(self) -> None:
        """With several processes: batch norms over the visible voxels of all of them.

        Lightning's own option would put torch's class in place, which knows neither the CPU nor
        block-sparse tensors.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            self.spark = convert_sync_batchnorm(self.spark)  # type: ignore[assignment]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW or LAMB; ``set_step`` does the schedules."""
        return build_optimizer(self.spark, self.optim)

    def training_step(self, batch: Tensor | CropBatch, batch_idx: int) -> Tensor:
        """Loss of one batch under the masks of its samples.

        Args:
            batch: volumes [B, C, D, H, W], for which masks are drawn here, or crops with theirs.
            batch_idx: number of the batch on this process.

        Raises:
            FloatingPointError: the loss is NaN or infinite; weights are untouched by that step.
        """
        part = batch_idx % self.trainer.accumulate_grad_batches
        call = self.global_step * self.trainer.accumulate_grad_batches + part
        if part == 0:
            self._parts = []
        volume, visible = batch[:2] if isinstance(batch, CropBatch) else (batch, None)
        numbers = sample_numbers(call, self.global_rank, self.trainer.world_size, len(volume))
        mask = self.draw_masks(volume, "train", numbers) if visible is None else BlockMask(visible)
        self._parts.append(Part(numbers, volume, mask.visible))
        # Whatever else is random in the network (its own dropout) follows from the step as well.
        torch.manual_seed(seed_of(self.seed, "layers", call, self.global_rank))
        with self._drop_path(numbers):
            output: SparKOutput = self.spark(volume, mask=mask)
        self._parts[-1].loss = output.loss.detach()
        check_loss(self, self._parts)
        return output.loss

    def draw_masks(self, batch: Tensor, phase: str, numbers: Sequence[int]) -> BlockMask:
        """A random mask for each sample of [B, C, D, H, W], which depends on its number alone."""
        shape = torch.empty(()).expand(1, *batch.shape[1:])  # on the CPU, without memory
        masks = [
            self.spark.draw_mask(shape, generator_of(self.seed, phase, number))
            for number in numbers
        ]
        return BlockMask(torch.cat([mask.visible for mask in masks]))

    def _drop_path(self, numbers: Sequence[int]) -> AbstractContextManager[None]:
        rate = self.optim["drop_path"]
        if not rate:
            return nullcontext()
        blocks = len(branch_ends(self.spark.encoder))
        draws = [
            torch.rand(blocks, generator=generator_of(self.seed, "drop path", number))
            for number in numbers
        ]
        return drop_path(self.spark.encoder, rate, torch.stack(draws).to(self.device))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Sets the schedules of this step; logs them, loss, visible share and gradient norm.

        The norm is that before clipping.

        Raises:
            FloatingPointError: it is NaN or infinite; weights are untouched by that step.
        """
        gradients = [p.grad for p in self.spark.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        check_gradients(self, self._parts, norm)
        samples = sum(len(part.samples) for part in self._parts) * self.trainer.world_size
        set_step(optimizer, self.global_step, self.optim, samples)
        losses = [part.loss for part in self._parts if part.loss is not None]
        visible = torch.cat([part.visible.flatten() for part in self._parts])
        self.log("train/loss", torch.stack(losses).mean(), prog_bar=True, sync_dist=True)
        self.log("train/grad_norm", norm)
        self.log("train/visible", visible.float().mean())
        group = optimizer.param_groups[0]
        self.log("train/lr", group["lr"])
        self.log("train/weight_decay", group["weight_decay"])

    def on_validation_epoch_start(self) -> None:
        """Starts the sums over the validation set."""
        self._sums = torch.zeros(3, dtype=torch.float64)
        self._seen = 0

    def validation_step(self, batch: Tensor, batch_idx: int) -> Mapping[str, Any]:
        """Loss of one batch under masks that are the same in every run and on every process.

        Every process reads the whole set, so the result does not depend on their number.
        """
        size = len(batch)
        mask = self.draw_masks(batch, "val", range(self._seen, self._seen + size))
        self._seen += size
        output: SparKOutput = self.spark(batch, mask=mask)
        values = [output.loss.item() * size, output.constant_loss().item() * size, size]
        self._sums += torch.tensor(values, dtype=torch.float64)
        return {"loss": output.loss, "spark": output}

    def on_validation_epoch_end(self) -> None:
        """Logs the mean loss, that of the best constant on the same masks, and their ratio."""
        total = self.trainer.strategy.reduce(self._sums.float().to(self.device), reduce_op="sum")
        loss, constant = (total[0] / total[2]).item(), (total[1] / total[2]).item()
        ratio = loss / constant if constant > 0 else float("nan")
        self.log_dict(
            {"val/loss": loss, "val/constant": constant, "val/ratio": ratio},
            prog_bar=True,
            sync_dist=True,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the adaptation plan."""
        checkpoint["plan"] = self.plan
