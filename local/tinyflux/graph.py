"""What travels between the nodes of a graph, and what nodes do with it: one function per deed.

It knows no node, folder or wire. Every deed runs on one thread: at this size a second gains little, and sums split over
threads could differ in their last bit from one machine to the next.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from local.tinyflux.codec import CELL_PX, Codec
from local.tinyflux.conditioning import Conditioning, Guider, TextEncoders
from local.tinyflux.grid import LATENT_CHANNELS
from local.tinyflux.lora import Lora, merge_loras
from local.tinyflux.pictures import to_picture, to_pixels
from local.tinyflux.sampling import OnStep, Solver, draw_noise, mix_noise, native_grid
from local.tinyflux.schedules import FLUX_SHIFT, sigma_table
from local.tinyflux.text import CLIP, T5
from local.tinyflux.transformer import Flux
from local.tinyflux.weights import load_codec, load_text_encoder, load_tokenizer

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def on_one_thread(deed: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    @wraps(deed)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        torch.set_num_threads(1)
        with torch.no_grad():
            return deed(*args, **kwargs)

    return run


@dataclass(frozen=True, eq=False)
class Model:
    """A MODEL value: the file's weights, what is to be merged into them, and the schedule's shift."""

    transformer: Flux
    loras: tuple[tuple[Lora, float], ...] = ()
    shift: float = FLUX_SHIFT
    has_soft_masks: bool = False  # a grey of the mask says from which part of the steps on it may change

    def with_lora(self, lora: Lora, strength: float) -> "Model":
        return replace(self, loras=(*self.loras, (lora, strength)))

    def with_shift(self, shift: float) -> "Model":
        return replace(self, shift=shift)

    def with_soft_masks(self) -> "Model":
        return replace(self, has_soft_masks=True)

    @cached_property
    def merged(self) -> Flux:
        return merge_loras(self.transformer, self.loras) if self.loras else self.transformer


@dataclass(frozen=True, eq=False)
class Latent:
    """A LATENT value: samples (batch, 16, h, w) on the native grid, and the size its pictures shall have."""

    samples: Tensor
    width_px: int
    height_px: int
    mask: Tensor | None = None  # (1 or batch, 1, h, w): 1 where noise may act, 0 where the samples stay


def make_empty_latent(width_px: int, height_px: int, batch: int) -> Latent:
    return Latent(torch.zeros(batch, LATENT_CHANNELS, *native_grid(width_px, height_px)), width_px, height_px)


def pair_text_encoders(first: Path, second: Path) -> TextEncoders:
    """Both encoders from two files in either order."""
    encoders = [load_text_encoder(first), load_text_encoder(second)]
    clips, t5s = [e for e in encoders if isinstance(e, CLIP)], [e for e in encoders if isinstance(e, T5)]
    if not clips or not t5s:
        kind = "CLIP" if clips else "T5"
        raise ValueError(f"{first.name} and {second.name} are both {kind} text encoders; one CLIP and one T5 are needed")
    return TextEncoders(load_tokenizer(), clips[0], t5s[0])


@on_one_thread
def encode_text(encoders: TextEncoders, text: str) -> Conditioning:
    return encoders.encode([text])


@dataclass(frozen=True, eq=False)
class GraphGuider:
    """A GUIDER value; the merge of its LoRAs waits until it is used."""

    model: Model
    positive: Conditioning
    negative: Conditioning | None = None
    cfg: float = 1.0


@on_one_thread
def sample(
    guider: GraphGuider, solver: Solver, sigmas: Tensor, latent: Latent, seed: int, on_step: OnStep, before_pass: Callable[[], None]
) -> tuple[Latent, Latent]:
    """The finished latents, and the picture as predicted in the last step. `before_pass` runs before every network pass and may raise."""
    if len(sigmas) < 2:
        return latent, latent
    batch, _, height, width = latent.samples.shape
    noise = draw_noise(seed, batch, height, width)
    inner = Guider(guider.model.merged, guider.positive, guider.negative, guider.cfg)
    predicted = latent.samples

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        if latent.mask is None:
            return inner.velocity_one_by_one(x, sigma, before_pass)
        mask = sharpen(latent.mask, sigma, sigmas) if guider.model.has_soft_masks else latent.mask
        kept = mix_noise(noise, latent.samples, sigma)
        masked = torch.lerp(kept, x, mask)
        picture = masked - sigma * inner.velocity_one_by_one(masked, sigma, before_pass)
        return (x - torch.lerp(latent.samples, picture, mask)) / sigma

    def remember(step: int, steps: int, picture: Tensor) -> None:
        nonlocal predicted
        predicted = picture
        on_step(step, steps, picture)

    samples = solver(velocity, mix_noise(noise, latent.samples, sigmas[0]), sigmas, remember)
    return replace(latent, samples=samples), replace(latent, samples=predicted)


def sharpen(mask: Tensor, sigma: Tensor, sigmas: Tensor) -> Tensor:
    """Differential diffusion: at the first step only white may change, at the last all but black."""
    last = float(max(sigmas[-1], sigma_table(FLUX_SHIFT)[0]))
    threshold = (float(sigma) - last) / max(float(sigmas[0]) - last, 1e-6)
    return (mask >= threshold).to(mask.dtype)


@on_one_thread
def decode_picture(codec: Codec, samples: Tensor, width_px: int, height_px: int) -> Image.Image:
    """samples (1, 16, h, w) -> a picture of exactly this size."""
    return to_picture(codec.decode(samples)[0], width_px, height_px)


@on_one_thread
def preview_picture(samples: Tensor) -> Image.Image:
    """The first picture at its native size, through the package's own codec: samplers have no VAE input."""
    _, _, height, width = samples.shape
    return decode_picture(load_codec(), samples[:1], width * CELL_PX, height * CELL_PX)


