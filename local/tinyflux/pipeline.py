"""The whole model behind one call, as diffusers' FluxPipeline has it: for measuring and training, not for graphs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from local.tinyflux.codec import CELL_PX, Codec
from local.tinyflux.conditioning import DEFAULT_GUIDANCE, Guider, TextEncoders
from local.tinyflux.lora import merge_loras, read_lora
from local.tinyflux.pictures import to_picture, to_pixels
from local.tinyflux.sampling import OnStep, draw_noise, mix_noise, native_grid, solve_euler
from local.tinyflux.schedules import trained_sigmas
from local.tinyflux.text import CLIP, T5
from local.tinyflux.tokenizer import Tokenizer
from local.tinyflux.transformer import Flux
from local.tinyflux.weights import MODEL_DIR, fill


def ignore_step(step: int, steps: int, latents: Tensor) -> None:
    """For callers that do not watch."""


@dataclass(frozen=True)
class Settings:
    width_px: int = 512
    height_px: int = 512
    steps: int = 20
    guidance: float = DEFAULT_GUIDANCE
    cfg: float = 1.0
    negative: str = ""
    image: Image.Image | None = field(default=None, compare=False)
    strength: float = 1.0  # of the change made to `image`


@dataclass
class Pipeline:
    transformer: Flux
    encoders: TextEncoders
    codec: Codec

    @classmethod
    def load(cls, folder: Path = MODEL_DIR) -> "Pipeline":
        """Read a folder in diffusers' FluxPipeline layout."""
        tokenizer = Tokenizer.load(folder / "tokenizer" / "tokenizer.json")
        words = len(tokenizer.vocabulary)
        clip = fill(lambda: CLIP(words), folder / "text_encoder" / "model.safetensors")
        t5 = fill(lambda: T5(words), folder / "text_encoder_2" / "model.safetensors")
        codec = fill(Codec, folder / "vae" / "diffusion_pytorch_model.safetensors")
        transformer = fill(Flux, folder / "transformer" / "diffusion_pytorch_model.safetensors")
        return cls(transformer, TextEncoders(tokenizer, clip, t5), codec)

    def with_loras(self, files: Sequence[tuple[Path, float]]) -> "Pipeline":
        """The same pipeline with (file, strength) merged in; this one keeps its weights."""
        loras = [(read_lora(path, self.transformer), strength) for path, strength in files]
        return Pipeline(merge_loras(self.transformer, loras), self.encoders, self.codec)

    @torch.no_grad()
    def encode_picture(self, picture: Image.Image, height: int, width: int) -> Tensor:
        """(1, 16, height, width) latents; sides in latent cells."""
        return self.codec.encode(to_pixels(picture, width * CELL_PX, height * CELL_PX))

    @torch.no_grad()
    def generate_batch(self, prompts: list[str], noise: Tensor, settings: Settings, on_step: OnStep = ignore_step) -> list[Image.Image]:
        """All pictures in one pass per step; noise (pictures, 16, h, w) decides the native grid."""
        negative = self.encoders.encode([settings.negative] * len(prompts)) if settings.cfg != 1 else None
        positive = self.encoders.encode(prompts).guided(settings.guidance)
        guider = Guider(self.transformer, positive, negative.guided(settings.guidance) if negative else None, settings.cfg)
        sigmas = trained_sigmas(settings.steps, settings.strength)
        start = noise
        if settings.image is not None:
            start = mix_noise(noise, self.encode_picture(settings.image, noise.shape[2], noise.shape[3]), sigmas[0])
        latents = solve_euler(guider.velocity, start, sigmas, on_step)
        return [to_picture(pixels, settings.width_px, settings.height_px) for pixels in self.codec.decode(latents)]

    def generate(self, prompts: list[str], seeds: list[int], settings: Settings, *, together: bool = False) -> list[Image.Image]:
        """One picture per (prompt, seed), one after the other; `together` is faster, but bytes then depend on the batch."""
        height, width = native_grid(settings.width_px, settings.height_px)
        noises = [draw_noise(seed, 1, height, width) for seed in seeds]
        if together:
            return self.generate_batch(prompts, torch.cat(noises), settings)
        return [self.generate_batch([prompt], noise, settings)[0] for prompt, noise in zip(prompts, noises, strict=True)]
