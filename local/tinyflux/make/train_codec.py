"""Trains the decoder; the encoder is computed. `python -m local.tinyflux.make.train_codec SECONDS` writes vae.pt and codec.png."""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from local.tinyflux.codec import Codec, ResidualBlock
from local.tinyflux.make.data import read_pixels
from local.tinyflux.make.patch_codec import Array, PatchCodec, compile_encoder

LEARNING_RATE, HELD_OUT, LATENT_NOISE = 3e-3, 32, 0.12
SMALL_CROPS = (64, 16)  # side in pixels, batch; for the first 55 % of the time
LARGE_CROPS = (128, 4)


def as_pixels(pictures: Array) -> Tensor:
    """uint8 (batch, h, w, 3) -> (batch, 3, h, w) in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1


def as_latents(pictures: Array, patches: PatchCodec) -> Tensor:
    return torch.from_numpy(patches.project(pictures).copy())


def cut_crops(pictures: Array, rng: np.random.RandomState, count: int, side: int) -> Array:
    crops = []
    for _ in range(count):
        picture = pictures[rng.randint(len(pictures))]
        y, x = rng.randint(0, (128 - side) // 8 + 1, 2) * 8
        crops.append(picture[y : y + side, x : x + side])
    return np.stack(crops)


def restoration_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Absolute and squared error, and the error of the slopes, which keeps edges."""
    error = decoded - pixels
    across, down = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
    return error.abs().mean() + 0.5 * error.pow(2).mean() + 0.5 * (across.abs().mean() + down.abs().mean())


def psnr(decoded: Tensor, pixels: Tensor) -> float:
    return round(float(10 * torch.log10(4 / (decoded.clamp(-1, 1) - pixels).pow(2).mean())), 2)


def start_codec(patches: PatchCodec, start: Path | None) -> Codec:
    """The computed encoder with a fresh decoder, or a whole codec from a file."""
    codec = Codec()
    compile_encoder(codec.encoder, patches)
    for module in codec.decoder.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.conv2.weight)
            if module.conv2.bias is not None:
                nn.init.zeros_(module.conv2.bias)
    if start is not None:
        codec.load_state_dict(torch.load(start))
    return codec


def train(folder: Path, seconds: float, rate: float, start_file: Path | None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng, patches = np.random.RandomState(0), PatchCodec.load(folder)
    pictures = read_pixels(folder)
    held_out, pictures = pictures[:HELD_OUT], pictures[HELD_OUT:]
    codec, truth = start_codec(patches, start_file), as_pixels(held_out)
    with torch.no_grad():
        gap = (codec.encode(truth) - as_latents(held_out, patches)).abs().max().item()
    print("largest difference of the encoder network to the linear map", gap, flush=True)
    codec.decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(codec.decoder.parameters(), rate, betas=(0.9, 0.98), weight_decay=0)
    start, step, losses = time.time(), 0, []
    while (share := (time.time() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * share)))
        side, count = SMALL_CROPS if share < 0.55 else LARGE_CROPS
        crops = cut_crops(pictures, rng, count, side)
        latents = as_latents(crops, patches)
        latents = latents + torch.randn_like(latents) * torch.rand(count, 1, 1, 1) * LATENT_NOISE
        loss = restoration_loss(codec.decode(latents.contiguous(memory_format=torch.channels_last)), as_pixels(crops))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(codec.decoder.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        if step % 100 == 0:
            print(step, round(time.time() - start), "loss", round(float(np.mean(losses[-100:])), 4), flush=True)
            torch.save(codec.state_dict(), folder / "vae.pt")
    torch.save(codec.state_dict(), folder / "vae.pt")
    with torch.no_grad():
        decoded = codec.decode(codec.encode(truth))
    print("steps", step, "held-out PSNR", psnr(decoded, truth))
    save_comparison(truth[:8], decoded[:8], folder / "codec.png")


def save_comparison(truth: Tensor, decoded: Tensor, path: Path) -> None:
    """Truth above, decoded below."""
    rows = torch.cat([torch.cat(list(row), 2) for row in (truth, decoded)], 1)
    Image.fromarray(((rows.clamp(-1, 1).permute(1, 2, 0) * 0.5 + 0.5) * 255).byte().numpy()).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--start", type=Path, help="continue from this vae.pt")
    parser.add_argument("--folder", type=Path, default=Path())
    arguments = parser.parse_args()
    train(arguments.folder, arguments.seconds, arguments.rate, arguments.start)


if __name__ == "__main__":
    main()
