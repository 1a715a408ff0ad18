"""The two text encoders: a T5 encoder (a vector per token) and a CLIP text model (one vector per text).

State-dict keys and arithmetic equal transformers' T5EncoderModel and CLIPTextModel.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from local.tinyflux.tokenizer import END, TEXT_TOKENS

T5_WIDTH, T5_INNER, T5_HEADS, T5_LAYERS = 128, 256, 4, 2
T5_BUCKETS, T5_FARTHEST = 32, 128  # relative positions: buckets in all, distance at which they end
CLIP_WIDTH, CLIP_INNER, CLIP_HEADS, CLIP_LAYERS = 64, 128, 2, 1


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps)


class T5Attention(nn.Module):
    def __init__(self, width: int, heads: int, *, first: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        if first:  # the other layers share the first one's table
            self.relative_attention_bias = nn.Embedding(T5_BUCKETS, heads)

    def position_bias(self, tokens: int) -> Tensor:
        """(1, heads, tokens, tokens): exact distances up to 7, then logarithmic buckets; a half each for before and after."""
        positions = torch.arange(tokens)
        offset = positions[None] - positions[:, None]
        half, exact = T5_BUCKETS // 2, T5_BUCKETS // 4
        side = (offset > 0).long() * half
        distance = offset.abs()
        scaled = torch.log(distance.float().clamp(min=1) / exact) / math.log(T5_FARTHEST / exact)
        far = (exact + (scaled * exact).long()).clamp(max=half - 1)
        bias: Tensor = self.relative_attention_bias(side + torch.where(distance < exact, distance, far))
        return bias.permute(2, 0, 1)[None]

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        query, key, value = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), scale=1.0)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


class T5AttentionLayer(nn.Module):
    def __init__(self, width: int, heads: int, *, first: bool) -> None:
        super().__init__()
        self.SelfAttention = T5Attention(width, heads, first=first)
        self.layer_norm = RMSNorm(width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = x + self.SelfAttention(self.layer_norm(x), bias)
        return out


class T5FeedForwardLayer(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.DenseReluDense = nn.ModuleDict(
            {"wi": nn.Linear(width, inner, bias=False), "wo": nn.Linear(inner, width, bias=False)},
        )
        self.layer_norm = RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        dense = self.DenseReluDense
        out: Tensor = x + dense["wo"](F.relu(dense["wi"](self.layer_norm(x))))
        return out


class T5Block(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, *, first: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList([T5AttentionLayer(width, heads, first=first), T5FeedForwardLayer(width, inner)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = self.layer[1](self.layer[0](x, bias))
        return out


class T5Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList([T5Block(T5_WIDTH, T5_INNER, T5_HEADS, first=layer == 0) for layer in range(T5_LAYERS)])
        self.final_layer_norm = RMSNorm(T5_WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        attention = cast(T5Attention, self.block.get_submodule("0.layer.0.SelfAttention"))
        bias = attention.position_bias(x.shape[1])
        for block in self.block:
            x = block(x, bias)
        out: Tensor = self.final_layer_norm(x)
        return out


class T5(nn.Module):
    def __init__(self, vocabulary_size: int) -> None:
        super().__init__()
        self.shared = nn.Embedding(vocabulary_size, T5_WIDTH)
        self.encoder = T5Stack()

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (batch, tokens) -> (batch, tokens, 128)."""
        out: Tensor = self.encoder(self.shared(ids))
        return out


class ClipAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for linear in projections)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class ClipLayer(nn.Module):
    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.self_attn = ClipAttention(width, heads)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.layer_norm2(x))))
        return out


class ClipStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ClipLayer(CLIP_WIDTH, CLIP_INNER, CLIP_HEADS) for _ in range(CLIP_LAYERS)])


class ClipTextModel(nn.Module):
    def __init__(self, vocabulary_size: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {
                "token_embedding": nn.Embedding(vocabulary_size, CLIP_WIDTH),
                "position_embedding": nn.Embedding(TEXT_TOKENS, CLIP_WIDTH),
            }
        )
        self.encoder = ClipStack()
        self.final_layer_norm = nn.LayerNorm(CLIP_WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1])
        x: Tensor = self.embeddings["token_embedding"](ids) + self.embeddings["position_embedding"](positions)
        for layer in self.encoder.layers:
            x = layer(x)
        out: Tensor = self.final_layer_norm(x)
        return out


class CLIP(nn.Module):
    def __init__(self, vocabulary_size: int) -> None:
        super().__init__()
        self.text_model = ClipTextModel(vocabulary_size)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (batch, tokens) -> (batch, 64): the vector at the first END token."""
        states: Tensor = self.text_model(ids)
        return states[torch.arange(len(ids)), (ids == END).int().argmax(1)]
