"""Starting an encoder from weights of others, or of ours, with a full account of what fitted."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from medspark.models.fit import INFLATIONS, fit, same
from medspark.models.weight_files import flat_tensors, load_content
from medspark.models.weight_names import Match, Slot, find_matches, find_rivals, find_slots

LEAST_SHARE = 0.8
_SHOWN = 4


@dataclass(frozen=True)
class WeightReport:
    """What of a file went into an encoder; ``str()`` is a summary to read.

    Attributes:
        file: name of the file.
        network: class of the encoder.
        prefix: what stood before the encoder's names in the file, names of wrapping dicts included.
        loaded: the encoder's tensors that came from the file.
        inflated: those of them that were made 3D from 2D.
        adapted: tensor -> what else was done to it.
        missing: tensor of the encoder that stayed as it was -> why.
        unused: tensors of the file that were not needed.
        share: part of the encoder's kernels and matrices that came from the file, 0..1.
        rivals: other prefixes below which as much fits, with other values.
    """

    file: str
    network: str
    prefix: str
    loaded: tuple[str, ...]
    inflated: tuple[str, ...]
    adapted: dict[str, str]
    missing: dict[str, str]
    unused: tuple[str, ...]
    share: float
    rivals: tuple[str, ...]

    def __str__(self) -> str:
        """A line for each kind, with the first names of it."""
        below = f", below {self.prefix!r}" if self.prefix else ""
        lines = [
            f"{self.share:.0%} of the kernels of this {self.network} come from {self.file}{below}",
            f"  loaded:   {len(self.loaded)} tensors",
            f"  inflated: {_some(self.inflated)}",
            f"  adapted:  {_some([f'{k} ({v})' for k, v in self.adapted.items()])}",
            f"  missing:  {_some([f'{k} ({v})' for k, v in self.missing.items()])}",
            f"  unused:   {_some(self.unused)}",
        ]
        if any(".downsample." in name for name in self.missing):
            lines.append(
                "  note: the encoder has shortcut convolutions that the file lacks; for weights of "
                "type A (MedicalNet's ResNet-18 and -34) build it with shortcut_type='A'"
            )
        if self.rivals:
            lines.append(f"  note: other weights fit as well, below {_some(self.rivals)}")
        return "\n".join(lines)


def init_from(
    encoder: nn.Module,
    path: str | os.PathLike[str],
    *,
    inflate: str = "centre",
    prefix: str | None = None,
) -> WeightReport:
    """Puts the weights of a file into ``encoder``, in place; all that fit, or none.

    Reads exports and checkpoints of medspark (pre-training and classifier), and any nested dict of
    tensors: MedicalNet (arXiv 1904.00625), torchvision and timm ResNets, nnU-Net, nnssl, VoCo, also
    where DDP, Lightning or ``torch.compile`` wrapped them. The prefix of the encoder's names is the
    one below which most of its tensors fit. 2D kernels are inflated for a 3D encoder, stems on
    colours summed for grey input (see ``medspark.models.fit``). Biases of convolutions that the
    file lacks become 0, which is what a convolution without bias computes.

    ``inflate="centre"`` is the default because it is exact at borders and beside hidden cells too,
    so the file's batch norm statistics stay right however small the crop. ``"mean"`` loses what its
    kernels reach beyond them (a third, at the border of 3 voxels), but looks at every slice at once,
    where ``"centre"`` passes over those between its strides until training has filled the kernels.

    Args:
        encoder: network of any kind, 2D or 3D, on any device.
        path: file of torch or safetensors; its content decides, not its name.
        inflate: ``"centre"`` or ``"mean"``.
        prefix: what stands before the encoder's names in the file, such as
            ``"state_dict.encoder_k"``; found where None.

    Returns:
        What was loaded and what was not: print it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file of weights, a hostile one, values that are not finite, or less than 80 %
            of the encoder's kernels and matrices in it. The encoder is unchanged then.
        ImportError: a safetensors file without its package.
    """
    if inflate not in INFLATIONS:
        raise ValueError(f"inflate must be one of {', '.join(INFLATIONS)}, not {inflate!r}")
    source = Path(path)
    content = load_content(source)
    tensors = flat_tensors(content)
    slots = find_slots(encoder)
    matches = find_matches(slots, tensors, _told_prefix(content), prefix)
    best = matches[0] if matches else Match("", {name: name for s in slots for name in s.names})
    filling = _Filling(encoder, slots, tensors, best)
    share = filling.check_share(source)
    values = filling.values(inflate, source)
    with torch.no_grad():
        for slot, value in values:
            slot.tensor.copy_(value)
    return filling.report(source, share, tuple(find_rivals(slots, tensors, matches)))


class _Filling:
    """One encoder, one file, and which tensor goes where."""

    def __init__(
        self,
        encoder: nn.Module,
        slots: Sequence[Slot],
        tensors: Mapping[str, Tensor],
        match: Match,
    ) -> None:
        self.network = type(encoder).__name__
        self.slots, self.tensors, self.match = slots, tensors, match
        self.problems = {slot.name: match.problem(slot, tensors) for slot in slots}
        self.inflated: list[str] = []
        self.adapted: dict[str, str] = {}

    def check_share(self, source: Path) -> float:
        """Part of the kernels and matrices that the file fills.

        Raises:
            ValueError: too little.
        """
        kernels = [slot.name for slot in self.slots if slot.tensor.ndim > 1]
        bad = [f"{name}: {self.problems[name]}" for name in kernels if self.problems[name]]
        good = len(kernels) - len(bad)
        if good >= LEAST_SHARE * len(kernels):
            return good / len(kernels)
        below = f" below {self.match.prefix!r}" if self.match.prefix else ""
        raise ValueError(
            f"{source} fills {good} of the {len(kernels)} kernels of this {self.network}{below}; "
            f"at least {LEAST_SHARE:.0%} must fit. First that do not: {'; '.join(bad[:_SHOWN])}. "
            f"The file has {_some(self.tensors)}. Build the network that the file is of (depth, "
            "width, kernels, shortcut_type), or give the prefix of its names"
        )

    def values(self, inflation: str, source: Path) -> list[tuple[Slot, Tensor]]:
        """What to write where.

        Raises:
            ValueError: values that are not finite, or a negative variance.
        """
        found = []
        for slot in self.slots:
            if self.problems[slot.name] is None:
                value = self._value(slot, inflation)
                _check_value(slot.name, value, source)
                found.append((slot, value))
            elif self._is_absent_bias(slot):
                self.adapted[slot.name] = "not in the file, set to 0"
                found.append((slot, torch.zeros_like(slot.tensor)))
        return found

    def _value(self, slot: Slot, inflation: str) -> Tensor:
        key, *aliases = self.match.keys(slot, self.tensors)
        value, inflated, note = fit(self.tensors[key], slot.tensor, inflation)
        if inflated:
            self.inflated.append(slot.name)
        if any(not same(self.tensors[key], self.tensors[alias]) for alias in aliases):
            # nnssl's sparse networks hold a copy that is never trained under the first name.
            note = "; ".join(filter(None, [note, f"differs from {slot.names[0]} in the file"]))
        if note:
            self.adapted[slot.name] = note
        return value

    def _is_absent_bias(self, slot: Slot) -> bool:
        """A bias without key in the file, of a convolution or linear layer that the file has."""
        weight = slot.name.removesuffix("bias") + "weight"
        filled = any(
            other.name == weight and other.tensor.ndim > 1 and self.problems[weight] is None
            for other in self.slots
        )
        return filled and slot.name.endswith("bias") and not self.match.keys(slot, self.tensors)

    def report(self, source: Path, share: float, rivals: tuple[str, ...]) -> WeightReport:
        """The account of it; call ``values`` first."""
        loaded = [slot for slot in self.slots if self.problems[slot.name] is None]
        used = {key for slot in loaded for key in self.match.keys(slot, self.tensors)}
        missing = {
            name: problem
            for name, problem in self.problems.items()
            if problem is not None and name not in self.adapted
        }
        return WeightReport(
            file=source.name,
            network=self.network,
            prefix=self.match.prefix,
            loaded=tuple(slot.name for slot in loaded),
            inflated=tuple(self.inflated),
            adapted=self.adapted,
            missing=missing,
            unused=tuple(key for key in self.tensors if key not in used),
            share=share,
            rivals=rivals,
        )


def _told_prefix(content: Mapping[str, object]) -> str:
    """Prefix that the plan of a checkpoint of ours names, else ""."""
    plan = content.get("plan")
    key = plan.get("encoder_key") if isinstance(plan, Mapping) else None
    return f"state_dict.{key}." if isinstance(key, str) else ""


def _check_value(name: str, value: Tensor, source: Path) -> None:
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise ValueError(f"{source}: {name} holds NaN or infinite values; the file is unusable")
    if name.endswith("running_var") and bool((value < 0).any()):
        raise ValueError(f"{source}: {name} holds negative variances; the file is unusable")


def _some(names: Iterable[str]) -> str:
    """How many there are, and the first of them, short enough for a line."""
    listed = list(names)
    # Names come from files that anyone may have written: no control characters on a terminal.
    safe = [name[:160] if name.isprintable() else ascii(name[:160]) for name in listed[:_SHOWN]]
    shown = ", ".join(safe)
    more = ", ..." if len(listed) > _SHOWN else ""
    return f"{len(listed)}: {shown}{more}" if listed else "none"
