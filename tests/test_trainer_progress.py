"""What SimpleTuner said in a recorded run, event for event, and what may come over the wire besides."""

from __future__ import annotations

import base64
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer_worker.progress import (
    READERS,
    Checkpoint,
    Completed,
    Failed,
    Interrupted,
    Notice,
    Sample,
    Stage,
    Step,
    TrainerEvent,
    read_log_line,
    read_webhook,
)

RECORDED = Path(__file__).parent / "data" / "simpletuner" / "events.jsonl"
PICTURE = b"\x89PNG picture"


@pytest.fixture(scope="module")
def recorded() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDED.read_text().splitlines()]


def test_every_recorded_event_is_read(recorded: list[dict[str, Any]]) -> None:
    events = [read_webhook(payload) for payload in recorded]
    assert len(events) == 52
    assert Counter(type(event) for event in events) == {Stage: 29, Step: 12, Notice: 6, Checkpoint: 2, type(None): 2, Completed: 1}
    assert [payload["title"] for payload, event in zip(recorded, events, strict=True) if event is None] == ["Training Config"] * 2


def test_the_recorded_run_tells_its_steps_checkpoints_and_end(recorded: list[dict[str, Any]]) -> None:
    events = [read_webhook(payload) for payload in recorded]
    steps = [event for event in events if isinstance(event, Step)]
    # Steps 5 and 10 come again after their checkpoint.
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]
    assert steps[0] == Step(1, 10, 1.545503854751587, 0.0001, 1)
    assert [event for event in events if isinstance(event, Checkpoint)] == [
        Checkpoint(5, "/jobs/job/output/checkpoint-5"),
        Checkpoint(10, "/jobs/job/output/checkpoint-10"),
    ]
    assert Stage("training", "running", 0, 10, "Training") in events
    assert Stage("init_cache_text_embeds_status_update", "running", 3, 8, "") in events
    assert Stage("init_vae_cache", "completed", 1, 1, "VAE Cache initialising") in events
    assert events[-1] == Completed()


def test_endings_stand_at_the_top_of_their_payload() -> None:
    failed = {"type": "training.status", "status": "failed", "error": "no", "traceback": "Traceback ..."}
    assert read_webhook(failed) == Failed("no", "Traceback ...")
    assert read_webhook({"type": "training.status", "status": "failed"}) == Failed("the trainer gave no reason")
    assert read_webhook({"type": "training.status", "status": "interrupted"}) == Interrupted()


def test_a_sample_is_the_first_picture_or_clip() -> None:
    text = base64.b64encode(PICTURE).decode()
    payload = {"type": "training.validation", "message": "Validation: sample_1", "images": [text, "x"]}
    assert read_webhook(payload) == Sample(0, "sample_1", PICTURE)
    assert read_webhook({**payload, "data": {"global_step": 7}}) == Sample(7, "sample_1", PICTURE)
    clip = {"type": "training.validation", "message": "Validation: a", "videos": [{"src": f"data:video/mp4;base64,{text}"}]}
    assert read_webhook(clip) == Sample(0, "a", PICTURE, "video/mp4")
    for images in ([], None, ["not base64!"], [3], "x"):
        assert read_webhook({**payload, "images": images}) is None


@pytest.mark.parametrize("loss", ["nan", "inf", float("nan"), [1], True, {}])
def test_a_loss_that_is_no_number_is_none(loss: object) -> None:
    metrics = {"loss": loss, "learning_rate": 1e-4, "epoch": 1}
    payload = {"type": "training.status", "data": {"status": "running"}, "progress": {"current": 3, "total": 9, "metrics": metrics}}
    assert read_webhook(payload) == Step(3, 9, None, 1e-4, 1)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["key", "status", "current", "path", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = ("stage", "data", "progress", "checkpoint", "images", "videos", "message", "title", "status", "error")


@given(st.fixed_dictionaries({"type": st.sampled_from([*READERS, "other"])}, optional=dict.fromkeys(FIELDS, JSON_VALUES)))
def test_no_payload_breaks_the_reader(payload: dict[str, Any]) -> None:
    assert isinstance(read_webhook(payload), TrainerEvent | None)


@pytest.mark.parametrize(
    ("line", "step"),
    [
        ("Epoch 1/1, Steps:  50%|█████     | 5/10 [00:00<00:00,  9.01it/s, lr=0.0001, step_loss=1.62]", Step(5, 10, 1.62, 0.0001, 1)),
        (
            "Epoch 2/3, Steps: 100%|███| 20/20 [00:12<00:00,  2.23it/s, grad_absmax=0.00964, lr=0.003, step_loss=0.581]",
            Step(20, 20, 0.581, 0.003, 2),
        ),
        ("Epoch 1/1 Steps:   0%|          | 0/20 [00:00<?, ?it/s]", Step(0, 20, None, None, 1)),
        ("Epoch 1/1, Steps:  10%|#| 1/10 [00:01<?, lr=1e-05, step_loss=nan]", Step(1, 10, None, 1e-5, 1)),
    ],
)
def test_a_progress_bar_is_read(line: str, step: Step) -> None:
    assert read_log_line(line) == step


@pytest.mark.parametrize("line", ["", "Loading pipeline components...:  43%|####| 3/7 [00:00<00:00]", "Epoch 1/1, Steps: soon"])
def test_other_lines_say_nothing(line: str) -> None:
    assert read_log_line(line) is None
