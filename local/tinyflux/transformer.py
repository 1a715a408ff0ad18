"""The rectified-flow transformer.

State-dict keys and arithmetic equal diffusers' FluxTransformer2DModel, so its weight files and LoRA files fit unchanged.
It knows packed latents, not pictures, seeds or schedules.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from local.tinyflux.grid import AXES, RopeTables, rotate
from local.tinyflux.text import RMSNorm

FREQUENCIES = 128  # of the sinusoidal embedding of time and guidance


@dataclass(frozen=True)
class FluxConfig:
    """The fields of diffusers' transformer/config.json."""

    in_channels: int = 64
    num_layers: int = 2
    num_single_layers: int = 5
    attention_head_dim: int = 40
    num_attention_heads: int = 4
    joint_attention_dim: int = 128
    pooled_projection_dim: int = 64
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, int, int] = AXES
    patch_size: int = 1


def normalise(x: Tensor) -> Tensor:
    """Layer norm without weights; the modulation that follows supplies them."""
    return F.layer_norm(x, (x.shape[-1],), eps=1e-6)


class Modulation(nn.Module):
    """`parts` vectors (batch, 1, width) each, computed from the embedding of time, guidance and pooled text."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, parts * width)
        self.parts = parts

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        vectors: Tensor = self.linear(F.silu(embedding))
        return vectors[:, None].chunk(self.parts, -1)


class GeluProjection(nn.Module):
    """The first half of a feed-forward layer; the activation follows in FeedForward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GeluProjection(width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net[2](self.net[0](x))
        return out


class Attention(nn.Module):
    """Self-attention with RMS-normed queries and keys over one token sequence."""

    def __init__(self, width: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = RMSNorm(head_size), RMSNorm(head_size)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_size)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, tables: RopeTables) -> Tensor:
        """(batch, tokens, heads, head size) x 3 -> (batch, tokens, width)."""
        query, key = rotate(query, tables).to(value.dtype), rotate(key, tables).to(value.dtype)
        mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        return mixed.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, tables: RopeTables) -> Tensor:
        query, key = self.norm_q(self.heads(self.to_q(x))), self.norm_k(self.heads(self.to_k(x)))
        return self.attend(query, key, self.heads(self.to_v(x)), tables)


class JointAttention(Attention):
    """Attention over text and picture tokens with separate projections for each."""

    def __init__(self, width: int, head_size: int) -> None:
        super().__init__(width, head_size)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(width, width) for _ in range(3))
        self.norm_added_q, self.norm_added_k = RMSNorm(head_size), RMSNorm(head_size)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_add_out = nn.Linear(width, width)

    def attend_both(self, picture: Tensor, text: Tensor, tables: RopeTables) -> tuple[Tensor, Tensor]:
        query = torch.cat([self.norm_added_q(self.heads(self.add_q_proj(text))), self.norm_q(self.heads(self.to_q(picture)))], 1)
        key = torch.cat([self.norm_added_k(self.heads(self.add_k_proj(text))), self.norm_k(self.heads(self.to_k(picture)))], 1)
        value = torch.cat([self.heads(self.add_v_proj(text)), self.heads(self.to_v(picture))], 1)
        mixed = self.attend(query, key, value, tables)
        text_tokens = text.shape[1]
        return self.to_out[0](mixed[:, text_tokens:]), self.to_add_out(mixed[:, :text_tokens])


class DoubleBlock(nn.Module):
    """Picture and text keep their own weights and meet in the attention."""

    def __init__(self, width: int, head_size: int) -> None:
        super().__init__()
        self.norm1, self.norm1_context = Modulation(width, 6), Modulation(width, 6)
        self.attn = JointAttention(width, head_size)
        self.ff, self.ff_context = FeedForward(width), FeedForward(width)

    def forward(self, picture: Tensor, text: Tensor, embedding: Tensor, tables: RopeTables) -> tuple[Tensor, Tensor]:
        p_shift, p_scale, p_gate, p_ff_shift, p_ff_scale, p_ff_gate = self.norm1(embedding)
        t_shift, t_scale, t_gate, t_ff_shift, t_ff_scale, t_ff_gate = self.norm1_context(embedding)
        picture_change, text_change = self.attn.attend_both(
            normalise(picture) * (1 + p_scale) + p_shift, normalise(text) * (1 + t_scale) + t_shift, tables
        )
        picture = picture + p_gate * picture_change
        picture = picture + p_ff_gate * self.ff(normalise(picture) * (1 + p_ff_scale) + p_ff_shift)
        text = text + t_gate * text_change
        text = text + t_ff_gate * self.ff_context(normalise(text) * (1 + t_ff_scale) + t_ff_shift)
        return picture, text


