"""Train, then generate, as the README tells it: a zip of pictures, a training that tells its loss, a LoRA by name in the next request.
The trainer is the small one, with few steps: that the LoRA is good is not asked here, that it is applied is."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import redis

from local.services import S3Server
from tests.journeys.api import wait_until
from tests.journeys.studio import ENDED, PATIENCE_S, Studio, running_studio, zip_pictures
from tests.webhook_receiver import Receiver

# Two LoRAs have room in the instance's folder.
SETTINGS = {"TRAINER": "tiny", "SHARED_GPU": "the-only-one", "LORA_DIR_MAX_BYTES": "400000", "LORA_DIR_MIN_FREE_BYTES": "0"}


@pytest.fixture(scope="module")
def studio(redis_server: str, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with running_studio(redis_server, s3_server, tmp_path_factory.mktemp("studio"), **SETTINGS) as running:
        yield running


def test_a_trained_lora_is_used_by_name_in_the_next_request(studio: Studio, receiver: Receiver) -> None:
    job = studio.train(webhook=receiver.url())
    done = studio.wait(job["id"])
    assert done["status"] == "succeeded", done
    assert done["lora"] == "thing"
    assert studio.told(receiver, job["id"]) == ("training", job["id"], "succeeded")
    assert (done["plan"]["precision"], done["access"]) == ("bf16", "not asked")
    events = studio.events(job["id"])
    assert studio.steps(job["id"]) == [1, 2, 3, 4, 5, 6]
    assert [data["step"] for _, kind, data in events if kind == "checkpoint"] == [3, 6]
    samples = [data for _, kind, data in events if kind == "sample"]
    assert samples
    assert [data["plan"] for _, kind, data in events if kind == "log" and "plan" in data] == [done["plan"]]
    assert httpx.get(samples[0]["url"]).content.startswith(b"\x89PNG")
    assert [data["status"] for _, kind, data in events if kind == "status"][-1] == "succeeded"
    lora = studio.http.get("/v1/loras/thing").json()
    assert (lora["family"], lora["training"], lora["rank"], bool(lora["ready_on"])) == ("tinyflux", job["id"], 4, True)
    assert httpx.get(lora["url"]).status_code == 200
    assert studio.generate(0.0) != studio.generate(1.0)
    half = len(events) // 2
    assert [event[:2] for event in studio.events(job["id"], after=events[half][0])] == [event[:2] for event in events[half + 1 :]]


def test_before_and_after_pictures_are_drawn(studio: Studio) -> None:
    """Of the LoRA that was trained above."""
    lora = studio.wait_for_pictures("thing")
    assert httpx.get(lora["before"]).content != httpx.get(lora["after"]).content


def test_a_cancel_keeps_the_checkpoint_and_a_resume_goes_on_from_it(studio: Studio, receiver: Receiver) -> None:
    job = studio.train(name="stopped", steps=4000, webhook=receiver.url())
    studio.wait_for_step(job["id"], 4)
    assert studio.http.post(f"/v1/trainings/{job['id']}/cancel").json()["status"] in ("canceling", "canceled")
    assert studio.wait(job["id"])["status"] == "canceled"
    assert studio.told(receiver, job["id"]) == ("training", job["id"], "canceled")
    resumed = studio.http.post(f"/v1/trainings/{job['id']}/resume").json()
    studio.wait_for_step(resumed["id"], 4)
    studio.http.post(f"/v1/trainings/{resumed['id']}/cancel")
    studio.wait(resumed["id"])
    assert studio.told(receiver, resumed["id"]) == ("training", resumed["id"], "canceled"), "it keeps the webhook"
    assert studio.steps(resumed["id"])[0] > 3, "it began after the checkpoint of step 3"


def test_a_killed_worker_costs_no_training(studio: Studio) -> None:
    job = studio.train(name="survivor", steps=60, checkpoint_every=5)
    studio.wait_for_step(job["id"], 6)
    studio.worker.kill()
    studio.worker.start()
    studio.worker.wait_ready()
    done = studio.wait(job["id"])
    assert (done["status"], done["lora"]) == ("succeeded", "survivor")
    assert done["attempts"] >= 2


def test_a_worker_that_is_told_to_stop_hands_its_training_over(studio: Studio) -> None:
    job = studio.train(name="handed-over", steps=20, checkpoint_every=5)
    studio.wait_for_step(job["id"], 6)
    os.kill(studio.worker.pid, signal.SIGTERM)
    wait_until(lambda: not studio.worker.is_alive(), "the worker's end, long before the training's")
    assert studio.http.get(f"/v1/trainings/{job['id']}").json()["status"] == "running"
    studio.worker.stop()
    studio.worker.start()
    studio.worker.wait_ready()
    done = studio.wait(job["id"])
    assert (done["status"], done["lora"], done["attempts"]) == ("succeeded", "handed-over", 1)
    steps = studio.steps(job["id"])
    assert len(steps) < 20 + 6, "it went on from a checkpoint"


def test_no_generation_starts_while_a_training_has_the_gpu(studio: Studio) -> None:
    training = studio.train(name="greedy", steps=40)
    studio.wait_for_step(training["id"], 1)
    waiting = studio.http.post("/v1/generations", json={"prompt": "a red circle", "steps": 1, "width": 256, "height": 256}).json()
    assert studio.http.get("/v1/instances").json()["data"][0]["state"] == "training"
    held = studio.http.get(f"/v1/generations/{waiting['id']}").json()
    assert (held["waiting_for"]["reason"], held["eta_s"], held["status"]) == ("training", None, "queued")
    ended = studio.wait(training["id"])
    assert ended["status"] == "succeeded", ended
    deadline = time.monotonic() + PATIENCE_S
    while (job := studio.http.get(f"/v1/generations/{waiting['id']}").json())["status"] not in ENDED:
        assert time.monotonic() < deadline, job
        time.sleep(0.1)
    assert (job["status"], job["waiting_for"]) == ("succeeded", None)
    steps = [event for event in studio.events(training["id"]) if event[1] == "progress" and event[2]["current_node"] == "training"]
    last_step_ms = int(steps[-1][0].partition("-")[0])
    began = httpx.get(job["urls"]["events"], timeout=PATIENCE_S).text
    started = next(block for block in began.split("\n\n") if '"status":"running"' in block and block.startswith("id: "))
    assert int(started.removeprefix("id: ").partition("-")[0]) > last_step_ms


@pytest.mark.parametrize(
    ("changes", "status", "code", "word"),
    [
        ({"dataset": "ds_none"}, 404, "dataset_not_found", "ds_none"),
        ({"batch_size": 64}, 422, "dataset_not_ready", "batch"),
        ({"alpha": 3}, 422, "invalid_parameter", "alpha"),
        ({"base": "flux1-dev"}, 422, "invalid_parameter", "base"),
        ({"base": "nonsense"}, 422, "base_model_not_found", "nonsense"),
        ({"name": "../x"}, 422, "invalid_parameter", "name"),
        ({"resume_from": "trn_none"}, 404, "job_not_found", "trn_none"),
        ({"lr_scheduler": "sine"}, 422, "invalid_parameter", "small trainer"),
        ({"lr_scheduler": "steep"}, 422, "invalid_parameter", "cosine"),
        ({"optimizer": "adam"}, 422, "invalid_parameter", "adamw_bf16"),
        ({"precision": "fp4"}, 422, "invalid_parameter", "nf4"),
        ({"warmup": 6}, 422, "invalid_parameter", "at most steps"),
        ({"video_frames": 49}, 422, "invalid_parameter", "video_frames"),
        ({"metadata": {"a": "x" * 20_000}}, 422, "invalid_parameter", "16384"),
        ({"learning_rate": 0}, 422, "invalid_parameter", "learning_rate"),
        ({"sample_prompts": [""]}, 422, "invalid_parameter", "sample_prompts"),
    ],
)
def test_what_would_fail_late_is_refused(studio: Studio, changes: dict[str, Any], status: int, code: str, word: str) -> None:
    body = {"name": "thing", "dataset": studio.dataset, "steps": 5, "resolution": 128, "batch_size": 5, **changes}
    answer = studio.http.post("/v1/trainings", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    assert word in error["message"] or word in json.dumps(error["details"])


def test_a_lora_that_was_taken_away_comes_back_before_the_job_that_needs_it(studio: Studio) -> None:
    """Two of those that were trained above have room."""
    folder = studio.engine.base_dir / "models" / "loras"
    published = [lora["file"] for lora in studio.http.get("/v1/loras").json()["data"] if lora["training"]]
    assert len(published) >= 3
    with redis.Redis.from_url(studio.redis_url) as connection:
        # As if nobody had used them for long.
        connection.hset("fluxgate:lora_used", mapping=dict.fromkeys(published, 1))
    wait_until(lambda: sum((folder / file).exists() for file in published) <= 2, "no more than two are left")
    gone = next(file for file in published if not (folder / file).exists())
    assert studio.generate(1.0, lora=gone) != studio.generate(0.0, lora=gone)
    assert (folder / gone).exists()


def test_a_try_again_gets_the_first_answer_whatever_has_changed(studio: Studio) -> None:
    files = {"files": ("pictures.zip", zip_pictures(5), "application/zip")}
    dataset = studio.http.post("/v1/datasets", data={"trigger_word": "TOK"}, files=files).json()["id"]
    body = {"name": "once", "dataset": dataset, "steps": 1, "resolution": 128, "sample_every": 1, "sample_prompts": ["TOK"]}
    headers = {"Idempotency-Key": "once"}
    first = studio.http.post("/v1/trainings", json=body, headers=headers)
    assert studio.wait(first.json()["id"])["status"] == "succeeded"
    studio.http.delete(f"/v1/datasets/{dataset}")
    again = studio.http.post("/v1/trainings", json=body, headers=headers)
    assert (again.status_code, again.json()) == (202, first.json())
    assert again.headers["Idempotency-Replayed"] == "true"
    other = studio.http.post("/v1/trainings", json={**body, "steps": 2}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reuse")
    sample = next(data for _, kind, data in studio.events(first.json()["id"]) if kind == "sample")
    assert httpx.get(sample["url"]).status_code == 200
    assert studio.http.delete(f"/v1/trainings/{first.json()['id']}").status_code == 200
    assert studio.http.get(f"/v1/trainings/{first.json()['id']}").status_code == 404
    assert httpx.get(sample["url"]).status_code == 404, "its samples are gone with it"
