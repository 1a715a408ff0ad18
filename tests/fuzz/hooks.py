"""Hooks for schemathesis: half of the ids in paths are those of things that are there at that moment."""

from __future__ import annotations

import os
import zlib
from typing import Any

import httpx
import schemathesis

from tests.journeys.api import TERMINAL
from tests.journeys.belongings import RAW

# Where ids are listed, when that is not what stands before them in the path.
LISTS = {"/api/v2/assets/{asset_id}": "/v1/uploads", "/api/v2/assets/{asset_id}/content": "/v1/uploads"}
# What is made where a list is empty, because requests before deleted all of it.
MAKE: dict[str, dict[str, Any]] = {
    "/v1/generations": {"json": {"workflow": "trivial"}},
    "/v1/batches": {"json": {"workflow": "trivial", "items": [{"color": 1}, {"color": 2}]}},
    "/v1/uploads": {"files": {"file": ("a.txt", b"text")}},
    "/v1/datasets": {"files": {"files": ("a.txt", b"text")}, "data": {"trigger_word": "TOK"}},
    "/v1/keys": {"json": {}},
    # Nobody is there.
    "/v1/instances": {"json": {"url": "http://127.0.0.1:9"}},
    "/api/v2/jobs": {"json": {"workflow": RAW}},
}
ABSENT_MODELS = ("flux1-dev", "flux1-dev-fp8", "flux1-schnell", "flux1-fill-dev")
_client: list[httpx.Client] = []


def connect() -> httpx.Client:
    if not _client:
        headers = {"Authorization": f"Bearer {os.environ['FUZZ_KEY']}"}
        _client.append(httpx.Client(base_url=os.environ["FUZZ_URL"], headers=headers, timeout=60))
    return _client[0]


def list_things(listed: str) -> list[dict[str, Any]]:
    answer = connect().get(listed, params={"limit": 10} if listed not in UNPAGED else {})
    body = answer.json() if answer.status_code == 200 else {}
    found: list[dict[str, Any]] = body.get("data") or body.get("jobs") or []
    # The instance that works goes on working.
    return [thing for thing in found if thing.get("state") != "up"]


UNPAGED = {"/v1/instances", "/v1/keys", "/v1/loras", "/v1/workflows"}


def find_ids(path: str) -> list[str]:
    """Ids that fit the first parameter of a path."""
    listed = LISTS.get(path, path.partition("/{")[0])
    if listed in ("/api/v2/assets/by-hash", "/v1/workflows"):
        return []
    found = list_things(listed)
    if not found and listed in MAKE:
        connect().post(listed, **MAKE[listed])
        found = list_things(listed)
    if path.endswith("/events"):
        # A stream of what has not ended does not end either.
        found = [job for job in found if job["status"] in TERMINAL]
    return [str(thing.get("id") or thing.get("name")) for thing in found]


@schemathesis.hook
def map_path_parameters(context: schemathesis.HookContext, path_parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    if path_parameters and context.operation is not None:
        name = next(iter(path_parameters))
        choice = zlib.crc32(str(path_parameters[name]).encode())
        if choice % 2 and (known := find_ids(context.operation.path)):
            path_parameters[name] = known[choice // 2 % len(known)]
    return path_parameters


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """The engine has one base model: for the others 503 is the right answer. And what is slow on purpose is not slow for minutes."""
    if not isinstance(body, dict):
        return body
    changes: dict[str, Any] = {}
    if body.get("base_model") in ABSENT_MODELS:
        changes["base_model"] = "tinyflux"
    if isinstance(body.get("delay_ms"), int) and body["delay_ms"] > 5:
        changes["delay_ms"] = 5
    return {**body, **changes}
