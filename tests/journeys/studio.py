"""A deployment that trains, and one caller of it. Which trainer it has is the test's business."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx
import redis

from local.child import pick_free_port
from local.services import Engine, Gateway, S3Server, TrainerWorker
from local.tinyflux.make.scenes import draw_concept
from local.tinyflux.weights import MODEL_DIR
from tests.deployment import describe_deployment, make_gateway, running
from tests.webhook_receiver import SECRET, Receiver

PATIENCE_S = 180.0
ENDED = ("succeeded", "failed", "canceled", "expired")


@dataclass(frozen=True)
class Studio:
    """`training_dir` is the worker's: what a trainer runs, it runs beneath it."""

    http: httpx.Client
    worker: TrainerWorker
    engine: Engine
    training_dir: Path
    dataset: str
    redis_url: str

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
        """The training once it has one of these statuses; without any, once it has ended."""
        deadline = time.monotonic() + PATIENCE_S
        while (job := self.read(job_id))["status"] not in (statuses or ENDED):
            assert time.monotonic() < deadline, job
            time.sleep(0.1)
        return job

    def told(self, receiver: Receiver, job_id: str) -> tuple[str, str, str]:
        """(object, id, status) that the receiver heard of an ended training, once the log has the try."""
        deadline = time.monotonic() + PATIENCE_S
        while not (job := self.read(job_id))["webhook_deliveries"]:
            assert time.monotonic() < deadline, job
            time.sleep(0.05)
        [one] = receiver.told(job_id)
        content = one.open()
        assert content == {**job, "webhook_deliveries": []}
        return content["object"], content["id"], content["status"]

    def wait_for_step(self, job_id: str, step: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while ((job := self.read(job_id))["progress"]["step"] or 0) < step:
            assert time.monotonic() < deadline, job
            assert job["status"] not in ENDED, job
            time.sleep(0.05)

    def wait_for_pictures(self, lora: str) -> dict[str, Any]:
        """The LoRA once its before and after pictures are drawn."""
        deadline = time.monotonic() + PATIENCE_S
        while not ((found := self.http.get(f"/v1/loras/{lora}").json())["before"] and found["after"]):
            assert time.monotonic() < deadline, found
            time.sleep(0.2)
        return dict(found)

    def events(self, job_id: str, after: str = "0") -> list[tuple[str, str, Any]]:
        """(id, kind, data) of a finished stream, without the snapshot."""
        blocks = self.http.get(f"/v1/trainings/{job_id}/events", params={"after": after}, timeout=PATIENCE_S).text.split("\n\n")
        parsed = [dict(line.split(": ", 1) for line in block.splitlines()) for block in blocks if block.strip()]
        return [(block["id"], block["event"], json.loads(block["data"])) for block in parsed if "id" in block]

    def steps(self, job_id: str) -> list[int]:
        """The steps that the events of an ended training tell a loss of."""
        told = [data for _, kind, data in self.events(job_id) if kind == "progress" and data["current_node"] == "training"]
        return [data["step"] for data in told if data["loss"] is not None]

    def generate(self, weight: float, lora: str = "thing") -> str:
        """sha256 of the picture."""
        body = {"prompt": "TOK on a green background", "seed": 3, "width": 256, "height": 256, "steps": 4}
        loras = [{"name": lora, "weight": weight}]
        job = self.http.post("/v1/generations", json={**body, "loras": loras}, headers={"Prefer": "wait=60"}).json()
        assert job["status"] == "succeeded", job
        return str(job["outputs"][0]["sha256"])


def draw_png(seed: int) -> bytes:
    body = io.BytesIO()
    draw_concept(Random(seed))[0].save(body, "PNG")
    return body.getvalue()


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


@contextmanager
def running_studio(redis_url: str, s3: S3Server, folder: Path, **changes: str) -> Iterator[Studio]:
    """All parts on an empty Redis, and a data set of five pictures."""
    with redis.Redis.from_url(redis_url) as connection:
        connection.flushall()
    engine = Engine(folder, pick_free_port())
    env = describe_deployment(redis_url, s3, engine.url) | {
        "TRAINING_DIR": str(folder / "training"),
        "TRAINING_LEASE_S": "3",
        "LORA_DIR": str(engine.base_dir / "models" / "loras"),
        "BASE_MODEL_PATHS": json.dumps({"tinyflux": str(MODEL_DIR)}),
        "WEBHOOK_SECRET": SECRET,
        "ALLOW_PRIVATE_URLS": "127.0.0.0/8",
        **changes,
    }
    gateway: Gateway = make_gateway(folder, env)
    worker = TrainerWorker(folder, redis_url, env)
    with running(engine, gateway, worker), httpx.Client(base_url=gateway.url, timeout=PATIENCE_S) as http:
        files = {"files": ("pictures.zip", zip_pictures(5), "application/zip")}
        dataset = http.post("/v1/datasets", data={"name": "things", "trigger_word": "TOK"}, files=files).json()
        yield Studio(http, worker, engine, folder / "training", dataset["id"], redis_url)
