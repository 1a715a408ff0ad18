"""What trainers call the tensors of a LoRA, and which of those names ComfyUI's Flux loader applies.

A key is a layer's name, in one of many spellings, and an ending that says which part of the change it is. It knows no bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from trainer_worker.lora_flux import Family, Shape, map_bfl_layers, map_diffusers_layers, map_twins

Prefixes = tuple[tuple[str, bool, str], ...]

APPLIED = frozenset({"diffusers", "diffusers_updown", "kohya", "bfl", "lycoris", "onetrainer"})

# (prefix, dots between the parts of a name?, naming). Seen in files of diffusers, PEFT, SimpleTuner, kohya, OneTrainer and ai-toolkit.
DIFFUSERS_PREFIXES = (
    ("transformer.", True, "diffusers"),
    ("lycoris_", False, "lycoris"),
    ("lora_transformer_", False, "onetrainer"),
    ("", True, "bare_diffusers"),
    ("base_model.model.", True, "peft_base_model"),
    ("base_model.model.transformer.", True, "peft_base_model"),
    ("unet.", True, "unet"),
    ("unet.base_model.model.", True, "unet"),
    ("diffusion_model.", True, "bfl_diffusers"),  # SimpleTuner's checkpoints with lora_format comfyui
    ("lora_unet_", False, "kohya_diffusers"),
)
BFL_PREFIXES = (
    ("diffusion_model.", True, "bfl"),
    ("lora_unet_", False, "kohya"),
    ("", True, "bare_bfl"),
    ("base_model.model.", True, "peft_base_model"),
    ("transformer.", True, "diffusers_bfl"),
    ("unet.", True, "unet"),
    ("model.diffusion_model.", True, "checkpoint_bfl"),
    ("lycoris_", False, "lycoris_bfl"),
    ("lora_transformer_", False, "onetrainer_bfl"),
)
# Ending -> (part, the ending to publish). Endings that only ComfyUI understands are published as the ones that everybody does.
ENDINGS = {
    ".lora_A.weight": ("down", ".lora_A.weight"),
    ".lora_B.weight": ("up", ".lora_B.weight"),
    ".lora_A.default.weight": ("down", ".lora_A.default.weight"),
    ".lora_B.default.weight": ("up", ".lora_B.default.weight"),
    ".lora_down.weight": ("down", ".lora_down.weight"),
    ".lora_up.weight": ("up", ".lora_up.weight"),
    ".lora.down.weight": ("down", ".lora.down.weight"),
    ".lora.up.weight": ("up", ".lora.up.weight"),
    ".lora_linear_layer.down.weight": ("down", ".lora_A.weight"),
    ".lora_linear_layer.up.weight": ("up", ".lora_B.weight"),
    ".lora_A": ("down", ".lora_A.weight"),
    ".lora_B": ("up", ".lora_B.weight"),
    ".alpha": ("alpha", ".alpha"),
    ".dora_scale": ("dora_scale", ".dora_scale"),
    **{f".hada_{part}": (f"hada_{part}", f".hada_{part}") for part in ("w1_a", "w1_b", "w2_a", "w2_b")},
    **{f".lokr_{part}": (f"lokr_{part}", f".lokr_{part}") for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
}
NAMED_ADAPTER = re.compile(r"\.lora_([AB])\.[\w-]{1,64}\.weight\Z")
UP_DOWN = re.compile(r"\.lora[._](up|down)\.weight\Z")
# Parts that change what the others mean. Without them the LoRA would be applied, but wrongly.
UNSUPPORTED = re.compile(
    r"\.(lora_magnitude_vector(\..*)?|lora_[AB](\.\w+)?\.bias|lora_mid\.weight|reshape_weight|diff|diff_b|set_weight|[wb]_norm"
    r"|hada_t[12]|lokr_t2|[ab][12]\.weight|oft_blocks|oft_diag|boft_\w+|rescale)\Z"
)
TEXT_ENCODER = re.compile(r"lora_te\d?_|text_encoders?\.|text_encoder_\d\.|text_encoders?_")
# Names that other models have and Flux has not; the first that matches says whose file it is.
OTHER_FAMILIES = (
    ("sdxl or sd15", re.compile(r"(^|[._])((down|input|up|output)_blocks|mid_block|middle_block)[._]")),
    ("flux2", re.compile(r"to_qkv_mlp_proj|(double|single)_stream_modulation|ff(_context)?[._]linear_(in|out)")),
    ("qwen_image", re.compile(r"transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)")),
    ("wan", re.compile(r"(^|[._])blocks[._]\d+[._](self|cross)_attn")),
    ("hunyuan_video", re.compile(r"token_refiner|double_blocks\.\d+\.(img|txt)_attn_(qkv|proj)")),
    ("sd3", re.compile(r"joint_blocks|transformer_blocks[._]\d+[._]attn2")),
    ("ltx_video", re.compile(r"transformer_blocks[._]\d+[._]attn1")),
)
BLOCK = re.compile(r"(?:^|[._])(double_blocks|transformer_blocks|single_blocks|single_transformer_blocks)[._](\d+)[._]")


@dataclass(frozen=True)
class Key:
    """A key taken apart: `layer` in the sender's spelling, `part` of the change, `ending` as it will be published."""

    layer: str
    part: str
    ending: str


@dataclass(frozen=True)
class LayerName:
    """What a spelling means: `layer` is one name per layer, `published` the spelling to write, the same one where ComfyUI applies it."""

    naming: str
    layer: str
    published: str
    shape: Shape


def split_key(key: str) -> Key | None:
    """None when the ending is not that of a low-rank change."""
    for ending, (part, published) in ENDINGS.items():
        if key.endswith(ending):
            return Key(key.removesuffix(ending), part, published)
    if match := NAMED_ADAPTER.search(key):
        part = {"A": "down", "B": "up"}[match[1]]
        return Key(key[: match.start()], part, f".lora_{match[1]}.weight")
    return None


@cache
def spell_layers(family: Family) -> dict[str, LayerName]:
    """Every spelling of every layer of the family. Where two namings spell alike, the applied one wins."""
    spellings: dict[str, LayerName] = {}
    twins = map_twins(family)
    sides: list[tuple[Prefixes, dict[str, Shape], str]] = [(DIFFUSERS_PREFIXES, map_diffusers_layers(family), "transformer.")]
    if family.takes_bfl:
        sides.append((BFL_PREFIXES, map_bfl_layers(family), "diffusion_model."))
    for prefixes, layers, applied_prefix in sides:
        for prefix, dotted, naming in prefixes:
            for layer, shape in layers.items():
                spelling = prefix + (layer if dotted else layer.replace(".", "_"))
                published = spelling if naming in APPLIED else applied_prefix + layer
                if naming in APPLIED or spelling not in spellings:
                    spellings[spelling] = LayerName(naming, twins.get(layer, layer), published, shape)
    return spellings


def name_other_family(layers: Iterable[str], family: Family | None) -> str | None:
    """Whose file it is, when names or block numbers tell that it is not for `family`."""
    layers = list(layers)
    for name, names in OTHER_FAMILIES:
        if any(names.search(layer) for layer in layers):
            return name
    blocks = [(match[1], int(match[2][:9])) for layer in layers if (match := BLOCK.search(layer))]
    double = max((number for kind, number in blocks if not kind.startswith("single")), default=-1)
    single = max((number for kind, number in blocks if kind.startswith("single")), default=-1)
    if family is None or (double < family.double_blocks and single < family.single_blocks):
        return None
    return "hunyuan_video" if double < 20 and single < 40 else f"a model of more blocks than {family.name}"
