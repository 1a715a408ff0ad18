"""SimpleTuner: the three files it reads, and the command that starts it. Every key is one that its version 3.1.6 was seen or read to take.

It refuses to know how the process is watched, and does not import SimpleTuner: that lives in an interpreter of its own.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from trainer_worker.checkpoints import WEIGHTS_NAME, find_checkpoints, find_final_weights, set_broken_aside
from trainer_worker.config import VIDEO_FAMILIES, TrainingConfig
from trainer_worker.launch import Launch

Json = dict[str, Any]

LAUNCHER = Path(__file__).with_name("simpletuner_launcher.py")
FAMILY_NAMES = {"flux1": "flux", "tinyflux": "flux", "wan": "wan", "hunyuanvideo": "hunyuanvideo"}
FIRST_FLAVOURS = {"flux1": "dev", "tinyflux": "dev", "wan": "t2v-480p-1.3b-2.1", "hunyuanvideo": "t2v-480p"}
# int8 and int4 by quanto, which the measured memory figures are for; NF4 needs bitsandbytes and a GPU.
PRECISIONS = {"bf16": "no_change", "int8": "int8-quanto", "int4": "int4-quanto", "nf4": "nf4-bnb", "fp8": "fp8-quanto"}
OFFLINE_NAMES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
# Its picture codec and text encoders come from repositories of their own, whatever the base is.
FETCHING_FAMILIES = ("hunyuanvideo",)
# `resolution_type: pixel` with a smaller maximum_image_size than this is refused, so tiny pictures state none.
SMALLEST_STATED_PX = 512
REPORT_EVERY_STEPS = 1


class SimpleTunerTrainer:
    """`python` is the interpreter of an environment that holds SimpleTuner."""

    def __init__(self, python: Path) -> None:
        self._python = python

    def prepare(self, config: TrainingConfig, webhook_url: str) -> Launch:
        check(config)
        paths = Paths(config)
        for folder in (config.output_dir, paths.config_dir, paths.cache_dir):
            folder.mkdir(parents=True, exist_ok=True)
        # Of an earlier run: what lies there at the end was written by this one.
        (config.output_dir / WEIGHTS_NAME).unlink(missing_ok=True)
        set_broken_aside(config.output_dir)
        names = {f"sample_{number}": prompt for number, prompt in enumerate(config.sample_prompts, 1)}
        write_json(paths.webhook, {"webhook_type": "raw", "callback_url": webhook_url, "log_level": "info"})
        write_json(paths.backends, describe_data(config, paths))
        write_json(paths.prompts, names)
        write_json(paths.config, {**describe_run(config, paths), **describe_model(config), **describe_samples(config, paths)})
        own_tokenizers = ["--own-tokenizers"] if config.family == "tinyflux" else []
        return Launch(
            # -P: else the launcher's folder is searched first, where this very file would pass for the package.
            command=[str(self._python), "-P", str(LAUNCHER), *own_tokenizers],
            env=choose_environment(config, paths),
            cwd=paths.config_dir,
            log_path=paths.log,
            sample_names=names,
        )

    def find_final(self, config: TrainingConfig) -> Path | None:
        return find_final_weights(config.output_dir)

    def find_checkpoints(self, config: TrainingConfig) -> list[tuple[int, Path]]:
        return find_checkpoints(config.output_dir)


class Paths:
    """Where everything of one training lies; all beneath its output folder but the data."""

    def __init__(self, config: TrainingConfig) -> None:
        self.config_dir = config.output_dir / "config"
        self.cache_dir = config.output_dir / "cache"
        self.config = self.config_dir / "config.json"
        self.backends = self.config_dir / "multidatabackend.json"
        self.webhook = self.config_dir / "webhook.json"
        self.prompts = self.config_dir / "prompts.json"
        self.log = config.output_dir / "trainer.log"


def check(config: TrainingConfig) -> None:
    """ValueError for what SimpleTuner would refuse after minutes of loading."""
    if config.family == "wan" and config.precision in ("nf4", "int4", "fp8"):
        raise ValueError(f"precision is {config.precision!r}; allowed for wan: bf16, int8")


def describe_run(config: TrainingConfig, paths: Paths) -> Json:
    checkpoints = find_checkpoints(config.output_dir) if config.resume else []
    return {
        "output_dir": str(config.output_dir),
        "cache_dir": str(paths.cache_dir),
        "data_backend_config": str(paths.backends),
        "webhook_config": str(paths.webhook),
        "webhook_reporting_interval": REPORT_EVERY_STEPS,
        "max_train_steps": config.steps,
        "num_train_epochs": 0,
        "checkpoint_step_interval": config.checkpoint_every,
        "checkpoints_total_limit": config.checkpoints_kept,
        # By name, not "latest": that would be taken on faith.
        "resume_from_checkpoint": checkpoints[0][1].name if checkpoints else "",
        "learning_rate": config.learning_rate,
        # Its "constant" knows no warmup.
        "lr_scheduler": "constant_with_warmup" if config.lr_scheduler == "constant" and config.warmup_steps else config.lr_scheduler,
        "lr_warmup_steps": config.warmup_steps,
        "optimizer": config.optimizer,
        "train_batch_size": config.batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": config.gradient_checkpointing,
        "seed": config.seed,
        "caption_dropout_probability": 0.0,
        "report_to": "none",
        "push_to_hub": False,
        "disable_benchmark": True,
        "disable_bucket_pruning": True,
        "minimum_image_size": 0,
    }


def describe_model(config: TrainingConfig) -> Json:
    flavour = config.flavour or FIRST_FLAVOURS[config.family]
    precision = PRECISIONS.get(config.precision, config.precision)
    model: Json = {
        "model_family": FAMILY_NAMES[config.family],
        "model_flavour": flavour,
        "model_type": "lora",
        "lora_type": "standard",
        "lora_rank": config.rank,
        "lora_alpha": config.alpha,
        # ComfyUI ignores every key of the other format for Flux.
        "lora_format": "diffusers",
        "pretrained_model_name_or_path": config.base_path,
        "mixed_precision": "bf16",
        "base_model_precision": precision,
        "resolution": config.resolution,
        "resolution_type": "pixel_area",
    }
    if precision != "no_change":
        # On the GPU, loading first at full precision would need the memory that quantising is to save.
        model["quantize_via"] = "cpu"
    if config.family in VIDEO_FAMILIES:
        return {**model, "vae_enable_tiling": True, "vae_enable_slicing": True, "flow_schedule_shift": 5}
    model |= {"flow_schedule_shift": 3, "flux_guidance_mode": "constant", "aspect_bucket_alignment": 64}
    model["flux_guidance_value"] = 3.5 if config.family == "tinyflux" else 1.0
    if flavour == "schnell":
        model["flux_fast_schedule"] = True
    if config.resolution < SMALLEST_STATED_PX:
        del model["resolution_type"]
    return model


def describe_samples(config: TrainingConfig, paths: Paths) -> Json:
    """Sample pictures at every `sample_every`-th step, one of each prompt."""
    if not config.sample_prompts:
        return {"validation_disable": True}
    side = f"{config.resolution}x{config.resolution}"
    samples: Json = {
        "user_prompt_library": str(paths.prompts),
        "validation_disable_unconditional": True,
        "validation_prompt_library": False,
        "validation_step_interval": config.sample_every,
        "validation_num_inference_steps": 20,
        "validation_guidance": 3.5,
        "validation_seed": config.seed,
        "validation_resolution": side,
        "validation_negative_prompt": "",
    }
    if config.family in VIDEO_FAMILIES:
        samples |= {
            "validation_num_video_frames": config.video_frames,
            "validation_num_inference_steps": 40 if config.family == "wan" else 30,
            "validation_guidance": 5.0 if config.family == "wan" else 6.0,
            "validation_resolution": "832x480",
        }
    return samples


def describe_data(config: TrainingConfig, paths: Paths) -> list[Json]:
    pictures: Json = {
        "id": "training-data",
        "type": "local",
        "dataset_type": "video" if config.family in VIDEO_FAMILIES else "image",
        "instance_data_dir": str(config.data_dir),
        "caption_strategy": "textfile",
        "metadata_backend": "discovery",
        "resolution": config.resolution,
        "resolution_type": "pixel_area",
        "minimum_image_size": 0,
        # Aspect buckets, not squares: what lies at the edge is trained too.
        "crop": False,
        "repeats": config.repeats,
        "cache_dir_vae": str(paths.cache_dir / "vae"),
    }
    if config.family in VIDEO_FAMILIES:
        pictures["video"] = {
            "num_frames": config.video_frames,
            "min_frames": config.video_frames,
            "bucket_strategy": "aspect_ratio",
            "frame_interval": 1,
        }
    elif config.resolution < SMALLEST_STATED_PX:
        pictures |= {"resolution_type": "pixel", "crop": True, "crop_style": "center", "crop_aspect": "square"}
    texts = {
        "id": "text-embeds",
        "type": "local",
        "dataset_type": "text_embeds",
        "default": True,
        "cache_dir": str(paths.cache_dir / "text"),
    }
    return [pictures, texts]


def choose_environment(config: TrainingConfig, paths: Paths) -> dict[str, str]:
    env = {
        "CONFIG_BACKEND": "json",
        "CONFIG_PATH": str(paths.config),
        "SIMPLETUNER_JOB_ID": config.job_id,
        "SIMPLETUNER_LOG_LEVEL": "INFO",
        "TOKENIZERS_PARALLELISM": "false",
    }
    is_folder = Path(config.base_path).is_absolute() or Path(config.base_path).is_dir()
    if is_folder and config.family not in FETCHING_FAMILIES:
        # Everything is in the folder, or nowhere; without this it asks the network, and waits where there is none.
        env |= dict.fromkeys(OFFLINE_NAMES, "1")
    return env


def write_json(path: Path, content: object) -> None:
    """Readable by us alone, as the webhook's address holds a secret."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
