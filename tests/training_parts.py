"""Small data sets, training configurations, and who still runs in a folder."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import pytest

from local.tinyflux.make.scenes import draw_concept
from local.tinyflux.weights import MODEL_DIR
from trainer_worker.config import TrainingConfig
from trainer_worker.progress import TrainerEvent

PATIENCE_S = 60.0
EventType = TypeVar("EventType")


def make_dataset(folder: Path, count: int = 4) -> Path:
    """`count` captioned pictures of TOK."""
    folder.mkdir(parents=True)
    rng = Random(5)
    for number in range(count):
        picture, caption = draw_concept(rng)
        picture.save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(caption)
    return folder


def make_config(folder: Path, **changes: Any) -> TrainingConfig:
    """A training of the small model in `folder`, which gets its data on the first call."""
    data_dir = folder / "data"
    if not data_dir.exists():
        make_dataset(data_dir)
    values: dict[str, Any] = {
        "job_id": "job-1",
        "family": "tinyflux",
        "base_path": str(MODEL_DIR),
        "data_dir": data_dir,
        "output_dir": folder / "output",
        "steps": 6,
        "learning_rate": 3e-3,
        "rank": 4,
        "alpha": 4,
        "resolution": 128,
        "batch_size": 2,
        "gradient_checkpointing": False,
        "checkpoint_every": 2,
        "checkpoints_kept": 3,
        "sample_every": 3,
        "trigger_word": "TOK",
    }
    return TrainingConfig(**{**values, **changes})


def find_processes(folder: Path) -> list[int]:
    """Those that run in a folder or beneath it; a zombie runs nowhere."""
    if not os.path.isdir("/proc/self"):
        pytest.skip("who runs where is read from /proc")
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                place = Path(os.readlink(f"/proc/{name}/cwd"))
            except OSError:
                continue
            if place == folder or folder in place.parents:
                found.append(int(name))
    return found


def wait_for(is_so: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        if time.monotonic() > deadline:
            raise AssertionError(f"still not so after {PATIENCE_S:g} s: {what}")
        time.sleep(0.05)


class Recorder:
    """Keeps the events, and asks for a stop at the first that `stop_at` picks."""

    def __init__(self, stop_at: Callable[[TrainerEvent], bool] = lambda event: False) -> None:
        self.events: list[TrainerEvent] = []
        self.should_stop = threading.Event()
        self._stop_at = stop_at

    def __call__(self, event: TrainerEvent) -> None:
        self.events.append(event)
        if self._stop_at(event):
            self.should_stop.set()

    def of(self, kind: type[EventType]) -> list[EventType]:
        return [event for event in self.events if isinstance(event, kind)]