@on_one_thread
def encode_pictures(codec: Codec, pictures: list[Image.Image]) -> Latent:
    """Pictures of one size -> latents that decode to that size, cut at the edges to a multiple of 8 px as ComfyUI does."""
    width_px, height_px = (side // CELL_PX * CELL_PX for side in pictures[0].size)
    if not width_px or not height_px:
        raise ValueError(f"pictures of {pictures[0].width}x{pictures[0].height} px are too small to encode; each side needs {CELL_PX}")
    left, top = ((side % CELL_PX) // 2 for side in pictures[0].size)
    height, width = native_grid(width_px, height_px)
    cut = [picture.crop((left, top, left + width_px, top + height_px)) for picture in pictures]
    samples = [codec.encode(to_pixels(picture, width * CELL_PX, height * CELL_PX)) for picture in cut]
    return Latent(torch.cat(samples), width_px, height_px)


@on_one_thread
def mask_latent(latent: Latent, masks: list[Image.Image]) -> Latent:
    """Keep what is black in the masks (mode L, one for all or one per picture); grey keeps partly."""
    height, width = latent.samples.shape[2:]
    levels = [to_pixels(mask, *mask.size)[:, :1] * 0.5 + 0.5 for mask in masks]
    resized = [F.interpolate(level, (height, width), mode="bilinear", antialias=True) for level in levels]
    if len(resized) not in (1, len(latent.samples)):
        raise ValueError(f"{len(masks)} masks for {len(latent.samples)} pictures; one for all or one for each is allowed")
    return replace(latent, mask=torch.cat(resized))


def repeat_latent(latent: Latent, amount: int) -> Latent:
    """The whole batch that often. A mask for all stays one."""
    mask = latent.mask
    if mask is not None and len(mask) > 1:
        mask = mask.repeat(amount, 1, 1, 1)
    return replace(latent, samples=latent.samples.repeat(amount, 1, 1, 1), mask=mask)
