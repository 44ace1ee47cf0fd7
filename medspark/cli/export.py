"""`medspark export`: the encoder of a checkpoint as a plain state_dict."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig


def run(config: DictConfig) -> None:
    """Writes the encoder's weights to `out` and its plan beside them."""
    from medspark.pretrain.export import export_encoder, load_plan

    plan_file = export_encoder(Path(config.checkpoint), Path(config.out), weights=config.weights)
    plan = load_plan(config.out)
    name, kwargs = plan["encoder"]["name"], plan["encoder"]["kwargs"]
    options = "".join(f", {key}={value!r}" for key, value in kwargs.items())
    print(f"weights: {config.out}\nplan:    {plan_file}\n")
    print("Load them into the public network with:")
    print("  from medspark.models import create_encoder")
    print(f"  encoder = create_encoder({name!r}{options})")
    print(f"  encoder.load_state_dict(torch.load({str(config.out)!r}, weights_only=True))")
