"""Trains a LoRA on the small model as a program of its own: `python -m local.tinyflux.train_job CONFIG.json`.

It reports as SimpleTuner's raw webhook does and leaves files of the same names; it knows nothing of who started it.
Status 0: trained; 1: failed; 130: interrupted by SIGINT, the last checkpoint is kept.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import shutil
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn

from local.tinyflux.grid import pack, rope_tables
from local.tinyflux.pipeline import Pipeline, Settings
from local.tinyflux.report import Reporter
from local.tinyflux.training import LoraLayers, attach_lora, flow_loss, lora_parameters, save_lora

SIDE = 16  # latent cells: 128 pixels, which the model was trained at
SAMPLE_PX = 256
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
LOWEST_RATE = 0.1  # of the learning rate, where a schedule falls
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
DONE, FAILED, INTERRUPTED = 0, 1, 130


@dataclass(frozen=True)
class JobConfig:
    """What the file must hold; other keys are ignored."""

    base_path: Path
    data_dir: Path
    output_dir: Path
    webhook_url: str
    steps: int
    learning_rate: float
    rank: int
    batch_size: int
    lr_scheduler: str
    warmup_steps: int
    checkpoint_every: int
    checkpoints_kept: int
    sample_prompts: tuple[str, ...]
    sample_every: int
    seed: int
    repeats: int
    trigger_word: str
    resume_from: Path | None

    @classmethod
    def read(cls, path: Path) -> JobConfig:
        content: dict[str, Any] = json.loads(path.read_text("utf-8"))
        values = {name: content[name] for name in cls.__dataclass_fields__}
        for name in ("base_path", "data_dir", "output_dir"):
            values[name] = Path(values[name])
        values["resume_from"] = Path(values["resume_from"]) if values["resume_from"] else None
        values["sample_prompts"] = tuple(values["sample_prompts"])
        if values["lr_scheduler"] not in SCHEDULES:
            raise ValueError(f"lr_scheduler is {values['lr_scheduler']!r}; allowed for the small model: {', '.join(SCHEDULES)}")
        return cls(**values)


@dataclass(frozen=True)
class TrainingData:
    """latents (pairs, tokens, 64), text (pairs, 24, 128), pooled (pairs, 64): one pair for each line of each caption file."""

    latents: Tensor
    text: Tensor
    pooled: Tensor


def find_pairs(config: JobConfig) -> list[tuple[Path, str]]:
    """(picture, caption); refused with SimpleTuner's words where it would refuse."""
    pairs: list[tuple[Path, str]] = []
    for path in sorted(path for path in config.data_dir.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES):
        caption_path = path.with_suffix(".txt")
        if not caption_path.is_file():
            raise FileNotFoundError(f"Caption file {caption_path} not found")
        captions = [line.strip() for line in caption_path.read_text("utf-8").splitlines() if line.strip()]
        if not captions:
            raise FileNotFoundError(f"Caption file {caption_path} is empty: caption not found")
        pairs += [(path, caption) for caption in captions]
    seen = len(pairs) * (config.repeats + 1)
    if seen < config.batch_size:
        raise ValueError(
            f"Dataset configuration will produce zero usable batches: {len(pairs)} pictures, seen {config.repeats + 1} times, "
            f"make {seen}, and batch_size is {config.batch_size}."
        )
    return pairs


def load_data(config: JobConfig, pipeline: Pipeline, reporter: Reporter) -> TrainingData:
    pairs = find_pairs(config)
    conditioning = pipeline.encoders.encode([caption for _, caption in pairs])
    reporter.tell_stage("init_cache_text_embeds_status_update", "completed", len(pairs), len(pairs))
    latents = []
    for number, (path, _) in enumerate(pairs, 1):
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
        square = min(upright.size)
        latents.append(pipeline.encode_picture(ImageOps.fit(upright, (square, square)), SIDE, SIDE))
        reporter.tell_stage("init_vae_cache", "running", number, len(pairs))
    return TrainingData(pack(torch.cat(latents)), conditioning.text, conditioning.pooled)


