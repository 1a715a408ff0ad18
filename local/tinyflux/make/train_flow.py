"""Trains the transformer, then distils guidance into it; one seeded run over several processes.

`python -m torch.distributed.run --standalone --nproc_per_node=2 -m local.tinyflux.make.train_flow SECONDS DISTIL_SECONDS`
needs data.py's latents, vocab.json and text.pt; it writes ema.pt (running average), phase1.pt (before distillation) and final.pt.
"""

import argparse
import copy
import os
import time
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from local.tinyflux.grid import RopeTables, pack, rope_tables
from local.tinyflux.make.data import SIZES, read_latents
from local.tinyflux.make.vocabulary import add_strange_words, list_strange_words, read_vocabulary
from local.tinyflux.text import CLIP, T5
from local.tinyflux.tokenizer import Tokenizer
from local.tinyflux.training import draw_times
from local.tinyflux.transformer import DoubleBlock, Flux, Modulation, SingleBlock

BATCH, MUON_RATE, ADAM_RATE, SEED = 24, 2e-3, 1.5e-3, 100  # batch of each process
EMPTY_SHARE, STRANGE_SHARE = 0.08, 0.12  # captions left out, captions with unknown words
AVERAGE = 0.998


def initialise(flux: Flux) -> Flux:
    """Gates start at 0.5, not 0, so that blocks work from the first step."""
    for module in flux.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, Modulation):
            nn.init.zeros_(module.linear.weight)
    nn.init.zeros_(flux.proj_out.weight)
    for module in flux.modules():
        if isinstance(module, DoubleBlock):
            for modulation in (module.norm1, module.norm1_context):
                modulation.linear.bias.data.view(6, -1)[[2, 5]] = 0.5
        if isinstance(module, SingleBlock):
            module.norm.linear.bias.data.view(3, -1)[2] = 0.5
    for embedder in (flux.time_text_embed.timestep_embedder, flux.time_text_embed.guidance_embedder):
        nn.init.normal_(embedder.linear_1.weight, std=0.02)
        nn.init.normal_(embedder.linear_2.weight, std=0.02)
    return flux


class Captions:
    """Captions as token ids, some empty, some with unknown words."""

    def __init__(self, folder: Path, rng: Random) -> None:
        self.vocabulary = read_vocabulary(folder)
        self.tokenizer, self.rng = Tokenizer(self.vocabulary), rng
        self.strange = list_strange_words(self.vocabulary)

    def __call__(self, captions: list[str]) -> Tensor:
        return self.tokenizer([self.vary(caption, draw) for caption, draw in [(c, self.rng.random()) for c in captions]])

    def vary(self, caption: str, draw: float) -> str:
        if draw < EMPTY_SHARE:
            return ""
        return add_strange_words(caption, self.rng, self.strange) if draw < EMPTY_SHARE + STRANGE_SHARE else caption


def load_text_encoders(folder: Path, words: int) -> tuple[T5, CLIP]:
    states = torch.load(folder / "text.pt")
    t5, clip = T5(words), CLIP(words)
    t5.load_state_dict(states["t5"])
    clip.load_state_dict(states["clip"])
    return t5.requires_grad_(False), clip.requires_grad_(False)


