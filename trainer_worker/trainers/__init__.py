"""What each trainer must be able to do. Which one a deployment has: `trainer_worker.plan.choose_trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from trainer_worker.config import TrainingConfig
from trainer_worker.launch import Launch


class Trainer(Protocol):
    """Turns a training into a command, and knows where its results lie. It does not run anything itself."""

    def prepare(self, config: TrainingConfig, webhook_url: str) -> Launch:
        """Write what the trainer reads, clear what would mislead it; ValueError when it cannot train this."""
        ...

    def find_final(self, config: TrainingConfig) -> Path | None:
        """The final weights, if they are there and whole."""
        ...

    def find_checkpoints(self, config: TrainingConfig) -> list[tuple[int, Path]]:
        """(step, folder) of the checkpoints that can be continued from, newest first."""
        ...
