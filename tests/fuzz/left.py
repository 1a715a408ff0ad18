"""What requests left behind once all that they began was ended and all that they made was deleted: nothing, if all is well."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import redis

from local.services import Engine, Gateway, RedisServer, S3Server
from tests.journeys.api import TERMINAL

PATIENCE_S = 60.0
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
        page = http.get(path, params={"limit": 100, **query, **({"cursor": cursor} if cursor else {})}).json()
        yield from page["data"]
        cursor = page["next_cursor"]
        if cursor is None:
            return


def list_unfinished(http: httpx.Client) -> list[str]:
    captionings = walk(http, "/v1/trainings", object="captioning")
    found = {"/v1/trainings": [*walk(http, "/v1/trainings"), *captionings], "/v1/generations": [*walk(http, "/v1/generations")]}
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
    yield from (f"{path} in the engine's input" for path in (target.engine.base_dir / "input").rglob("*") if path.is_file())


def delete_all(target: Target) -> Iterator[str]:
    for path in DELETED:
        for thing in list(walk(target.http, path)):
            answer = target.http.delete(f"{path}/{thing['id']}")
            if answer.status_code not in (200, 404):
                yield f"{path}/{thing['id']} cannot be deleted: {answer.text}"
        yield from (f"{path}/{thing['id']} was deleted and is listed" for thing in walk(target.http, path))


def look_at_bucket(target: Target) -> Iterator[str]:
    """Files of what was deleted. Those that are noted as garbage go when nobody can write or read them any more."""
    folder, deadline = target.s3.data_dir / target.bucket, time.monotonic() + PATIENCE_S
    with redis.Redis.from_url(target.redis.url, decode_responses=True) as connection:
        while True:
            noted = set(connection.zrange("fluxgate:garbage", 0, -1))
            found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - noted
            if not found or time.monotonic() > deadline:
                break
            time.sleep(0.5)
    yield from (f"{key} in the bucket" for key in sorted(found))


def list_left(target: Target) -> Iterator[str]:
    yield from end_all(target)
    yield from look_at_motion(target)
    yield from delete_all(target)
    yield from look_at_bucket(target)