def scale_rate(config: JobConfig, step: int) -> float:
    """The share of the learning rate at a step, counted from 0."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    done = step / config.steps
    if config.lr_scheduler == "linear":
        return warm * max(LOWEST_RATE, 1 - done)
    if config.lr_scheduler == "cosine":
        return warm * max(LOWEST_RATE, (1 + math.cos(math.pi * done)) / 2)
    return warm


class LoraTraining:
    """The state between two steps: weights, optimizer, random numbers, and the pictures still to see in this epoch."""

    def __init__(self, config: JobConfig, pipeline: Pipeline, data: TrainingData) -> None:
        torch.manual_seed(config.seed)
        self.config, self.pipeline, self.data = config, pipeline, data
        self.layers: LoraLayers = attach_lora(pipeline.transformer, config.rank)
        self.optimizer = torch.optim.AdamW(lora_parameters(self.layers), config.learning_rate, weight_decay=0.0)
        self.tables = rope_tables(SIDE, SIDE)
        self.step, self.epoch = 0, 0
        self.order: list[int] = []

    def draw_batch(self) -> list[int]:
        """Every picture once per epoch (and `repeats` times more), in a new order each time."""
        size = self.config.batch_size
        if len(self.order) < size:
            count = len(self.data.latents)
            self.order = torch.randperm(count).repeat(self.config.repeats + 1).tolist()
            self.epoch += 1
        batch, self.order = self.order[:size], self.order[size:]
        return batch

    def train_step(self) -> tuple[float, float]:
        """(loss, learning rate)"""
        rate = self.config.learning_rate * scale_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.draw_batch()
        latents, text, pooled = self.data.latents[batch], self.data.text[batch], self.data.pooled[batch]
        loss = flow_loss(self.pipeline.transformer, latents, text, pooled, self.tables)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(lora_parameters(self.layers), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.item(), rate

    def save_weights(self, path: Path) -> None:
        notes = {"base_model": "tinyflux", "family": "tinyflux", "trigger_word": self.config.trigger_word, "steps": str(self.step)}
        save_lora(path, self.layers, {f"fluxgate.{name}": value for name, value in notes.items()})

    def save_checkpoint(self) -> Path:
        """A folder that appears whole or not at all."""
        folder = self.config.output_dir / f"checkpoint-{self.step}"
        making = self.config.output_dir / f"making-{folder.name}"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        self.save_weights(making / WEIGHTS_NAME)
        torch.save(self.optimizer.state_dict(), making / "optimizer.bin")
        torch.save({"torch": torch.get_rng_state()}, making / "random_states_0.pkl")
        state = {"global_step": self.step, "epoch": self.epoch, "order": self.order}
        (making / "training_state.json").write_text(json.dumps(state), "utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        making.rename(folder)
        return folder

    def load_checkpoint(self, folder: Path) -> None:
        weights = load_file(folder / WEIGHTS_NAME)
        for name, layer in self.layers.items():
            layer.down.weight.data.copy_(weights[f"transformer.{name}.lora_A.weight"])
            layer.up.weight.data.copy_(weights[f"transformer.{name}.lora_B.weight"])
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.bin", weights_only=True))
        state: dict[str, Any] = json.loads((folder / "training_state.json").read_text("utf-8"))
        self.step, self.epoch, self.order = state["global_step"], state["epoch"], state["order"]
        torch.set_rng_state(torch.load(folder / "random_states_0.pkl", weights_only=True)["torch"])

    def draw_sample(self, prompt: str) -> str:
        """A PNG in base64. It uses random numbers of its own."""
        [picture] = self.pipeline.generate([prompt], [self.config.seed], Settings(SAMPLE_PX, SAMPLE_PX))
        content = io.BytesIO()
        picture.save(content, "PNG")
        return base64.b64encode(content.getvalue()).decode()


def delete_old_checkpoints(output_dir: Path, kept: int) -> None:
    folders = sorted(output_dir.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    for folder in folders[:-kept]:
        shutil.rmtree(folder)


def prepare(config: JobConfig, reporter: Reporter) -> LoraTraining:
    if not config.base_path.is_dir():
        raise FileNotFoundError(f"there is no such model folder: {config.base_path}")
    reporter.tell_stage("init_load_base_model", "running")
    pipeline = Pipeline.load(config.base_path)
    reporter.tell_stage("init_load_base_model", "completed", 1, 1)
    reporter.tell_stage("init_data_backend", "running")
    data = load_data(config, pipeline, reporter)
    reporter.tell_stage("init_data_backend", "completed", 1, 1)
    training = LoraTraining(config, pipeline, data)
    if config.resume_from:
        training.load_checkpoint(config.resume_from)
        reporter.tell_note(f"Resumed from global_step {training.step}")
    reporter.tell_stage("init_resume_checkpoint", "completed")
    return training


def train(config: JobConfig, reporter: Reporter) -> None:
    training = prepare(config, reporter)
    reporter.tell_start(training.step, config.steps)
    while training.step < config.steps:
        loss, rate = training.train_step()
        reporter.tell_step(training.step, config.steps, loss, rate, training.epoch)
        if training.step % config.checkpoint_every == 0:
            reporter.tell_stage("checkpoint_save", "running")
            reporter.tell_checkpoint(training.save_checkpoint())
            delete_old_checkpoints(config.output_dir, config.checkpoints_kept)
        if training.step % config.sample_every == 0:
            for prompt in config.sample_prompts:
                reporter.tell_sample(training.step, prompt, training.draw_sample(prompt))
    reporter.tell_stage("model_save", "running")
    waiting = config.output_dir / f"making-{WEIGHTS_NAME}"
    training.save_weights(waiting)
    os.replace(waiting, config.output_dir / WEIGHTS_NAME)
    reporter.tell_completed(config.steps)


def main(arguments: list[str]) -> int:
    # A shell's background job is started with SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    config = JobConfig.read(Path(arguments[0]))
    config.output_dir.mkdir(parents=True, exist_ok=True)
    reporter = Reporter(config.webhook_url)
    try:
        train(config, reporter)
    except KeyboardInterrupt:
        reporter.tell_interrupted()
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001  boundary: whatever it is, the one who waits hears of it
        traceback.print_exc()
        reporter.tell_failed(error)
        return FAILED
    return DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