def make_optimizers(flux: Flux) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices inside blocks, modulation excepted; AdamW for the rest. Each with its learning rate."""
    inner = {name: p for name, p in flux.named_parameters() if p.ndim == 2 and "blocks" in name and "norm" not in name}
    rest = [p for name, p in flux.named_parameters() if name not in inner]
    muon = torch.optim.Muon(inner.values(), lr=MUON_RATE, momentum=0.95, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [(muon, MUON_RATE), (torch.optim.AdamW(rest, ADAM_RATE, betas=(0.9, 0.98), weight_decay=0), ADAM_RATE)]


def average_gradients(flux: Flux) -> None:
    gradients = [p.grad for p in flux.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def rate_scale(elapsed_s: float, step: int, total_s: float, distil_s: float) -> float:
    """By the clock: warm-up of 60 steps, flat, linear decay over the last 45 %; then a small decaying rate while distilling."""
    if elapsed_s >= total_s - distil_s:
        return 0.2 * max(0.05, (total_s - elapsed_s) / distil_s)
    share = elapsed_s / (total_s - distil_s)
    return min(1, (step + 1) / 60) * max(0.05, min(1, (1 - share) / 0.45))


class FlowRun:
    def __init__(self, folder: Path, total_s: float, distil_s: float) -> None:
        dist.init_process_group("gloo")
        torch.set_num_threads(1)
        self.folder, self.rank, self.total_s, self.distil_s = folder, dist.get_rank(), total_s, distil_s
        torch.manual_seed(SEED)
        self.flux = initialise(Flux())
        torch.manual_seed(SEED + 1 + self.rank)
        self.sample_rng, self.size_rng = np.random.RandomState(SEED + self.rank), Random(5)  # all processes take the same size
        self.captions = Captions(folder, Random(SEED + self.rank))
        self.t5, self.clip = load_text_encoders(folder, len(self.captions.vocabulary))
        self.data, self.optimizers = read_latents(folder), make_optimizers(self.flux)
        self.average = copy.deepcopy(self.flux).requires_grad_(False)
        self.teacher: Flux | None = None
        self.step, self.losses = 0, list[float]()

    def draw_batch(self) -> tuple[Tensor, Tensor, RopeTables]:
        size = self.size_rng.choices(range(len(SIZES)), [share for _, _, share in SIZES])[0]
        latents, captions = self.data[size]
        chosen = self.sample_rng.randint(0, len(latents), BATCH)
        batch = torch.from_numpy(latents[chosen]).float()
        return pack(batch), self.captions([captions[index] for index in chosen]), rope_tables(batch.shape[2], batch.shape[3])

    def predict(self, flux: Flux, x: Tensor, ids: Tensor, time: Tensor, guidance: Tensor, tables: RopeTables) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            velocity: Tensor = flux(x, self.t5(ids), self.clip(ids), time, guidance, tables).float()
        return velocity

    def compute_loss(self) -> Tensor:
        """Against noise - picture, or, when distilling, against the teacher's guided velocity at a guidance of 1..5."""
        latents, ids, tables = self.draw_batch()
        time, noise = draw_times(BATCH), torch.randn_like(latents)
        share = time[:, None, None]
        mixed = (1 - share) * latents + share * noise
        guidance, target = torch.ones(BATCH), noise - latents
        if self.teacher is not None:
            guidance = 1 + 4 * torch.rand(BATCH)
            empty = self.captions.tokenizer([""]).expand(BATCH, -1)
            with torch.no_grad():
                led, free = (self.predict(self.teacher, mixed, text, time, torch.ones(BATCH), tables) for text in (ids, empty))
            target = free + guidance[:, None, None] * (led - free)
        return (self.predict(self.flux, mixed, ids, time, guidance, tables) - target).pow(2).mean()

    def take_step(self, elapsed_s: float) -> None:
        for optimizer, rate in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_scale(elapsed_s, self.step, self.total_s, self.distil_s)
            optimizer.zero_grad()
        loss = self.compute_loss()
        torch.autograd.backward(loss)
        average_gradients(self.flux)
        nn.utils.clip_grad_norm_(self.flux.parameters(), 1.0)
        for optimizer, _ in self.optimizers:
            optimizer.step()
        self.step += 1
        self.losses.append(loss.item())
        with torch.no_grad():
            weight = 1 - min(AVERAGE, (1 + self.step) / (10 + self.step))
            for mean, current in zip(self.average.parameters(), self.flux.parameters(), strict=True):
                mean.lerp_(current, weight)

    def save(self, name: str) -> None:
        if self.rank == 0:
            torch.save(self.average.state_dict(), self.folder / f"{name}.tmp")
            os.replace(self.folder / f"{name}.tmp", self.folder / name)

    def say(self, *words: object) -> None:
        if self.rank == 0:
            print(*words, flush=True)

    def start_distillation(self) -> None:
        self.save("phase1.pt")
        self.teacher = copy.deepcopy(self.average)
        self.flux.load_state_dict(self.average.state_dict())
        self.losses = []
        self.say("distillation from step", self.step)

    def train(self) -> None:
        start = time.time()
        while (elapsed_s := self.agree_on(time.time() - start)) < self.total_s:
            if elapsed_s >= self.total_s - self.distil_s and self.teacher is None:
                self.start_distillation()
            self.take_step(elapsed_s)
            if self.step % 50 == 0:
                self.say(self.step, round(elapsed_s), "loss", round(float(np.mean(self.losses[-50:])), 4))
            if self.step % 200 == 0:
                self.save("ema.pt")
        self.save("final.pt")
        self.say("steps", self.step, "samples", self.step * BATCH * dist.get_world_size())

    def agree_on(self, elapsed_s: float) -> float:
        """The first process's clock, so that all stop at the same step."""
        shared = torch.tensor([elapsed_s])
        dist.broadcast(shared, 0)
        return shared.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float, help="of the whole run, distillation included")
    parser.add_argument("distil_seconds", type=float)
    parser.add_argument("--folder", type=Path, default=Path())
    arguments = parser.parse_args()
    FlowRun(arguments.folder, arguments.seconds, arguments.distil_seconds).train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
