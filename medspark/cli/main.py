"""The console: ``medspark <command> [key=value ...]``.

Each command is a hydra application of its own; this module only finds it, so that
`medspark --help` and a mistyped command answer at once, without importing torch.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command: the module that runs it, a line of help and a line to copy."""

    module: str
    summary: str
    example: str


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "medspark.cli.demo",
        "the whole chain on small synthetic CTs in a few minutes; start here",
        "medspark demo",
    ),
    "prepare": Command(
        "medspark.cli.prepare",
        "read DICOM, NIfTI, NRRD, MHA into a store of compressed int16 HU volumes",
        "medspark prepare source=scans store=store spacing=[2,2,2]",
    ),
    "pretrain": Command(
        "medspark.cli.pretrain",
        "pre-train a 3D CNN on the store by masked modelling, no labels needed",
        "medspark pretrain data.store=store model=resnet18 trainer.max_steps=2000",
    ),
    "views": Command(
        "medspark.cli.views",
        "picture of the views that contrastive methods compare, to look at before a run",
        "medspark views store=store out=views.png views=simclr",
    ),
    "reconstruct": Command(
        "medspark.cli.reconstruct",
        "picture of a volume: input, masked, what the pre-trained network fills in",
        "medspark reconstruct checkpoint=last.ckpt volume=scan.nii.gz out=panel.png",
    ),
    "export": Command(
        "medspark.cli.export",
        "write the encoder as a plain state_dict for MONAI or nnU-Net",
        "medspark export checkpoint=last.ckpt out=encoder.pt",
    ),
    "finetune": Command(
        "medspark.cli.finetune",
        "train a classifier on few labels, from a checkpoint or from scratch",
        "medspark finetune task=lesions checkpoint=encoder.pt mode=full seeds=[0,1,2]",
    ),
    "predict": Command(
        "medspark.cli.predict",
        "use a trained classifier on a folder of CTs: a row for each scan and window",
        "medspark predict checkpoint=best.ckpt source=scans out=predictions.csv",
    ),
    "info": Command(
        "medspark.cli.info",
        "versions, CPU features, CUDA build and devices (--json for machines)",
        "medspark info",
    ),
}

# `info` parses its own flags; every other command is a hydra application.
_PLAIN = frozenset({"info"})


def usage() -> str:
    """The text of `medspark --help`."""
    lines = [
        "medspark: pre-train 3D CNNs on unlabelled CT, then fine-tune them on few labels.",
        "",
        "usage: medspark <command> [key=value ...]",
        "",
        "commands, in the order of a project:",
    ]
    for name, command in COMMANDS.items():
        lines += [f"  {name:<12} {command.summary}", f"  {'':<12} $ {command.example}"]
    lines += [
        "",
        "options:",
        "  key=value goes after the command and overrides one setting of its config (hydra):",
        "    medspark pretrain data.store=store optim.lr=1e-3     one value, by its dotted name",
        "    medspark pretrain data.store=store model=resnet50    another option of a group",
        "    medspark pretrain data.store=store debug=fast        a few steps, to try things",
        "  medspark <command> --help     explains every setting of that command",
        "  medspark <command> --cfg job  prints the configuration it would run with",
        "  A key that does not exist is an error. Each run keeps its resolved configuration beside",
        "  its results, by default in runs/<command>/<date_time>.",
        "  HYDRA_FULL_ERROR=1 in the environment shows the traceback of an error.",
    ]
    return "\n".join(lines)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, COMMANDS, n=2, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return (
        f"medspark: error: there is no command {name!r}.{hint}\n"
        f"commands: {', '.join(COMMANDS)}\n"
        "See `medspark --help`."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: command and its arguments; `sys.argv[1:]` where None.

    Returns:
        The exit status: 0 for success, 1 where the command failed, 2 for an unknown command.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args:
        print(usage(), file=sys.stderr)
        return 2
    if args[0] in {"-h", "--help", "help"}:
        print(usage())
        return 0
    if args[0] == "--version":
        from medspark import __version__

        print(f"medspark {__version__}")
        return 0
    if args[0] not in COMMANDS:
        print(_unknown(args[0]), file=sys.stderr)
        return 2
    # Threads that wait sleep instead of spinning. On a busy machine spinning doubled the time of a
    # training step; it has to be said before OpenMP is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    module = importlib.import_module(COMMANDS[args[0]].module)
    if args[0] in _PLAIN:
        return int(module.main(args[1:]))
    from medspark.cli.app import run_app

    return run_app(args[0], module.run, args[1:])


if __name__ == "__main__":
    sys.exit(main())
