"""The real SimpleTuner on the small model, through our adapter: success, failures, cancel, resume, a killed worker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from local.tinyflux.lora import read_lora
from local.tinyflux.weights import load_transformer
from tests.training_parts import Recorder, find_processes, make_config, wait_for
from trainer_worker.checkpoints import ASIDE, WEIGHTS_NAME
from trainer_worker.config import TrainingConfig
from trainer_worker.process import Limits
from trainer_worker.progress import Checkpoint, Completed, Interrupted, Sample, Step
from trainer_worker.train import Outcome, train
from trainer_worker.trainers.simpletuner import SimpleTunerTrainer

ROOT = Path(__file__).parents[2]
LIMITS = Limits(stall_s=240, total_s=600, grace_s=20)
REPEATS = 20
PROMPT = "TOK on a green background"


@pytest.fixture(scope="module")
def trainer() -> SimpleTunerTrainer:
    return SimpleTunerTrainer(Path(os.environ["SIMPLETUNER_PYTHON"]))


def run(trainer: SimpleTunerTrainer, config: TrainingConfig, recorder: Recorder) -> Outcome:
    outcome = train(trainer, config, recorder, recorder.should_stop, LIMITS)
    assert find_processes(config.output_dir) == []
    return outcome


def test_success(trainer: SimpleTunerTrainer, tmp_path: Path) -> None:
    config, recorder = make_config(tmp_path, repeats=REPEATS, sample_prompts=(PROMPT,)), Recorder()
    outcome = run(trainer, config, recorder)
    assert outcome.status == "completed", outcome.log_tail
    assert outcome.final == config.output_dir / WEIGHTS_NAME
    lora = read_lora(outcome.final, load_transformer())
    assert (len(lora.changes), lora.unknown_keys) == (31, ())
    steps = recorder.of(Step)
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert all(step.steps == 6 and step.loss and step.learning_rate == 3e-3 for step in steps)
    assert [checkpoint.step for checkpoint in recorder.of(Checkpoint)] == [2, 4, 6]
    assert [(sample.step, sample.prompt) for sample in recorder.of(Sample)] == [(3, PROMPT), (6, PROMPT)]
    assert all(sample.image.startswith(b"\x89PNG") for sample in recorder.of(Sample))
    assert len(recorder.of(Completed)) == 1
    assert [step for step, _ in trainer.find_checkpoints(config)] == [6, 4, 2]


def test_a_bad_base_path_fails_as_such(trainer: SimpleTunerTrainer, tmp_path: Path) -> None:
    outcome = run(trainer, make_config(tmp_path, base_path=str(tmp_path / "nowhere")), Recorder())
    assert outcome.status == "failed"
    assert outcome.failure is not None
    assert outcome.failure.code == "model_not_found", (outcome.failure, outcome.log_tail)


def test_a_missing_caption_fails_as_the_dataset(trainer: SimpleTunerTrainer, tmp_path: Path) -> None:
    config = make_config(tmp_path, repeats=REPEATS)
    (config.data_dir / "01.txt").unlink()
    outcome = run(trainer, config, Recorder())
    assert outcome.status == "failed"
    assert outcome.failure is not None
    assert outcome.failure.code == "dataset", (outcome.failure, outcome.log_tail)
    assert "01" in outcome.failure.message


def test_too_few_pictures_fail_as_the_dataset(trainer: SimpleTunerTrainer, tmp_path: Path) -> None:
    outcome = run(trainer, make_config(tmp_path, batch_size=20), Recorder())
    assert outcome.failure is not None
    assert (outcome.status, outcome.failure.code) == ("failed", "dataset"), (outcome.failure, outcome.log_tail)


def test_cancel_keeps_the_checkpoints_and_resume_takes_the_newest_whole_one(trainer: SimpleTunerTrainer, tmp_path: Path) -> None:
    recorder = Recorder(stop_at=lambda event: isinstance(event, Step) and event.step == 5)
    outcome = run(trainer, make_config(tmp_path, steps=200, repeats=REPEATS * 10), recorder)
    assert outcome.status == "interrupted", outcome.log_tail
    assert recorder.of(Interrupted)
    kept = trainer.find_checkpoints(make_config(tmp_path))
    newest = kept[0][0]
    assert newest >= 4
    # What a kill in the middle of saving leaves.
    optimizer = kept[0][1] / "optimizer.bin"
    optimizer.write_bytes(optimizer.read_bytes()[:-50])

    config, recorder = make_config(tmp_path, steps=newest + 2, repeats=REPEATS * 10, resume=True), Recorder()
    outcome = run(trainer, config, recorder)
    assert outcome.status == "completed", outcome.log_tail
    assert recorder.of(Step)[0].step == kept[1][0] + 1
    assert (config.output_dir / f"{ASIDE}checkpoint-{newest}").is_dir()


def test_resume_after_the_last_step_writes_the_weights_again(trainer: SimpleTunerTrainer, tmp_path: Path) -> None:
    """As after a crash between the last checkpoint and the final file."""
    config = make_config(tmp_path, steps=2, repeats=REPEATS)
    first = run(trainer, config, Recorder())
    assert first.final is not None, first.log_tail
    first.final.unlink()
    again = run(trainer, make_config(tmp_path, steps=2, repeats=REPEATS, resume=True), Recorder())
    assert (again.status, again.final) == ("completed", first.final), again.log_tail


def test_a_killed_worker_takes_the_trainer_along(tmp_path: Path) -> None:
    make_config(tmp_path)
    command = [sys.executable, "-m", "tests.simpletuner.worker", os.environ["SIMPLETUNER_PYTHON"], str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert any(line.startswith("Step(") for line in worker.stdout)
        assert find_processes(tmp_path)
        worker.kill()
    wait_for(lambda: not find_processes(tmp_path), "nothing runs in the job's folder")
