"""Text as the transformer sees it, and the velocity it predicts under it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from local.tinyflux.grid import pack, rope_tables, unpack
from local.tinyflux.text import CLIP, T5
from local.tinyflux.tokenizer import Tokenizer
from local.tinyflux.transformer import Flux

DEFAULT_GUIDANCE = 3.5  # ComfyUI's for Flux without a FluxGuidance node


@dataclass(frozen=True)
class Conditioning:
    """text (batch, 24, 128) from T5, pooled (batch, 64) from CLIP; batch is 1 except in training and measuring."""

    text: Tensor
    pooled: Tensor
    guidance: float | None = None

    def guided(self, guidance: float) -> "Conditioning":
        return replace(self, guidance=guidance)

    def emptied(self) -> "Conditioning":
        """All zeros: what ComfyUI's ConditioningZeroOut makes. It is not the same as an empty text."""
        return replace(self, text=torch.zeros_like(self.text), pooled=torch.zeros_like(self.pooled))


@dataclass(frozen=True)
class TextEncoders:
    tokenizer: Tokenizer
    clip: CLIP
    t5: T5

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Conditioning:
        ids = self.tokenizer(texts)
        return Conditioning(self.t5(ids), self.clip(ids))


@torch.no_grad()
def predict_velocity(transformer: Flux, conditioning: Conditioning, latents: Tensor, sigma: Tensor) -> Tensor:
    """latents (batch, 16, h, w) and one sigma for all -> noise - picture, same shape."""
    batch, _, height, width = latents.shape
    guidance = DEFAULT_GUIDANCE if conditioning.guidance is None else conditioning.guidance
    text, pooled = conditioning.text, conditioning.pooled
    tables = rope_tables(height, width, text.shape[1])
    tokens: Tensor = transformer(pack(latents), text, pooled, sigma.expand(batch), torch.full((batch,), float(guidance)), tables)
    return unpack(tokens, height, width)


@dataclass(frozen=True)
class Guider:
    """A transformer led by a text, and away from a second one when cfg is not 1 (two passes per step then)."""

    transformer: Flux
    positive: Conditioning
    negative: Conditioning | None = None
    cfg: float = 1.0

    def velocity(self, latents: Tensor, sigma: Tensor) -> Tensor:
        """All pictures in one pass; the bytes of one then depend on how many there are."""
        led = predict_velocity(self.transformer, self.positive, latents, sigma)
        if self.negative is None or self.cfg == 1:
            return led
        away = predict_velocity(self.transformer, self.negative, latents, sigma)
        return away + self.cfg * (led - away)

    def velocity_one_by_one(self, latents: Tensor, sigma: Tensor, before_each: Callable[[], None] = lambda: None) -> Tensor:
        """A pass for each picture, so that its bytes do not depend on the others."""
        velocities = []
        for index in range(len(latents)):
            before_each()
            velocities.append(self.velocity(latents[index : index + 1], sigma))
        return torch.cat(velocities)
