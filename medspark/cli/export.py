"""`medspark export`: the encoder of a checkpoint for MONAI or nnU-Net."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig


def run(config: DictConfig) -> None:
    """Writes the encoder's weights to `out`, its plan and its card beside them."""
    from medspark.pretrain.export import card_path, export_encoder

    plan_file = export_encoder(
        Path(config.checkpoint),
        Path(config.out),
        weights=config.weights,
        target=config.target,
        data_name=config.data_name,
        data_licence=config.data_licence,
        seed=config.seed,
    )
    card = card_path(config.out)
    print(f"weights: {config.out}\nplan:    {plan_file}\ncard:    {card}\n")
    if config.data_licence is None:
        print("The card says that the licence of the data is not stated (data_licence=...).")
    if config.target == "nnunet":
        print("Start nnU-Net from them, with the plans entries that the card lists:")
        print(f"  nnUNetv2_train ... -pretrained_weights {config.out}")
    else:
        print("The card shows the lines that load them into the public network.")
