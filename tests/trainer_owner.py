"""A worker to be killed: `trainer_owner.py HOW FOLDER` runs that child and says when it is ready."""

import os
import sys
from pathlib import Path

from tests.test_trainer_process import command
from trainer_worker.process import run_child

if __name__ == "__main__":
    folder = Path(sys.argv[2])
    run_child(
        command(sys.argv[1]),
        os.environ,
        folder / "log",
        cwd=folder,
        hear=lambda lines: "ready" in lines and bool(print("ready", flush=True)),
    )
