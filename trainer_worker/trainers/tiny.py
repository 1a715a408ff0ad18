"""The built-in small model's own trainer: a child that speaks SimpleTuner's webhook and leaves files of the same names.

It knows that program by its command line alone, and the model as a folder.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from trainer_worker.checkpoints import WEIGHTS_NAME, find_checkpoints, find_final_weights, set_broken_aside
from trainer_worker.config import TrainingConfig
from trainer_worker.launch import Launch

PROGRAM = "local.tinyflux.train_job"
PROJECT_DIR = Path(__file__).parents[2]


class TinyTrainer:
    """`python` is an interpreter that has torch; the worker's own, unless another is named."""

    def __init__(self, python: Path | None = None) -> None:
        self._python = python or Path(sys.executable)

    def prepare(self, config: TrainingConfig, webhook_url: str) -> Launch:
        if config.family != "tinyflux":
            raise ValueError(f"family is {config.family!r}; allowed for the small model's trainer: tinyflux")
        config.output_dir.mkdir(parents=True, exist_ok=True)
        (config.output_dir / WEIGHTS_NAME).unlink(missing_ok=True)
        set_broken_aside(config.output_dir)
        checkpoints = find_checkpoints(config.output_dir) if config.resume else []
        content = {**asdict(config), "webhook_url": webhook_url, "resume_from": str(checkpoints[0][1]) if checkpoints else None}
        path = config.output_dir / "config.json"
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, default=str)
        return Launch(
            command=[str(self._python), "-m", PROGRAM, str(path)],
            # One thread: the machine that needs this trainer has other things to do.
            env={"PYTHONPATH": str(PROJECT_DIR), "OMP_NUM_THREADS": "1"},
            cwd=config.output_dir,
            log_path=config.output_dir / "trainer.log",
        )

    def find_final(self, config: TrainingConfig) -> Path | None:
        return find_final_weights(config.output_dir)

    def find_checkpoints(self, config: TrainingConfig) -> list[tuple[int, Path]]:
        return find_checkpoints(config.output_dir)
