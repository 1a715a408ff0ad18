"""What training the transformer takes: times, the flow loss, and low-rank layers that are saved as a LoRA file.

Shared by the scripts that made the weights and by whoever trains a LoRA on them; it knows no data set, optimizer or schedule.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from local.tinyflux.grid import RopeTables
from local.tinyflux.transformer import Flux


def draw_times(count: int) -> Tensor:
    """(count,) in 0..1: 75 % logit-normal shifted by 3, as shape and colour are decided at high noise; 25 % uniform."""
    normal = torch.sigmoid(torch.randn(count) * 1.2)
    return torch.where(torch.rand(count) < 0.25, torch.rand(count), 3 * normal / (1 + 2 * normal))


def flow_loss(transformer: Flux, latents: Tensor, text: Tensor, pooled: Tensor, tables: RopeTables) -> Tensor:
    """Mean squared error of the velocity at random times, noise and guidance 1..5, which the distilled weights answer to.

    latents (batch, tokens, 64) packed; text (batch, 24, 128); pooled (batch, 64); tables of the grid that was packed.
    """
    count = len(latents)
    time = draw_times(count)
    noise = torch.randn_like(latents)
    share = time[:, None, None]
    mixed = (1 - share) * latents + share * noise
    velocity = transformer(mixed, text, pooled, time, 1 + 4 * torch.rand(count), tables)
    loss: Tensor = (velocity - (noise - latents)).pow(2).mean()
    return loss


class LoraLinear(nn.Module):
    """A linear layer plus a trainable change of low rank, nil at first."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


LoraLayers = dict[str, LoraLinear]  # by module name, such as transformer_blocks.0.attn.to_q


def attach_lora(transformer: Flux, rank: int) -> LoraLayers:
    """Wrap every attention projection of the transformer, which is changed; the other weights are left to the caller to freeze."""
    targets = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear) and ".attn." in name}
    layers: LoraLayers = {}
    for name, module in targets.items():
        layers[name] = LoraLinear(module, rank)
        parent_name, _, child = name.rpartition(".")
        transformer.get_submodule(parent_name).register_module(child, layers[name])
    return layers


def detach_lora(transformer: Flux, layers: LoraLayers) -> None:
    """Put the wrapped layers back, so that the transformer is as it was."""
    for name, layer in layers.items():
        parent_name, _, child = name.rpartition(".")
        transformer.get_submodule(parent_name).register_module(child, layer.base)


def lora_parameters(layers: LoraLayers) -> Iterator[Tensor]:
    for layer in layers.values():
        yield layer.down.weight
        yield layer.up.weight


def save_lora(path: Path, layers: LoraLayers, metadata: Mapping[str, str]) -> None:
    """Write the names that SimpleTuner writes and ComfyUI accepts; scale 1, as there is no alpha."""
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"transformer.{name}.lora_A.weight"] = layer.down.weight.detach().contiguous()
        tensors[f"transformer.{name}.lora_B.weight"] = layer.up.weight.detach().contiguous()
    save_file(tensors, path, {"format": "pt", **metadata})
