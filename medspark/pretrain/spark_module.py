"""Lightning module of SparK pre-training."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from medspark.models.spark import SparKOutput, build_spark
from medspark.pretrain.plan import make_plan
from medspark.pretrain.schedule import cosine, lr_factor, optim_options, parameter_groups


def mask_generator(seed: int, phase: str, *counters: int) -> torch.Generator:
    """CPU generator that depends on its arguments alone: a resumed run draws the same masks."""
    text = ":".join([str(seed), phase, *map(str, counters)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class SparKModule(L.LightningModule):
    """Pre-trains a SparK model on batches [B, C, D, H, W] of normalised intensities.

    AdamW, per-step linear warm-up and cosine; no decay on 1-D parameters, biases and mask tokens.
    Hyper-parameters are plain dicts and lists, so checkpoints load with ``weights_only=True``.

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
        self._sums = torch.zeros(3, dtype=torch.float64)

    def configure_optimizers(self) -> Any:
        """AdamW and a per-step schedule."""
        o = self.optim
        groups = parameter_groups(self.spark, o["weight_decay"])
        optimizer = torch.optim.AdamW(groups, lr=o["lr"], betas=tuple(o["betas"]))

        def factor(step: int) -> float:
            return lr_factor(
                step, o["max_steps"], o["warmup_steps"], o["warmup_start"], o["lr_end"]
            )

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Loss of one batch under masks that are a function of seed, step and rank.

        Raises:
            FloatingPointError: the loss is NaN or infinite; weights are untouched by that step.
        """
        part = batch_idx % self.trainer.accumulate_grad_batches
        generator = mask_generator(self.seed, "train", self.global_step, part, self.global_rank)
        output: SparKOutput = self.spark(batch, generator=generator)
        self._check_finite(output.loss, batch)
        size = batch.shape[0]
        self.log("train/loss", output.loss.detach(), prog_bar=True, batch_size=size)
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=size)
        return output.loss

    def _check_finite(self, loss: Tensor, batch: Tensor) -> None:
        if torch.isfinite(loss):
            return
        bad = int((~torch.isfinite(batch)).sum())
        cause = (
            f"the batch holds {bad} values that are not finite: check the store"
            if bad
            else "the batch is finite: lower lr, clip gradients harder or use 32-bit precision"
        )
        raise FloatingPointError(f"loss is {loss.item()} at step {self.global_step}; {cause}")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Sets the weight decay of this step and logs the gradient norm before clipping."""
        o = self.optim
        if o["weight_decay_end"] is not None:
            left = cosine(self.global_step / max(o["max_steps"] - 1, 1))
            decay = o["weight_decay_end"] + (o["weight_decay"] - o["weight_decay_end"]) * left
            optimizer.param_groups[0]["weight_decay"] = decay
            self.log("train/weight_decay", decay)
        gradients = [p.grad for p in self.spark.parameters() if p.grad is not None]
        self.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))

    def on_validation_epoch_start(self) -> None:
        """Starts the sums over the validation set."""
        self._sums = torch.zeros(3, dtype=torch.float64)

    def validation_step(self, batch: Tensor, batch_idx: int) -> Mapping[str, Any]:
        """Loss of one batch under masks that are the same in every run and on every process.

        Every process reads the whole set, so the result does not depend on their number.
        """
        generator = mask_generator(self.seed, "val", batch_idx)
        output: SparKOutput = self.spark(batch, generator=generator)
        size = batch.shape[0]
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
