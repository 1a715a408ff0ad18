"""What requests left behind once all that they began was ended and all that they made was deleted: nothing, if all is well.

Looked at: jobs that do not end, work in Redis and in the engine's queue and input folder, things that cannot be deleted or are listed
afterwards, objects in the bucket, keys in Redis that never expire, and the gateway's own process: children, and temporary files still open.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import httpx
import redis

from local.services import Engine, Gateway, RedisServer, S3Server
from tests.journeys.api import TERMINAL

PATIENCE_S = 60.0
# What was made of an upload is kept as long as a job that it was made for.
LONGEST_S = 31 * 86_400
# Redis keys of work that is under way. Without work there are none.
MOTION = (
    "leases",
    "leases:training",
    "queued",
    "deadlines",
    "queue:*",
    "callers:*",
    "slots:*",
    "followers:*",
    "batch:*:live",
    "batch_chores",
)
ENDED_BY = {"/v1/batches": "/cancel", "/v1/generations": "/cancel", "/v1/trainings": "/cancel"}
DELETED = ("/v1/batches", "/v1/generations", "/v1/trainings", "/v1/datasets", "/v1/uploads")
UNPAGED = ("/v1/instances", "/v1/loras")
# Redis keys that stay for ever: what a deployment is, has measured, and what waits for a trainer worker, of which there is none here.
# All others belong to something, and go with it or by themselves.
KEPT = (
    *("state_version", "ticket_secret", "keys", "keys:version", "limits:*", "fleet", "instances", "loras", "withdrawn", "base_models_used"),
    *("measured:*", "warm:*", "workflow*", "sequence", "turn", "feed"),
    *("rq:queues", "rq:queue:training", "rq:queue:imports", "rq:job:*"),
)
TRAININGS = ("training", "captioning", "lora_import")


@dataclass(frozen=True)
class Target:
    """A deployment, and a caller with all scopes."""

    redis: RedisServer
    s3: S3Server
    engine: Engine
    gateway: Gateway
    http: httpx.Client
    bucket: str


def walk(http: httpx.Client, path: str, **query: str) -> Iterator[dict[str, Any]]:
    """All that a list tells, page by page."""
    cursor: str | None = None
    while True:
        paging: dict[str, Any] = {} if path in UNPAGED else {"limit": 100, **({"cursor": cursor} if cursor else {})}
        page = http.get(path, params={**paging, **query}).json()
        yield from page["data"]
        cursor = page.get("next_cursor")
        if cursor is None:
            return


def list_unfinished(http: httpx.Client) -> list[str]:
    trainings = [job for kind in TRAININGS for job in walk(http, "/v1/trainings", object=kind)]
    found = {"/v1/trainings": trainings, "/v1/generations": [*walk(http, "/v1/generations")]}
    return [f"{path}/{job['id']}" for path, jobs in found.items() for job in jobs if job["status"] not in TERMINAL]


def end_all(target: Target) -> Iterator[str]:
    """Cancel what runs; what has not ended soon after is left behind."""
    for batch in walk(target.http, "/v1/batches"):
        target.http.post(f"/v1/batches/{batch['id']}/cancel")
    deadline = time.monotonic() + PATIENCE_S
    while (unfinished := list_unfinished(target.http)) and time.monotonic() < deadline:
        for path in unfinished:
            target.http.post(f"{path}/cancel")
        time.sleep(0.5)
    yield from (f"{path} has not ended" for path in unfinished)


def look_at_motion(target: Target) -> Iterator[str]:
    with redis.Redis.from_url(target.redis.url, decode_responses=True) as connection:
        for pattern in MOTION:
            yield from (f"{key}: {connection.type(key)}" for key in connection.scan_iter(f"fluxgate:{pattern}"))
    queue = httpx.get(f"{target.engine.url}/queue").json()
    yield from (f"the engine's {name}: {len(prompts)}" for name, prompts in queue.items() if prompts)
    # ComfyUI has no route that deletes: files stay, with nothing in them.
    sent = [path for path in (target.engine.base_dir / "input").rglob("*") if path.is_file() and path.stat().st_size]
    yield from (f"{path} in the engine's input" for path in sent)


def delete_all(target: Target) -> Iterator[str]:
    for path in DELETED:
        for query in [{"object": kind} for kind in TRAININGS] if path == "/v1/trainings" else [{}]:
            for thing in list(walk(target.http, path, **query)):
                answer = target.http.delete(f"{path}/{thing['id']}")
                if answer.status_code not in (200, 404):
                    yield f"{path}/{thing['id']} cannot be deleted: {answer.text}"
            yield from (f"{path}/{thing['id']} was deleted and is listed" for thing in walk(target.http, path, **query))


def delete_shared(target: Target) -> Iterator[str]:
    """LoRAs, and instances that requests added: what a deployment has one list of."""
    for lora in list(walk(target.http, "/v1/loras")):
        if lora["owned"]:
            target.http.delete(f"/v1/loras/{lora['name']}")
    target.http.delete("/v1/workflows/brought")
    deadline = time.monotonic() + PATIENCE_S
    while added := [one["id"] for one in walk(target.http, "/v1/instances") if one["state"] != "up"]:
        for instance in added:
            target.http.delete(f"/v1/instances/{quote(instance, safe='')}")
        if time.monotonic() > deadline:
            break
        time.sleep(0.5)
    yield from (f"/v1/instances/{instance} was deleted and is listed" for instance in added)
    yield from (f"/v1/loras/{lora['name']} was deleted and is listed" for lora in walk(target.http, "/v1/loras") if lora["owned"])


def find_passing(connection: redis.Redis) -> tuple[set[str], set[str]]:
    """(objects in the bucket, keys in Redis) that go by themselves when their time is over: garbage, and what was made of uploads."""
    objects, keys = set(cast(list[str], connection.zrange("fluxgate:garbage", 0, -1))), {"garbage"}
    for asset in cast(list[str], connection.zrangebyscore("fluxgate:assets", 0, (time.time() + LONGEST_S) * 1000)):
        record, key = cast(list[str | None], connection.hmget(f"fluxgate:asset:{asset}", "record", "key"))
        if record and key and not json.loads(record)["is_listed"]:
            objects.add(key)
            keys |= {"assets", "blobs:admin", f"asset:{asset}", f"blob:{key}"}
    return objects, keys


def look_at_bucket(target: Target) -> Iterator[str]:
    """Files of what was deleted."""
    folder, deadline = target.s3.data_dir / target.bucket, time.monotonic() + PATIENCE_S
    with redis.Redis.from_url(target.redis.url, decode_responses=True) as connection:
        while True:
            passing, _ = find_passing(connection)
            found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - passing
            if not found or time.monotonic() > deadline:
                break
            time.sleep(0.5)
    yield from (f"{key} in the bucket" for key in sorted(found))


def look_at_redis(target: Target) -> Iterator[str]:
    """Keys without an end that are no part of a deployment that has nothing."""
    with redis.Redis.from_url(target.redis.url, decode_responses=True) as connection:
        _, passing = find_passing(connection)
        for key in sorted(connection.scan_iter()):
            name = key.removeprefix("fluxgate:")
            if connection.ttl(key) == -1 and name not in passing and not any(fnmatch(name, kept) for kept in KEPT):
                yield f"{key} in Redis for ever: {connection.type(key)}"


def look_at_process(target: Target) -> Iterator[str]:
    """The gateway's children, and files that have no name any more and are open still."""
    process = Path(f"/proc/{target.gateway.pid}")
    for task in (process / "task").iterdir():
        yield from (f"process {child}, a child of the gateway" for child in (task / "children").read_text().split())
    for descriptor in (process / "fd").iterdir():
        opened = os.readlink(descriptor) if descriptor.is_symlink() else ""
        if opened.endswith("(deleted)"):
            yield f"{opened} is open in the gateway"


def list_left(target: Target) -> Iterator[str]:
    yield from end_all(target)
    yield from look_at_motion(target)
    yield from delete_all(target)
    yield from delete_shared(target)
    yield from look_at_bucket(target)
    yield from look_at_redis(target)
    yield from look_at_process(target)
