"""LoRA files: reading the names that trainers write, and a transformer with several of them merged in.

Accepted, as by ComfyUI for Flux: `transformer.<module>` with lora_A/lora_B, lora_A.default, lora_down/lora_up or lora.down/lora.up,
and `lycoris_<module>` or `lora_transformer_<module>` with underscores; an optional `.alpha` beside each pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from local.tinyflux.transformer import Flux

PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
)


@dataclass(frozen=True)
class LowRankChange:
    """up (outputs, rank) @ down (rank, inputs) * scale is added to a weight at strength 1."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class Lora:
    changes: dict[str, LowRankChange]  # by module name, such as transformer_blocks.0.attn.to_q
    unknown_keys: tuple[str, ...]  # of the file, in its order: nothing of this model fits them


def module_names(transformer: Flux) -> dict[str, str]:
    """Every way a file may call a linear layer -> the layer's own name."""
    names: dict[str, str] = {}
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            flat = name.replace(".", "_")
            names |= {f"transformer.{name}": name, f"lycoris_{flat}": name, f"lora_transformer_{flat}": name}
    return names


def read_lora(path: Path, transformer: Flux) -> Lora:
    """Read a file and match it; raises safetensors' own error when it is unreadable."""
    tensors = load_file(path)
    names = module_names(transformer)
    changes: dict[str, LowRankChange] = {}
    used: set[str] = set()
    for key in tensors:
        for down_end, up_end in PAIRS:
            stem = key.removesuffix(down_end)
            if stem == key or stem not in names:
                continue
            change = pair_up(tensors, key, stem + up_end, stem + ".alpha")
            if change is not None and fits(change, transformer, names[stem]):
                changes[names[stem]] = change
                used |= {key, stem + up_end, stem + ".alpha"}
    return Lora(changes, tuple(key for key in tensors if key not in used))


def pair_up(tensors: dict[str, Tensor], down_key: str, up_key: str, alpha_key: str) -> LowRankChange | None:
    """Both halves of one layer's change; without alpha the scale is 1."""
    if up_key not in tensors:
        return None
    down, up = tensors[down_key].float(), tensors[up_key].float()
    scale = float(tensors[alpha_key]) / len(down) if alpha_key in tensors else 1.0
    return LowRankChange(down, up, scale)


def fits(change: LowRankChange, transformer: Flux, module: str) -> bool:
    if change.down.ndim != 2 or change.up.ndim != 2 or change.up.shape[1] != change.down.shape[0]:
        return False
    return (change.up.shape[0], change.down.shape[1]) == tuple(transformer.get_parameter(f"{module}.weight").shape)


@torch.no_grad()
def merge_loras(transformer: Flux, loras: Sequence[tuple[Lora, float]]) -> Flux:
    """A transformer with each (lora, strength) added in order; the given one is left as it is, unchanged weights are shared.

    Strength 0 adds nothing, so its result has the same bytes as no LoRA.
    """
    weights = dict(transformer.state_dict())
    for lora, strength in loras:
        if strength == 0:
            continue
        for module, change in lora.changes.items():
            key = f"{module}.weight"
            weights[key] = weights[key] + strength * change.scale * (change.up @ change.down)
    with torch.device("meta"):
        merged = Flux(transformer.config)
    merged.load_state_dict(weights, assign=True)
    return merged.requires_grad_(False).eval()
