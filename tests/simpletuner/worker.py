"""A worker to be killed: `worker.py PYTHON FOLDER` trains the small model with SimpleTuner and prints each step."""

import sys
import threading
from pathlib import Path

from tests.training_parts import make_config
from trainer_worker.train import train
from trainer_worker.trainers.simpletuner import SimpleTunerTrainer

if __name__ == "__main__":
    config = make_config(Path(sys.argv[2]), steps=500, repeats=400)
    train(SimpleTunerTrainer(Path(sys.argv[1])), config, lambda event: print(event, flush=True), threading.Event())
