"""Finding an encoder's tensors in a file by name: prefixes, spellings, aliases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from medspark.models.fit import misfit, same

# ResNets cut from torchvision's as nn.Sequential(*children) carry numbers for names.
_NUMBERED = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
# Of two copies that fit equally, these are the averaged, the slow or the aliased one.
_SECOND = ("ema", "encoder_k", "target_network", "momentum", "decoder")
_MOST_PARTS = 64  # of a dotted name; longer ones are no module's


@dataclass(frozen=True)
class Slot:
    """A tensor of the encoder under every name that it has there.

    nnU-Net's blocks register a convolution twice, as ``conv`` and as ``all_modules.0``.
    """

    names: tuple[str, ...]
    tensor: Tensor
    stem: bool

    @property
    def name(self) -> str:
        """The last of the names: the one whose value ``load_state_dict`` leaves behind."""
        return self.names[-1]


@dataclass(frozen=True)
class Match:
    """Where the encoder's names are in a file: below a prefix, in a spelling."""

    prefix: str
    spelling: Mapping[str, str]

    def keys(self, slot: Slot, tensors: Mapping[str, Tensor]) -> list[str]:
        """Keys of the file that hold the slot, the decisive one first."""
        keys = [self.prefix + self.spelling[name] for name in reversed(slot.names)]
        return [key for key in keys if key in tensors]

    def problem(self, slot: Slot, tensors: Mapping[str, Tensor]) -> str | None:
        """Why the slot cannot be filled; None where it can."""
        keys = self.keys(slot, tensors)
        return misfit(tensors[keys[0]], slot.tensor, stem=slot.stem) if keys else "not in the file"


def find_slots(encoder: nn.Module) -> list[Slot]:
    """The tensors of an encoder's ``state_dict``, each once.

    Raises:
        ValueError: one without memory, or no kernel or matrix among them.
    """
    names: dict[int, list[str]] = {}
    found: dict[int, Tensor] = {}
    for name, tensor in encoder.state_dict(keep_vars=True).items():
        if tensor.is_meta:
            raise ValueError(f"{name} of {type(encoder).__name__} is on the meta device")
        names.setdefault(id(tensor), []).append(name)
        found[id(tensor)] = tensor
    stem = next((i for i, tensor in found.items() if tensor.ndim > 2), None)
    slots = [Slot(tuple(names[i]), tensor, i == stem) for i, tensor in found.items()]
    if not any(slot.tensor.ndim > 1 for slot in slots):
        raise ValueError(f"{type(encoder).__name__} has no weights to fill")
    return slots


def find_matches(
    slots: Sequence[Slot], tensors: Mapping[str, Tensor], told: str, wanted: str | None
) -> list[Match]:
    """Every prefix below which names of the encoder occur, that of most fitting tensors first.

    Args:
        slots: of the encoder.
        tensors: of the file.
        told: prefix (with its dot) that wins against equally good ones; "" for none.
        wanted: the only prefix to take, with or without its dot; None for any.
    """
    found: list[tuple[tuple[int, bool, bool], Match]] = []
    for spelling in _spellings([name for slot in slots for name in slot.names]):
        for prefix in _prefixes(set(spelling.values()), tensors):
            if wanted is None or wanted.rstrip(".") == prefix.rstrip("."):
                match = Match(prefix, spelling)
                fitting = sum(match.problem(slot, tensors) is None for slot in slots)
                second = any(part.startswith(_SECOND) for part in prefix.split("."))
                found.append(((fitting, prefix == told, not second), match))
    found.sort(key=lambda entry: entry[0], reverse=True)  # stable: else the order of the file
    return [match for _, match in found]


def find_rivals(
    slots: Sequence[Slot], tensors: Mapping[str, Tensor], matches: Sequence[Match]
) -> list[str]:
    """Prefixes of matches that fill as many slots as the first one, with other values."""
    best = matches[0]
    filled = [slot for slot in slots if best.problem(slot, tensors) is None]
    rivals = []
    for match in matches[1:]:
        if match.prefix == best.prefix or any(match.problem(slot, tensors) for slot in filled):
            continue
        pairs = [(best.keys(s, tensors)[0], match.keys(s, tensors)[0]) for s in filled]
        if not all(same(tensors[a], tensors[b]) for a, b in pairs):
            rivals.append(match.prefix)
    return rivals


def _spellings(names: list[str]) -> list[dict[str, str]]:
    """Ways in which files write the encoder's names: its own, numbered, other shortcuts."""

    def numbered(name: str) -> str:
        head, dot, rest = name.partition(".")
        return _NUMBERED.get(head, head) + dot + rest

    ways = [
        {name: name for name in names},
        {name: numbered(name) for name in names},
        {name: name.replace(".downsample.", ".shortcut.") for name in names},
    ]
    return [way for i, way in enumerate(ways) if way not in ways[:i]]


def _prefixes(names: set[str], keys: Iterable[str], most: int = 64) -> list[str]:
    """Prefixes (with their dot) below which the names occur most often."""
    counts: Counter[str] = Counter()
    for key in keys:
        parts = key.split(".", _MOST_PARTS)
        for i in range(len(parts)):
            if ".".join(parts[i:]) in names:
                counts["".join(part + "." for part in parts[:i])] += 1
    return [prefix for prefix, _ in counts.most_common(most)]
