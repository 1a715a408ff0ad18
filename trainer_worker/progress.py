"""What a trainer says while it runs, and how SimpleTuner's raw webhook and its log spell it.

The shapes are those recorded from SimpleTuner 3.1.6; our own small trainer speaks the same.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Payload = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """A part of the work. `name` is SimpleTuner's key (init_vae_cache, checkpoint_save, ...), or "training"."""

    name: str
    status: str  # running, completed, failed
    current: int = 0
    total: int = 0  # 0: not told
    label: str = ""  # for people


@dataclass(frozen=True)
class Step:
    step: int
    steps: int
    loss: float | None  # None: not told, or not a finite number
    learning_rate: float | None
    epoch: int


@dataclass(frozen=True)
class Checkpoint:
    step: int
    path: str


@dataclass(frozen=True)
class Sample:
    """A picture (or clip) drawn with the weights so far. The trainer names the prompt by a nickname, and not the step (0 then)."""

    step: int
    prompt: str
    image: bytes
    media_type: str = "image/png"


@dataclass(frozen=True)
class Notice:
    message: str


@dataclass(frozen=True)
class Failed:
    message: str
    traceback: str = ""


@dataclass(frozen=True)
class Interrupted:
    """It stopped because it was asked to."""


@dataclass(frozen=True)
class Completed:
    """All steps are done and the final weights are written."""


TrainerEvent = Stage | Step | Checkpoint | Sample | Notice | Failed | Interrupted | Completed

# The training configuration is sent as a notification twice; it names paths of this machine and says nothing new.
DULL_TITLES = ("Training Config",)
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
# Epoch 1/1, Steps:  50%|###   | 5/10 [00:00<00:00, lr=0.0001, step_loss=1.62]
TQDM_STEP = re.compile(r"Epoch (?P<epoch>\d+)/\d+,? Steps:.*\| *(?P<step>\d+)/(?P<steps>\d+) \[(?P<rest>[^\]]*)\]?")
TQDM_VALUE = re.compile(r"\b(lr|step_loss)=([-+.\deE]+|nan|inf)")


def read_webhook(payload: Payload) -> TrainerEvent | None:
    """One raw webhook body -> what it says; None for what says nothing here, such as log messages. Never raises."""
    reader = READERS.get(str(payload.get("type")))
    return reader(payload) if reader else None


def read_log_line(line: str) -> TrainerEvent | None:
    """A tqdm line -> the step it shows. For when no webhook arrives."""
    found = TQDM_STEP.search(line)
    if found is None:
        return None
    values = dict(TQDM_VALUE.findall(found["rest"]))
    return Step(
        int(found["step"]),
        int(found["steps"]),
        as_finite(values.get("step_loss")),
        as_finite(values.get("lr")),
        int(found["epoch"]),
    )


def read_stage(payload: Payload) -> TrainerEvent | None:
    stage = as_mapping(payload.get("stage"))
    progress = as_mapping(stage.get("progress"))
    name, status = str(stage.get("key") or ""), str(stage.get("status") or "")
    if not name:
        return None
    if (name, status) == ("training_complete", "completed"):
        return Completed()
    label = str(stage.get("label") or progress.get("label") or "")
    return Stage(name, status, as_count(progress.get("current")), as_count(progress.get("total")), label)


def read_status(payload: Payload) -> TrainerEvent | None:
    """Running states stand under `data`, endings at the top."""
    data, progress = as_mapping(payload.get("data")), as_mapping(payload.get("progress"))
    status = payload.get("status") or data.get("status")
    if status == "failed":
        return Failed(str(payload.get("error") or "the trainer gave no reason"), str(payload.get("traceback") or ""))
    if status == "interrupted":
        return Interrupted()
    if status != "running":
        return None
    metrics = as_mapping(progress.get("metrics"))
    if metrics.get("loss") is None:
        # The announcement before the first step.
        step, steps = as_count(data.get("global_step")), as_count(data.get("total_num_steps"))
        return Stage("training", "running", step, steps, "Training") if steps else None
    return Step(
        as_count(progress.get("current")),
        as_count(progress.get("total")),
        as_finite(metrics.get("loss")),
        # `data.lr` is 0 in every event that was recorded.
        as_finite(metrics.get("learning_rate")),
        as_count(metrics.get("epoch")),
    )


def read_checkpoint(payload: Payload) -> TrainerEvent | None:
    path = as_mapping(payload.get("checkpoint")).get("path")
    found = CHECKPOINT_NAME.fullmatch(Path(path).name) if isinstance(path, str) else None
    return Checkpoint(int(found[1]), str(path)) if found else None


def read_sample(payload: Payload) -> TrainerEvent | None:
    """The first picture, as one resolution is asked for and so one comes; the step stands there for our own trainer only."""
    prompt = str(payload.get("message") or "").removeprefix("Validation:").strip()
    step = as_count(as_mapping(payload.get("data")).get("global_step"))
    for kind, media_type in (("images", "image/png"), ("videos", "video/mp4")):
        items = payload.get(kind)
        first = items[0] if isinstance(items, list) and items else None
        content = decode_media(first.get("src") if isinstance(first, dict) else first)
        if content:
            return Sample(step, prompt, content, media_type)
    return None


def read_notice(payload: Payload) -> TrainerEvent | None:
    message = payload.get("message")
    if not isinstance(message, str) or not message.strip() or payload.get("title") in DULL_TITLES:
        return None
    return Notice(message.strip())


READERS = {
    "lifecycle.stage": read_stage,
    "training.status": read_status,
    "training.checkpoint": read_checkpoint,
    "training.validation": read_sample,
    "notification": read_notice,
}


def decode_media(text: object) -> bytes | None:
    """Base64, bare or as a data URI."""
    if not isinstance(text, str):
        return None
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except ValueError:  # binascii's own is one, and so is what it says of letters beyond ASCII
        return None


def as_mapping(value: object) -> Payload:
    return value if isinstance(value, dict) else {}


def as_count(value: object) -> int:
    number = as_finite(value)
    return int(number) if number is not None and number > 0 else 0


def as_finite(value: object) -> float | None:
    """A finite number, also from text; JSON here may hold NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
