"""One process of a pre-training under torchrun, or all of it alone: `ddp_run.py FOLDER BATCH`.

Float64, so that what remains between two processes and one is the order of sums.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from medspark.models import spark_spec
from medspark.pretrain.run import pretrain

SPEC = spark_spec(
    "resnet10",
    encoder_kwargs={"block_inplanes": [4, 4, 8, 8], "feed_forward": False},
    width=32,
    cell=16,
)


class Volumes(Dataset):
    def __init__(self, length: int, seed: int, log: Path) -> None:
        self.length, self.seed, self.log = length, seed, log

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> Tensor:
        with self.log.open("a") as file:
            file.write(f"{i}\n")
        g = torch.Generator().manual_seed(self.seed * 1000 + i)
        x = torch.randn(1, 1, 4, 4, 4, generator=g, dtype=torch.float64)
        return torch.nn.functional.interpolate(x, scale_factor=8, mode="trilinear")[0]


def main(folder: Path, batch: int) -> None:
    torch.set_num_threads(1)
    world, rank = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", "1"), ("RANK", "0")))
    folder.mkdir(parents=True, exist_ok=True)
    result = pretrain(
        SPEC,
        Volumes(99, 1, folder / f"read_{rank}.txt"),
        Volumes(3, 2, folder / f"val_{rank}.txt"),
        max_steps=4,
        batch_size=batch // world,
        out_dir=folder,
        lr=1e-2,
        optim={"name": "lamb", "weight_decay_end": 0.2, "drop_path": 0.4, "lr_batch": 4},
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        precision="64-true",
        ema_decay=0.5,
        val_every=2,
        log_every=1,
        seed=5,
        progress_bar=False,
        resume="auto",
    )
    (folder / f"metrics_{rank}.json").write_text(json.dumps(result.metrics))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
