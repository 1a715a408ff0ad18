"""The linear layers of the Flux models: what diffusers and Black Forest Labs call them, and the shape of each.

It knows the architecture, not files: a name that is not in here is one that no Flux model has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

Shape = tuple[int, int]  # (outputs, inputs) of a linear layer


@dataclass(frozen=True)
class Family:
    """One size of Flux. `takes_bfl` and `adapters` say what the software that runs it applies: ComfyUI, or the engine for tinyflux."""

    name: str
    hidden: int
    double_blocks: int
    single_blocks: int
    context: int  # width of the text tokens
    pooled: int  # width of the pooled text
    takes_bfl: bool
    adapters: frozenset[str]
    latent: int = 64  # packed channels in and out
    frequencies: int = 256  # of the embedding of time and of guidance


FLUX1 = Family("flux1", 3072, 19, 38, 4096, 768, takes_bfl=True, adapters=frozenset({"lora", "loha", "lokr"}))
TINYFLUX = Family("tinyflux", 160, 2, 5, 128, 64, takes_bfl=False, adapters=frozenset({"lora"}))
FAMILIES = {family.name: family for family in (FLUX1, TINYFLUX)}

# Where a diffusers name and a BFL name differ, both layers are still the same one; q, k and v are three slices of one BFL layer,
# which ComfyUI patches slice by slice. Shapes are in units of the hidden width.
DOUBLE_PAIRS = {
    "attn.to_out.0": ("img_attn.proj", 1, 1),
    "attn.to_add_out": ("txt_attn.proj", 1, 1),
    "norm1.linear": ("img_mod.lin", 6, 1),
    "norm1_context.linear": ("txt_mod.lin", 6, 1),
    "ff.net.0.proj": ("img_mlp.0", 4, 1),
    "ff.net.2": ("img_mlp.2", 1, 4),
    "ff_context.net.0.proj": ("txt_mlp.0", 4, 1),
    "ff_context.net.2": ("txt_mlp.2", 1, 4),
}
DOUBLE_SLICES = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
DOUBLE_FUSED = {"img_attn.qkv": 3, "txt_attn.qkv": 3}
SINGLE_PAIRS = {"norm.linear": ("modulation.lin", 3, 1), "proj_out": ("linear2", 1, 5)}
SINGLE_SLICES = {"attn.to_q": 1, "attn.to_k": 1, "attn.to_v": 1, "proj_mlp": 4}
SINGLE_FUSED = {"linear1": 7}


def list_outer_layers(family: Family) -> Iterator[tuple[str, str, Shape]]:
    """(diffusers name, BFL name, shape) of the layers outside the blocks."""
    hidden, embed = family.hidden, "time_text_embed"
    yield "x_embedder", "img_in", (hidden, family.latent)
    yield "context_embedder", "txt_in", (hidden, family.context)
    yield "norm_out.linear", "final_layer.adaLN_modulation.1", (2 * hidden, hidden)
    yield "proj_out", "final_layer.linear", (family.latent, hidden)
    for theirs, ours, width in (
        ("timestep_embedder", "time_in", family.frequencies),
        ("guidance_embedder", "guidance_in", family.frequencies),
        ("text_embedder", "vector_in", family.pooled),
    ):
        yield f"{embed}.{theirs}.linear_1", f"{ours}.in_layer", (hidden, width)
        yield f"{embed}.{theirs}.linear_2", f"{ours}.out_layer", (hidden, hidden)


@cache
def map_diffusers_layers(family: Family) -> dict[str, Shape]:
    """Every linear layer by its diffusers name."""
    hidden = family.hidden
    layers = {name: shape for name, _, shape in list_outer_layers(family)}
    for index in range(family.double_blocks):
        block = f"transformer_blocks.{index}"
        layers |= {f"{block}.{name}": (hidden, hidden) for name in DOUBLE_SLICES}
        layers |= {f"{block}.{name}": (out * hidden, into * hidden) for name, (_, out, into) in DOUBLE_PAIRS.items()}
    for index in range(family.single_blocks):
        block = f"single_transformer_blocks.{index}"
        layers |= {f"{block}.{name}": (out * hidden, hidden) for name, out in SINGLE_SLICES.items()}
        layers |= {f"{block}.{name}": (out * hidden, into * hidden) for name, (_, out, into) in SINGLE_PAIRS.items()}
    return layers


@cache
def map_bfl_layers(family: Family) -> dict[str, Shape]:
    """Every linear layer by its name in Black Forest Labs' own code, which ComfyUI's model keeps."""
    hidden = family.hidden
    layers = {name: shape for _, name, shape in list_outer_layers(family)}
    for index in range(family.double_blocks):
        block = f"double_blocks.{index}"
        layers |= {f"{block}.{name}": (out * hidden, hidden) for name, out in DOUBLE_FUSED.items()}
        layers |= {f"{block}.{name}": (out * hidden, into * hidden) for name, out, into in DOUBLE_PAIRS.values()}
    for index in range(family.single_blocks):
        block = f"single_blocks.{index}"
        layers |= {f"{block}.{name}": (out * hidden, hidden) for name, out in SINGLE_FUSED.items()}
        layers |= {f"{block}.{name}": (out * hidden, into * hidden) for name, out, into in SINGLE_PAIRS.values()}
    return layers


@cache
def map_twins(family: Family) -> dict[str, str]:
    """BFL name -> diffusers name, of the layers that both have whole."""
    twins = {bfl: diffusers for diffusers, bfl, _ in list_outer_layers(family)}
    for index in range(family.double_blocks):
        twins |= {f"double_blocks.{index}.{bfl}": f"transformer_blocks.{index}.{name}" for name, (bfl, _, _) in DOUBLE_PAIRS.items()}
    for index in range(family.single_blocks):
        twins |= {f"single_blocks.{index}.{bfl}": f"single_transformer_blocks.{index}.{name}" for name, (bfl, _, _) in SINGLE_PAIRS.items()}
    return twins
