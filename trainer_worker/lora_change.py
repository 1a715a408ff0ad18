"""One layer's change inside a LoRA: which parts belong together, and whether they fit the layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod

from trainer_worker.lora_file import Tensor, refuse
from trainer_worker.lora_flux import Family
from trainer_worker.lora_keys import UP_DOWN, LayerName, spell_layers, split_key
from trainer_worker.lora_tensors import FLOATS

HALVES = {"lora": ("down", "up"), "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")}


@dataclass
class Change:
    """`parts` by what they are; `spelling` is the sender's name of the layer."""

    spelling: str
    name: LayerName
    parts: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)  # part -> the key to publish

    @property
    def adapters(self) -> set[str]:
        kinds = {"lokr": "lokr", "hada": "loha", "down": "lora", "up": "lora"}
        return {kinds[stem] for part in self.parts if (stem := part.partition("_")[0]) in kinds}

    @property
    def adapter(self) -> str:
        return min(self.adapters, default="lora")

    @property
    def naming(self) -> str:
        is_up_down = any(UP_DOWN.search(tensor.key) for tensor in self.parts.values())
        return "diffusers_updown" if self.name.naming == "diffusers" and is_up_down else self.name.naming

    @property
    def rank(self) -> int | None:
        inner = self.parts.get({"lora": "down", "loha": "hada_w1_b", "lokr": "lokr_w2_b"}[self.adapter])
        return inner.shape[0] if inner else None

    def weights(self) -> Iterable[Tensor]:
        """The parts that are multiplied: zeros in one of them make the whole change nothing."""
        return (tensor for part, tensor in self.parts.items() if part not in ("alpha", "dora_scale"))

    def fits(self) -> bool:
        """Whether the parts multiply to the layer's shape. Only for complete changes."""
        outputs, inputs = self.name.shape
        sides = {part: flatten(tensor.shape) for part, tensor in self.parts.items()}
        scale = self.parts.get("dora_scale")
        if scale is not None and scale.shape not in ((outputs, 1), (1, inputs)):
            return False
        if self.adapter == "lokr":
            first, second = span(sides, "lokr_w1"), span(sides, "lokr_w2")
            return bool(first and second and first[0] * second[0] == outputs and first[1] * second[1] == inputs)
        pairs = (("up", "down"),) if self.adapter == "lora" else (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))
        return all(multiply(sides[left], sides[right]) == (outputs, inputs) for left, right in pairs)

    def is_complete(self) -> bool:
        if self.adapter == "lokr":
            return all(f"lokr_{w}" in self.parts or {f"lokr_{w}_a", f"lokr_{w}_b"} <= self.parts.keys() for w in ("w1", "w2"))
        return all(part in self.parts for part in HALVES[self.adapter])


def flatten(shape: tuple[int, ...]) -> tuple[int, int]:
    """A matrix, as ComfyUI flattens it: all sides but the first are one."""
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def multiply(left: tuple[int, int], right: tuple[int, int]) -> tuple[int, int] | None:
    return (left[0], right[1]) if left[1] == right[0] else None


def span(sides: dict[str, tuple[int, int]], name: str) -> tuple[int, int] | None:
    """The shape of one factor of a Kronecker product, given whole or as two halves."""
    return sides.get(name) or multiply(sides[f"{name}_a"], sides[f"{name}_b"])


def collect_changes(tensors: Iterable[Tensor], family: Family) -> tuple[dict[str, Change], list[Tensor]]:
    """(changes by layer, the tensors that fit no layer of the family). Raises LoraRefused on ambiguity."""
    spellings = spell_layers(family)
    changes: dict[str, Change] = {}
    strangers = []
    for tensor in tensors:
        key = split_key(tensor.key)
        name = spellings.get(key.layer) if key else None
        if key is None or name is None:
            strangers.append(tensor)
            continue
        change = changes.setdefault(name.layer, Change(key.layer, name))
        if change.spelling != key.layer or key.part in change.parts:
            other = next(iter(change.parts.values()))
            refuse("lora_duplicate_key", f"{tensor.key} and {other.key} change the same layer.", key=tensor.key, other=other.key)
        change.parts[key.part] = tensor
        change.keys[key.part] = name.published + key.ending
    return changes, strangers


def check_change(change: Change, family: Family) -> None:
    """Raises LoraRefused when the change would not be applied as its trainer meant it."""
    layer = change.spelling
    if len(change.adapters) > 1 or change.adapter not in family.adapters:
        found, allowed = " and ".join(sorted(change.adapters)), ", ".join(sorted(family.adapters))
        refuse("lora_unsupported", f"{layer} is a {found} change; {family.name} takes one of {allowed}.", layer=layer)
    if not change.is_complete():
        keys = sorted(tensor.key for tensor in change.parts.values())
        refuse("lora_unpaired", f"{layer} lacks a part: it has only {', '.join(keys)}.", "Export the LoRA again.", layer=layer, keys=keys)
    for tensor in change.weights():
        if tensor.dtype not in FLOATS:
            refuse("lora_unknown_dtype", f"{tensor.key} is {tensor.dtype}; weights are floats.", key=tensor.key, allowed=sorted(FLOATS))
    if not change.fits():
        shapes = {part: list(tensor.shape) for part, tensor in change.parts.items()}
        message = f"{layer} does not fit: {family.name}'s layer has {change.name.shape[0]} outputs and {change.name.shape[1]} inputs."
        refuse("lora_shape_mismatch", message, layer=layer, expected=list(change.name.shape), shapes=shapes)