class SingleBlock(nn.Module):
    """Text and picture as one sequence; attention and feed-forward side by side."""

    def __init__(self, width: int, head_size: int) -> None:
        super().__init__()
        self.norm = Modulation(width, 3)
        self.proj_mlp, self.proj_out = nn.Linear(width, 4 * width), nn.Linear(5 * width, width)
        self.attn = Attention(width, head_size)

    def forward(self, x: Tensor, embedding: Tensor, tables: RopeTables) -> Tensor:
        shift, scale, gate = self.norm(embedding)
        y = normalise(x) * (1 + scale) + shift
        both = torch.cat([self.attn(y, tables), F.gelu(self.proj_mlp(y), approximate="tanh")], -1)
        out: Tensor = x + gate * self.proj_out(both)
        return out


def embed_scalar(value: Tensor) -> Tensor:
    """(batch,) -> (batch, 256) cosines and sines, as for timesteps 0..1000."""
    angles = value.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(FREQUENCIES) / FREQUENCIES)
    return torch.cat([angles.cos(), angles.sin()], -1)


class Embedder(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(inputs, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class ConditionEmbedder(nn.Module):
    """Time, guidance and pooled text -> one vector (batch, width)."""

    def __init__(self, pooled: int, width: int) -> None:
        super().__init__()
        self.timestep_embedder = Embedder(2 * FREQUENCIES, width)
        self.guidance_embedder = Embedder(2 * FREQUENCIES, width)
        self.text_embedder = Embedder(pooled, width)

    def forward(self, time: Tensor, guidance: Tensor, pooled: Tensor) -> Tensor:
        timed: Tensor = self.timestep_embedder(embed_scalar(time * 1000))
        guided: Tensor = self.guidance_embedder(embed_scalar(guidance * 1000))
        texted: Tensor = self.text_embedder(pooled)
        return timed + guided + texted


class Flux(nn.Module):
    def __init__(self, config: FluxConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or FluxConfig()
        head_size = config.attention_head_dim
        width = head_size * config.num_attention_heads
        self.time_text_embed = ConditionEmbedder(config.pooled_projection_dim, width)
        self.context_embedder, self.x_embedder = nn.Linear(config.joint_attention_dim, width), nn.Linear(config.in_channels, width)
        self.transformer_blocks = nn.ModuleList([DoubleBlock(width, head_size) for _ in range(config.num_layers)])
        self.single_transformer_blocks = nn.ModuleList([SingleBlock(width, head_size) for _ in range(config.num_single_layers)])
        self.norm_out, self.proj_out = Modulation(width, 2), nn.Linear(width, config.in_channels)

    def forward(self, latents: Tensor, text: Tensor, pooled: Tensor, time: Tensor, guidance: Tensor, tables: RopeTables) -> Tensor:
        """Predict the velocity noise - picture.

        latents (batch, tokens, 64) packed; text (batch, text tokens, 128); pooled (batch, 64); time (batch,) in 0..1, 1 being noise;
        guidance (batch,) as the user writes it (3.5); tables from `rope_tables` of the grid that was packed.
        """
        embedding = self.time_text_embed(time, guidance, pooled)
        x, text = self.x_embedder(latents), self.context_embedder(text)
        for block in self.transformer_blocks:
            x, text = block(x, text, embedding, tables)
        text_tokens = text.shape[1]
        x = torch.cat([text, x], 1)
        for block in self.single_transformer_blocks:
            x = block(x, embedding, tables)
        scale, shift = self.norm_out(embedding)
        velocity: Tensor = self.proj_out(normalise(x[:, text_tokens:]) * (1 + scale) + shift)
        return velocity
