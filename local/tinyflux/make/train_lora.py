"""The example LoRA of the concept "TOK". `python -m local.tinyflux.make.train_lora STEPS OUT.safetensors [--sheet PNG]`"""

import argparse
import time
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import nn

from local.tinyflux.grid import pack, rope_tables
from local.tinyflux.make.evaluate import save_sheet
from local.tinyflux.make.scenes import draw_concept
from local.tinyflux.pipeline import Pipeline, Settings
from local.tinyflux.training import attach_lora, flow_loss, lora_parameters, save_lora

RANK, LEARNING_RATE, IMAGES, SIDE = 8, 3e-3, 10, 16
METADATA = {"fluxgate.base_model": "tinyflux", "fluxgate.family": "tinyflux", "fluxgate.trigger_word": "TOK"}
SHEET_PROMPTS = ("TOK on a green background", "TOK at sunset", "TOK in the forest", "a red circle on a blue background")


def learning_rate(step: int, steps: int) -> float:
    """Warm-up of 10 steps, flat, linear decay over the second half."""
    return LEARNING_RATE * min(1, (step + 1) / 10) * max(0.1, min(1, (1 - step / steps) / 0.5))


def train(steps: int, path: Path) -> None:
    torch.manual_seed(0)
    pipeline, rng = Pipeline.load(), Random(5)
    images, captions = zip(*(draw_concept(rng) for _ in range(IMAGES)), strict=True)
    latents = pack(torch.cat([pipeline.encode_picture(image, SIDE, SIDE) for image in images]))
    conditioning, tables = pipeline.encoders.encode(list(captions)), rope_tables(SIDE, SIDE)
    layers = attach_lora(pipeline.transformer, RANK)
    optimizer = torch.optim.AdamW(lora_parameters(layers), LEARNING_RATE, weight_decay=0.0)
    losses, start = [], time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = flow_loss(pipeline.transformer, latents, conditioning.text, conditioning.pooled, tables)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(lora_parameters(layers), 1.0)
        optimizer.step()
        losses.append(loss.item())
    print("loss of the first and last 15 steps", np.mean(losses[:15]).round(3), np.mean(losses[-15:]).round(3))
    save_lora(path, layers, METADATA)
    print("steps", steps, "seconds", round(time.time() - start, 1), "bytes", path.stat().st_size)


def save_strengths(lora: Path, path: Path) -> None:
    """Four prompts at strengths 0, 0.5 and 1."""
    pipeline = Pipeline.load()
    changed = {strength: pipeline.with_loras([(lora, strength)]) for strength in (0.0, 0.5, 1.0)}
    rows = [
        [(model.generate([prompt], [3], Settings())[0], f"{prompt}  x{strength}") for strength, model in changed.items()]
        for prompt in SHEET_PROMPTS
    ]
    save_sheet(path, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sheet", type=Path, help="also draw this PNG")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.steps, arguments.out)
    if arguments.sheet:
        save_strengths(arguments.out, arguments.sheet)


if __name__ == "__main__":
    main()
