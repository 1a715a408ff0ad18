"""From a training job to what the trainer is told, and which trainer it is."""

from __future__ import annotations

from pathlib import Path

from gateway.datasets.records import DEFAULT_VIDEO_FRAMES
from gateway.jobs.model import Job
from gateway.settings import Settings
from trainer_worker.config import TrainingConfig
from trainer_worker.trainers import Trainer
from trainer_worker.trainers.simpletuner import SimpleTunerTrainer
from trainer_worker.trainers.tiny import TinyTrainer


def choose_trainer(settings: Settings) -> Trainer:
    """The trainer of this deployment. ValueError says which setting is missing."""
    if settings.trainer == "tiny":
        return TinyTrainer()
    if settings.simpletuner_python is None:
        raise ValueError("SIMPLETUNER_PYTHON does not name the interpreter of an environment that has SimpleTuner")
    return SimpleTunerTrainer(settings.simpletuner_python)


def base_path_of(job: Job, settings: Settings) -> str:
    """A folder in diffusers layout, or a Hugging Face repository."""
    return settings.base_model_paths.get(job.spec.base_model, str(job.spec.parameters["source"]))


def find_base_fault(base_path: str) -> str | None:
    """What is wrong with a base that is a folder; None for a good one, and for a repository, of which only the trainer can say."""
    if Path(base_path).is_absolute() and not Path(base_path).is_dir():
        return f"There is no folder {base_path!r} on the trainer's machine."
    return None


def plan_training(job: Job, settings: Settings, folder: Path, *, resume: bool) -> TrainingConfig:
    """The job's parameters as the trainer's configuration; `folder` is the training's own."""
    asked = job.spec.parameters
    return TrainingConfig(
        job_id=job.id,
        family=str(asked["family"]),
        base_path=base_path_of(job, settings),
        data_dir=folder / "data",
        output_dir=folder / "output",
        steps=int(asked["steps"]),
        learning_rate=float(asked["learning_rate"]),
        rank=int(asked["rank"]),
        alpha=int(asked["rank"]),
        resolution=int(asked["resolution"]),
        batch_size=int(asked["batch_size"]),
        repeats=int(asked["repeats"]),
        lr_scheduler=str(asked["lr_scheduler"]),
        warmup_steps=int(asked["warmup"]),
        optimizer=str(asked["optimizer"]),
        precision=str(asked.get("precision") or "bf16"),
        gradient_checkpointing=bool(asked["gradient_checkpointing"]),
        checkpoint_every=int(asked["checkpoint_every"]),
        sample_prompts=tuple(asked["sample_prompts"]),
        sample_every=int(asked["sample_every"]),
        seed=int(asked["seed"]),
        trigger_word=str(asked["trigger_word"] or ""),
        resume=resume,
        flavour=str(asked.get("flavour") or ""),
        video_frames=int(asked.get("video_frames") or DEFAULT_VIDEO_FRAMES),
    )
