"""Train, then generate, as the README tells it: a zip of pictures, a training that tells its loss, a LoRA by name in the next request.
The trainer is the small one, with few steps: that the LoRA is good is not asked here, that it is applied is."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import redis

import local.tinyflux
from local.child import pick_free_port
from local.services import Engine, Gateway, S3Server, TrainerWorker
from local.tinyflux.make.scenes import draw_concept
from tests.deployment import describe_deployment, make_gateway, running

PATIENCE_S = 120.0
ENDED = ("succeeded", "failed", "canceled", "expired")


@dataclass(frozen=True)
class Studio:
    """A deployment that trains."""

    http: httpx.Client
    worker: TrainerWorker
    engine: Engine
    folder: Path
    dataset: str

    def train(self, **changes: object) -> dict[str, Any]:
        asked = {"name": "thing", "dataset": self.dataset, "trigger_word": "TOK", "steps": 6, "rank": 4, "learning_rate": 0.003}
        shape = {
            "batch_size": 5,
            "resolution": 128,
            "checkpoint_every": 3,
            "sample_every": 3,
            "sample_prompts": ["TOK on a green background"],
        }
        answer = self.http.post("/v1/trainings", json={**asked, **shape, "seed": 1, **changes})
        assert answer.status_code == 202, answer.text
        return dict(answer.json())

    def read(self, job_id: str) -> dict[str, Any]:
        return dict(self.http.get(f"/v1/trainings/{job_id}").json())

    def wait(self, job_id: str, *statuses: str) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE_S
        while (job := self.read(job_id))["status"] not in statuses:
            assert time.monotonic() < deadline, job
            time.sleep(0.1)
        return job

    def wait_for_step(self, job_id: str, step: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while (self.read(job_id)["progress"]["step"] or 0) < step:
            assert time.monotonic() < deadline, self.read(job_id)
            time.sleep(0.05)

    def events(self, job_id: str, after: str = "0") -> list[tuple[str, str, Any]]:
        """(id, kind, data) of a finished stream, without the snapshot."""
        blocks = self.http.get(f"/v1/trainings/{job_id}/events", params={"after": after}, timeout=PATIENCE_S).text.split("\n\n")
        parsed = [dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks if block.strip()]
        return [(block["id"], block["event"], json.loads(block["data"])) for block in parsed if "id" in block]

    def generate(self, weight: float) -> str:
        """sha256 of the picture."""
        body = {"prompt": "TOK on a green background", "seed": 3, "width": 256, "height": 256, "steps": 4}
        loras = [{"name": "thing", "weight": weight}]
        job = self.http.post("/v1/generations", json={**body, "loras": loras}, headers={"Prefer": "wait=60"}).json()
        assert job["status"] == "succeeded", job
        return str(job["outputs"][0]["sha256"])


def zip_pictures(count: int) -> bytes:
    random, packed = Random(5), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for number in range(count):
            picture, caption = draw_concept(random)
            body = io.BytesIO()
            picture.save(body, "PNG")
            archive.writestr(f"{number}.png", body.getvalue())
            archive.writestr(f"{number}.txt", caption)
    return packed.getvalue()


@pytest.fixture(scope="module")
def studio(redis_server: str, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with redis.Redis.from_url(redis_server) as connection:
        connection.flushall()
    folder = tmp_path_factory.mktemp("studio")
    engine = Engine(folder, pick_free_port())
    env = describe_deployment(redis_server, s3_server, engine.url) | {
        "TRAINER": "tiny",
        "TRAINING_DIR": str(folder / "training"),
        "TRAINING_LEASE_S": "3",
        "LORA_DIR": str(engine.base_dir / "models" / "loras"),
        "BASE_MODEL_PATHS": json.dumps({"tinyflux": str(Path(local.tinyflux.__file__).parent / "model")}),
        "SHARED_GPU": "the-only-one",
    }
    gateway: Gateway = make_gateway(folder, env)
    worker = TrainerWorker(folder, redis_server, env)
    with running(engine, gateway, worker), httpx.Client(base_url=gateway.url, timeout=PATIENCE_S) as http:
        files = {"files": ("pictures.zip", zip_pictures(5), "application/zip")}
        dataset = http.post("/v1/datasets", data={"name": "things", "trigger_word": "TOK"}, files=files).json()
        yield Studio(http, worker, engine, folder, dataset["id"])


def test_a_trained_lora_is_used_by_name_in_the_next_request(studio: Studio) -> None:
    job = studio.train()
    done = studio.wait(job["id"], *ENDED)
    assert done["status"] == "succeeded", done
    assert done["lora"] == "thing"
    events = studio.events(job["id"])
    told = [data for _, kind, data in events if kind == "progress" and data["current_node"] == "training"]
    steps = [data["step"] for data in told if data["loss"] is not None]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [data["step"] for _, kind, data in events if kind == "checkpoint"] == [3, 6]
    samples = [data for _, kind, data in events if kind == "sample"]
    assert samples
    assert httpx.get(samples[0]["url"]).content.startswith(b"\x89PNG")
    assert [data["status"] for _, kind, data in events if kind == "status"][-1] == "succeeded"
    lora = studio.http.get("/v1/loras/thing").json()
    assert (lora["family"], lora["training"], lora["rank"], bool(lora["ready_on"])) == ("tinyflux", job["id"], 4, True)
    assert httpx.get(lora["url"]).status_code == 200
    assert studio.generate(0.0) != studio.generate(1.0)
    half = len(events) // 2
    assert [event[:2] for event in studio.events(job["id"], after=events[half][0])] == [event[:2] for event in events[half + 1 :]]


def test_before_and_after_pictures_are_drawn(studio: Studio) -> None:
    studio.wait(studio.train(name="shown")["id"], "succeeded")
    deadline = time.monotonic() + PATIENCE_S
    while not ((lora := studio.http.get("/v1/loras/shown").json())["before"] and lora["after"]):
        assert time.monotonic() < deadline, lora
        time.sleep(0.2)
    assert httpx.get(lora["before"]).content != httpx.get(lora["after"]).content


def test_a_cancel_keeps_the_checkpoint_and_a_resume_goes_on_from_it(studio: Studio) -> None:
    job = studio.train(name="stopped", steps=4000)
    studio.wait_for_step(job["id"], 4)
    assert studio.http.post(f"/v1/trainings/{job['id']}/cancel").json()["status"] in ("canceling", "canceled")
    assert studio.wait(job["id"], *ENDED)["status"] == "canceled"
    resumed = studio.http.post(f"/v1/trainings/{job['id']}/resume").json()
    studio.wait_for_step(resumed["id"], 4)
    studio.http.post(f"/v1/trainings/{resumed['id']}/cancel")
    studio.wait(resumed["id"], *ENDED)
    steps = [data["step"] for _, kind, data in studio.events(resumed["id"]) if kind == "progress" and data["loss"] is not None]
    assert steps[0] > 3, "it began after the checkpoint of step 3"


def test_a_killed_worker_costs_no_training(studio: Studio) -> None:
    job = studio.train(name="survivor", steps=60, checkpoint_every=5)
    studio.wait_for_step(job["id"], 6)
    studio.worker.kill()
    studio.worker.start()
    studio.worker.wait_ready()
    done = studio.wait(job["id"], *ENDED)
    assert (done["status"], done["lora"]) == ("succeeded", "survivor")
    assert done["attempts"] >= 2


def test_no_generation_starts_while_a_training_has_the_gpu(studio: Studio) -> None:
    training = studio.train(name="greedy", steps=40)
    studio.wait_for_step(training["id"], 1)
    waiting = studio.http.post("/v1/generations", json={"prompt": "a red circle", "steps": 1, "width": 256, "height": 256}).json()
    assert studio.http.get("/v1/instances").json()["data"][0]["state"] == "training"
    ended = studio.wait(training["id"], *ENDED)
    assert ended["status"] == "succeeded", ended
    deadline = time.monotonic() + PATIENCE_S
    while (job := studio.http.get(f"/v1/generations/{waiting['id']}").json())["status"] not in ENDED:
        assert time.monotonic() < deadline, job
        time.sleep(0.1)
    assert job["status"] == "succeeded"
    steps = [event for event in studio.events(training["id"]) if event[1] == "progress" and event[2]["current_node"] == "training"]
    last_step_ms = int(steps[-1][0].partition("-")[0])
    began = httpx.get(job["urls"]["events"], timeout=PATIENCE_S).text
    started = next(block for block in began.split("\n\n") if '"status": "running"' in block and block.startswith("id: "))
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
    ],
)
def test_what_would_fail_late_is_refused(studio: Studio, changes: dict[str, Any], status: int, code: str, word: str) -> None:
    body = {"name": "thing", "dataset": studio.dataset, "steps": 5, "resolution": 128, "batch_size": 5, **changes}
    answer = studio.http.post("/v1/trainings", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    assert word in error["message"] or word in json.dumps(error["details"])
