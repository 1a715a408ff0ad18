"""Whole trainings: with the small model's real trainer, and with a program that misbehaves on demand."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from local.tinyflux.lora import read_lora
from local.tinyflux.train_job import JobConfig, scale_rate
from local.tinyflux.weights import load_transformer
from tests.training_parts import Recorder, find_processes, make_config, wait_for
from trainer_worker.checkpoints import OPTIMIZER_NAME, WEIGHTS_NAME, find_checkpoints
from trainer_worker.config import TrainingConfig
from trainer_worker.launch import Launch
from trainer_worker.process import Limits
from trainer_worker.progress import Checkpoint, Completed, Failed, Interrupted, Notice, Sample, Stage, Step
from trainer_worker.train import Outcome, train
from trainer_worker.trainers import Trainer
from trainer_worker.trainers.tiny import TinyTrainer

ROOT = Path(__file__).parents[1]
LIMITS = Limits(stall_s=60, total_s=120, grace_s=20)
PROMPT = "TOK on a green background"


@dataclass
class ScriptTrainer:
    """Runs tests/trainer_child.py."""

    how: str
    env: dict[str, str] = field(default_factory=dict)

    def prepare(self, config: TrainingConfig, webhook_url: str) -> Launch:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(ROOT / "tests" / "trainer_child.py"), self.how, webhook_url]
        return Launch(command, self.env, config.output_dir, config.output_dir / "log")

    def find_final(self, config: TrainingConfig) -> Path | None:
        return None

    def find_checkpoints(self, config: TrainingConfig) -> list[tuple[int, Path]]:
        return []


def run(trainer: Trainer, config: TrainingConfig, recorder: Recorder, limits: Limits = LIMITS) -> Outcome:
    outcome = train(trainer, config, recorder, recorder.should_stop, limits)
    assert find_processes(config.output_dir) == []
    return outcome


def test_the_small_trainer_makes_a_lora_and_tells_of_it(tmp_path: Path) -> None:
    config, recorder = make_config(tmp_path, sample_prompts=(PROMPT,)), Recorder()
    outcome = run(TinyTrainer(), config, recorder)
    assert (outcome.status, outcome.failure) == ("completed", None), outcome.log_tail
    assert outcome.final == config.output_dir / WEIGHTS_NAME
    lora = read_lora(outcome.final, load_transformer())
    assert (len(lora.changes), lora.unknown_keys) == (31, ())
    assert any(change.up.abs().sum() > 0 for change in lora.changes.values())
    with safe_open(outcome.final, "pt") as file:
        assert file.metadata()["fluxgate.trigger_word"] == "TOK"
    steps = recorder.of(Step)
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [step.epoch for step in steps] == [1, 1, 2, 2, 3, 3]
    assert all(step.steps == 6 and step.loss and step.learning_rate == 3e-3 for step in steps)
    assert [checkpoint.step for checkpoint in recorder.of(Checkpoint)] == [2, 4, 6]
    assert [(sample.step, sample.prompt) for sample in recorder.of(Sample)] == [(3, PROMPT), (6, PROMPT)]
    (tmp_path / "sample.png").write_bytes(recorder.of(Sample)[0].image)
    with Image.open(tmp_path / "sample.png") as picture:
        assert picture.size == (256, 256)
    assert Stage("init_vae_cache", "running", 4, 4, "Vae cache") in recorder.events
    assert recorder.events[-1] == Completed()
    assert "6/6" in outcome.log_tail


def test_old_checkpoints_are_deleted(tmp_path: Path) -> None:
    config = make_config(tmp_path, checkpoint_every=1, checkpoints_kept=2)
    assert run(TinyTrainer(), config, Recorder()).status == "completed"
    assert [step for step, _ in find_checkpoints(config.output_dir)] == [6, 5]


def test_cancel_keeps_the_last_checkpoint_and_resume_ends_where_an_unbroken_run_does(tmp_path: Path) -> None:
    unbroken = run(TinyTrainer(), make_config(tmp_path, output_dir=tmp_path / "unbroken"), Recorder())
    long = make_config(tmp_path, steps=10_000)
    recorder = Recorder(stop_at=lambda event: isinstance(event, Checkpoint) and event.step == 4)
    outcome = run(TinyTrainer(), long, recorder)
    assert outcome.status == "interrupted", outcome.log_tail
    assert outcome.failure is not None
    assert outcome.failure.code == "interrupted"
    assert recorder.of(Interrupted)
    # What was saved between the request and the stop is not wanted here.
    for step, folder in TinyTrainer().find_checkpoints(long):
        if step > 4:
            folder.rename(folder.with_name("later"))
    break_checkpoint(long.output_dir / "checkpoint-4")

    recorder = Recorder()
    resumed = run(TinyTrainer(), make_config(tmp_path, resume=True), recorder)
    assert resumed.status == "completed", resumed.log_tail
    assert [step.step for step in recorder.of(Step)] == [3, 4, 5, 6]
    assert Notice("Resumed from global_step 2") in recorder.events
    assert unbroken.final is not None
    assert resumed.final is not None
    assert read_tensors(resumed.final) == read_tensors(unbroken.final)


def test_resume_after_the_last_step_writes_the_weights_again(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    first = run(TinyTrainer(), config, Recorder())
    assert first.final is not None
    tensors = read_tensors(first.final)
    recorder = Recorder()
    again = run(TinyTrainer(), make_config(tmp_path, resume=True), recorder)
    assert again.final is not None
    assert recorder.of(Step) == []
    assert read_tensors(again.final) == tensors


def break_checkpoint(folder: Path) -> None:
    """What a kill in the middle of saving leaves."""
    path = folder / OPTIMIZER_NAME
    path.write_bytes(path.read_bytes()[:-50])


def read_tensors(path: Path) -> dict[str, list[float]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key).flatten().tolist() for key in file.keys()}  # noqa: SIM118 - the file is not a mapping


@pytest.mark.parametrize(
    ("changes", "code", "word"),
    [
        ({"base_path": "/models/nowhere"}, "model_not_found", "/models/nowhere"),
        ({"batch_size": 20}, "dataset", "zero usable batches"),
        ({"lr_scheduler": "sine"}, "crashed", "lr_scheduler is 'sine'"),
    ],
)
def test_a_failure_has_its_class_and_reason(tmp_path: Path, changes: dict[str, object], code: str, word: str) -> None:
    outcome = run(TinyTrainer(), make_config(tmp_path, **changes), Recorder())
    assert outcome.status == "failed"
    assert outcome.failure is not None
    assert outcome.failure.code == code
    assert word in outcome.failure.message


def test_a_missing_caption_is_named(tmp_path: Path) -> None:
    config, recorder = make_config(tmp_path), Recorder()
    (config.data_dir / "02.txt").unlink()
    outcome = run(TinyTrainer(), config, recorder)
    assert outcome.failure is not None
    assert outcome.failure.code == "dataset"
    assert "02.txt" in outcome.failure.message
    assert "FileNotFoundError" in recorder.of(Failed)[0].traceback


def test_a_killed_worker_takes_the_trainer_along(tmp_path: Path) -> None:
    make_config(tmp_path)
    program = (
        "import sys, threading; from pathlib import Path; from tests.training_parts import make_config; "
        "from trainer_worker.train import train; from trainer_worker.trainers.tiny import TinyTrainer; "
        "train(TinyTrainer(), make_config(Path(sys.argv[1]), steps=10000), lambda event: print(event, flush=True), threading.Event())"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert any(line.startswith("Step(") for line in worker.stdout)
        assert find_processes(tmp_path)
        worker.kill()
    wait_for(lambda: not find_processes(tmp_path), "nothing runs in the job's folder")


def test_steps_are_read_from_the_log_when_no_webhook_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer_worker.train.QUIET_S", 0.0)
    recorder = Recorder()
    run(ScriptTrainer("log_only"), make_config(tmp_path), recorder)
    assert recorder.events == [Step(n, 4, n / 10, 0.0001, 1) for n in (1, 2, 3, 4)]


def test_an_exit_without_weights_is_no_success(tmp_path: Path) -> None:
    outcome = run(ScriptTrainer("exit_well"), make_config(tmp_path), Recorder())
    assert outcome.status == "failed"
    assert outcome.failure is not None
    assert outcome.failure.message == "ValueError: nothing was trained"


def test_a_reported_failure_is_told_without_its_secrets(tmp_path: Path) -> None:
    recorder = Recorder()
    outcome = run(ScriptTrainer("report_and_crash"), make_config(tmp_path), recorder)
    assert outcome.failure is not None
    assert (outcome.failure.code, outcome.failure.message) == ("out_of_memory", "it broke")
    assert recorder.events == [Failed("it broke", "RuntimeError: CUDA out of memory. ***")]


def test_the_log_tail_holds_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token-of-no-known-shape")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-for-trainers")
    outcome = run(ScriptTrainer("leak"), make_config(tmp_path), Recorder())
    words = outcome.log_tail.split()
    assert words[:3] == ["***", "None", "https://***@host/"]
    assert words[3].endswith("/hook/***")


def test_a_killed_trainer_is_told_as_such(tmp_path: Path) -> None:
    outcome = run(ScriptTrainer("kill_itself"), make_config(tmp_path), Recorder())
    assert outcome.failure is not None
    assert (outcome.status, outcome.failure.code) == ("failed", "out_of_memory")


def test_a_silent_trainer_is_cut_off(tmp_path: Path) -> None:
    outcome = run(ScriptTrainer("obey"), make_config(tmp_path), Recorder(), Limits(stall_s=0.5, total_s=60, grace_s=20))
    assert outcome.failure is not None
    assert (outcome.status, outcome.failure.code) == ("failed", "stalled")


def test_an_error_of_the_listener_ends_the_trainer_and_is_passed_on(tmp_path: Path) -> None:
    def refuse(event: object) -> None:
        raise LookupError(event)

    config = make_config(tmp_path, steps=10_000)
    with pytest.raises(LookupError):
        train(TinyTrainer(), config, refuse, Recorder().should_stop, LIMITS)
    assert find_processes(config.output_dir) == []


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "shares"),
    [
        ("constant", 0, [1, 1, 1]),
        ("constant_with_warmup", 10, [0.1, 1, 1]),
        ("linear", 0, [1, 0.5, 0.1]),
        ("cosine", 0, [1, 0.5, 0.1]),
    ],
)
def test_schedules(tmp_path: Path, schedule: str, warmup_steps: int, shares: list[float]) -> None:
    config = make_config(tmp_path, steps=100, lr_scheduler=schedule, warmup_steps=warmup_steps)
    launch = TinyTrainer().prepare(config, "")
    job = JobConfig.read(Path(launch.command[-1]))
    assert [scale_rate(job, step) for step in (0, 50, 99)] == pytest.approx(shares, abs=1e-3)
    assert os.stat(launch.command[-1]).st_mode & 0o777 == 0o600
