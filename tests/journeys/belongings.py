"""Two callers of one gateway with everything shared but the key, and one of every thing that a caller can own."""

from __future__ import annotations

import asyncio
import hashlib
import io
import re
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import httpx
import redis
import websockets
from blake3 import blake3
from PIL import Image

from gateway.callers.tickets import Ticket, Tickets
from gateway.jobs.model import now_ms
from gateway.loras.registry import Lora, LoraRegistry
from gateway.redis_client import connect_redis
from tests.journeys.api import Api

Json = dict[str, Any]
# A graph of the caller's own that runs in no time.
RAW: Json = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
}


def draw_picture() -> bytes:
    """A PNG that nobody has yet."""
    stream = io.BytesIO()
    Image.effect_noise((96, 96), 60 + len(uuid4().hex)).convert("RGB").save(stream, "PNG")
    return stream.getvalue()


def announce_lora(redis_url: str, caller: str | None, name: str, **fields: Any) -> Lora:
    """A LoRA as a trainer announces it; its file is nowhere."""
    digest = hashlib.sha256(uuid4().bytes).hexdigest()
    facts: Json = {"sha256": digest, "family": "tinyflux", "owner": caller, "created_ms": now_ms(), **fields}
    lora = Lora(name=name, file=f"{name}-{digest[:8]}.safetensors", **facts)

    async def announce() -> None:
        redis = connect_redis(redis_url)
        await LoraRegistry(redis).announce(lora)
        await redis.aclose(close_connection_pool=True)

    asyncio.run(announce())
    return lora


def make_private(redis_url: str, caller: str, file: str) -> None:
    """The LoRA whose file lies on an instance is this caller's from now on."""
    lora = announce_lora(redis_url, caller, "tok")
    with redis.Redis.from_url(redis_url) as connection:
        connection.hdel("fluxgate:published", lora.file)
        connection.hset("fluxgate:published", file, lora.model_copy(update={"file": file}).model_dump_json())


def use_lora(file: str) -> Json:
    """A graph of one's own that names a file of a LoRA."""
    model = {"class_type": "UNETLoader", "inputs": {"unet_name": "tinyflux.safetensors", "weight_dtype": "default"}}
    lora = {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["3", 0], "lora_name": file, "strength_model": 1.0}}
    return {**RAW, "3": model, "4": lora}


@dataclass
class Belongings:
    """What a caller owns. `ids` is by (beginning of the path, parameter): which id stands there, and one like it that there is not."""

    secrets: set[str] = field(default_factory=set)
    ids: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)

    def own(self, path: str, parameter: str, value: str, absent: str | None = None) -> None:
        self.ids[path, parameter] = (value, absent or re.sub(r"[0-9a-f]{8}$", uuid4().hex[:8], value))
        self.secrets.add(value)

    def find(self, path: str, parameter: str) -> tuple[str, str] | None:
        fitting = [key for key in self.ids if path.startswith(key[0]) and key[1] == parameter]
        return self.ids[max(fitting, key=lambda key: len(key[0]))] if fitting else None


def acquire(http: httpx.Client, redis_url: str, caller: str) -> Belongings:
    """One of everything, made by this caller."""
    mine, api = Belongings(), Api.of(http)
    job = api.run(workflow="flux", prompt="mine alone", width=256, height=256, steps=1, seed=5, metadata={"word": "very-own"})
    mine.own("/v1/generations/", "job_id", job["id"])
    mine.secrets |= {"very-own", "mine alone"}

    picture = draw_picture()
    upload = http.post("/v1/uploads", files={"file": ("own.png", picture, "image/png")}).json()
    mine.own("/v1/uploads/", "upload_id", upload["id"])
    digest = f"blake3:{blake3(picture).hexdigest()}"
    mine.own("/api/v2/assets/", "digest", digest)
    mine.own("/api/v2/assets/", "asset_id", upload["id"])

    dataset = http.post("/v1/datasets", files=[("files", ("a.png", picture))], data={"name": "own-set", "trigger_word": "TOK"}).json()
    mine.own("/v1/datasets/", "dataset_id", dataset["id"])
    mine.own("/v1/datasets/", "name", "a.png", "absent.png")
    mine.secrets |= {"own-set"}
    training = http.post("/v1/trainings", json=describe_training(dataset["id"]))
    assert training.status_code == 202, training.text
    mine.own("/v1/trainings/", "job_id", training.json()["id"])
    mine.secrets |= {"own-training"}

    lora = announce_lora(redis_url, caller, "own-lora")
    mine.own("/v1/loras/", "name", "own-lora", "own-lorb")
    mine.secrets |= {lora.file}

    batch = http.post("/v1/batches", json={"workflow": "trivial", "items": [{"color": 1}], "metadata": {"word": "very-own"}})
    assert batch.status_code == 202, batch.text
    mine.own("/v1/batches/", "batch_id", batch.json()["id"])

    raw = http.post("/api/v2/jobs", json={"workflow": RAW})
    assert raw.status_code in (200, 201, 202), raw.text
    mine.own("/api/v2/jobs/", "job_id", raw.json()["id"])
    return mine


def hide(status: int, body: str, path: str) -> tuple[int, str]:
    """An answer without what was asked for, which it may repeat."""
    for part in path.split("/"):
        body = body.replace(part, "…") if len(part) > 4 else body
    return status, body


def write_ticket(redis_url: str, *fields: Any) -> str:
    """One that the deployment itself would have written; see `Ticket` for its fields."""

    async def write() -> str:
        client = connect_redis(redis_url)
        try:
            return await Tickets(client).write(Ticket(*fields))
        finally:
            await client.aclose(close_connection_pool=True)

    return asyncio.run(write())


def describe_training(dataset: str, **more: Any) -> Json:
    return {"name": "own-training", "dataset": dataset, "base": "tinyflux", "resolution": 64, "steps": 5, "trigger_word": "TOK", **more}


def open_socket(url: str, key: str | None) -> tuple[int, str]:
    """Status and body of the refusal of a WebSocket; (101, '') when it is opened."""

    async def knock() -> tuple[int, str]:
        try:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            async with websockets.connect(url.replace("http", "ws", 1), additional_headers=headers):
                return 101, ""
        except websockets.InvalidStatus as refused:
            return refused.response.status_code, (refused.response.body or b"").decode()

    return asyncio.run(knock())
