"""Hooks for schemathesis, which knows the shapes of requests and nothing of what is there: half of the ids in paths are made those of
things that exist at that moment, and one in three of the bodies that fit the schema is made one that can be done.

What is narrowed, and why: `base_model` is the one that the engine has (for the others 503 is right), what makes a job slow is small where
it is allowed at all (one engine on a CPU runs all of them), events are asked of jobs that have ended (a stream of others does not end
either), and of the deployment's own instances and workflows none is taken away (every other request needs them)."""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from typing import Any
from urllib.parse import quote

import httpx
import schemathesis
from blake3 import blake3
from schemathesis.generation import GenerationMode

from tests.dataset_files import picture
from tests.deployment import WORKFLOWS_DIR
from tests.journeys.api import TERMINAL
from tests.journeys.belongings import RAW

Json = dict[str, Any]

# Where ids are listed, when that is not what stands before them in the path.
LISTS = {"/api/v2/assets/{asset_id}": "/v1/uploads", "/api/v2/assets/{asset_id}/content": "/v1/uploads"}
# A job that succeeds at once, and whose end somebody is told.
TOLD: Json = {
    "workflow": "trivial",
    "webhook": {"url": os.environ.get("FUZZ_RECEIVER", ""), "secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"},
}
UPLOADED = picture(1)
OWN_INSTANCE = os.environ.get("FUZZ_INSTANCE", "")
# A workflow that a caller brings.
OWN = "brought"
FILES = WORKFLOWS_DIR / "trivial"
BROUGHT: Json = {
    "graph": json.loads((FILES / "graph.json").read_text()),
    "bindings": (FILES / "bindings.toml").read_text(),
    "example": json.loads((FILES / "example.json").read_text()),
}
# What is made where a list is empty, because requests before deleted all of it.
MAKE: dict[str, Json] = {
    "/v1/generations": {"json": {"workflow": "trivial"}},
    "/v1/batches": {"json": {"workflow": "trivial", "items": [{"color": 1}, {"color": 2}]}},
    "/v1/uploads": {"files": {"file": ("a.png", UPLOADED)}},
    "/v1/datasets": {"files": {"files": ("a.png", picture(2))}, "data": {"name": "set"}},
    "/v1/keys": {"json": {}},
    # Nobody is there.
    "/v1/instances": {"json": {"url": "http://127.0.0.1:9"}},
    "/api/v2/jobs": {"json": {"workflow": RAW}},
}
QUICK: Json = {"prompt": "a red circle", "width": 256, "height": 256, "steps": 1}
# Bodies that can be done. "@upload" is an upload's id at that moment, "@dataset" a data set's.
DONE: dict[tuple[str, str], Json] = {
    ("POST", "/v1/generations"): QUICK,
    ("POST", "/v1/generations/preview"): QUICK,
    ("POST", "/v1/workflows/flux-img2img/generations"): {**QUICK, "image": "@upload"},
    ("POST", "/v1/workflows/flux-fill/generations"): {"prompt": "x", "steps": 1, "image": "@upload", "mask": "@upload"},
    ("POST", "/v1/batches"): {"workflow": "trivial", "sweep": {"color": [1, 2]}},
    ("POST", "/v1/images/generations"): {"prompt": "a red circle", "size": "256x256", "quality": "low"},
    ("POST", "/v1/images/edits"): {"prompt": "a red circle", "size": "256x256", "quality": "low", "image": picture(3)},
    ("POST", "/v1/loras"): {"name": "brought", "upload": "@upload"},
    ("POST", "/v1/models/load"): {"base_model": "tinyflux"},
    ("POST", "/v1/instances"): {"url": "http://127.0.0.1:9"},
    ("POST", "/v1/trainings"): {"name": "tok", "dataset": "@dataset", "base": "tinyflux", "resolution": 64, "steps": 5},
    ("POST", "/v1/datasets/{dataset_id}/captions"): {"overwrite": True},
    ("POST", "/api/v2/jobs"): {"workflow": RAW},
    ("PUT", "/v1/workflows/{name}"): BROUGHT,
}
# What must be true of a job for a route to do what it is for; where none is so, one is made.
FITTING: dict[str, Json] = {
    "/v1/generations/{job_id}/reproduce": {"status": "succeeded"},
    "/v1/generations/{job_id}/comparison": {"status": "succeeded", "reproduces": ...},
    "/v1/generations/{job_id}/webhook/replay": {"status": "succeeded", "webhook": ...},
    "/v1/batches/{batch_id}/archive": {"finished_at": ...},
    "/v1/batches/{batch_id}": {"finished_at": ...},
    "/v1/trainings/{job_id}": {"finished_at": ...},
}
# What a value is brought down to when it is allowed: most, and the most that is allowed.
SLOW = {"delay_ms": (5, 10_000), "steps": (4, 10_000), "width": (256, 2048), "height": (256, 2048), "num_images": (2, 8), "n": (2, 10)}
ABSENT_MODELS = ("flux1-dev", "flux1-dev-fp8", "flux1-schnell", "flux1-fill-dev")
UNPAGED = {"/v1/instances", "/v1/keys", "/v1/loras", "/v1/workflows"}
_client: list[httpx.Client] = []


def connect() -> httpx.Client:
    if not _client:
        headers = {"Authorization": f"Bearer {os.environ['FUZZ_KEY']}"}
        _client.append(httpx.Client(base_url=os.environ["FUZZ_URL"], headers=headers, timeout=60))
    return _client[0]


def list_things(listed: str) -> list[Json]:
    answer = connect().get(listed, params={"limit": 50} if listed not in UNPAGED else {})
    body = answer.json() if answer.status_code == 200 else {}
    found: list[Json] = body.get("data") or body.get("jobs") or []
    # The instance that works goes on working.
    return [thing for thing in found if thing.get("state") != "up"]


def find_things(listed: str) -> list[Json]:
    found = list_things(listed)
    if not found and listed in MAKE:
        connect().post(listed, **MAKE[listed])
        found = list_things(listed)
    return found


def fits(thing: Json, wanted: Json) -> bool:
    return all(thing.get(name) == value or (value is ... and thing.get(name)) for name, value in wanted.items())


def make_fitting(path: str, wanted: Json) -> None:
    """A finished job, told of its end to somebody, and if need be another one that runs it again; or a batch, awaited."""
    if path.startswith("/v1/generations"):
        job = connect().post("/v1/generations", json=TOLD, headers={"Prefer": "wait=10"}).json()
        if "reproduces" in wanted and job.get("status") == "succeeded":
            again = connect().post(f"/v1/generations/{job['id']}/reproduce").json()
            await_end(f"/v1/generations/{again.get('id')}")
    elif path.startswith("/v1/batches"):
        batch = connect().post("/v1/batches", **MAKE["/v1/batches"]).json()
        await_end(f"/v1/batches/{batch.get('id')}")


def await_end(path: str) -> None:
    for _ in range(50):
        if connect().get(path).json().get("finished_at"):
            return
        time.sleep(0.1)


def find_ids(path: str) -> list[str]:
    """Ids that fit the first parameter of a path."""
    listed = LISTS.get(path, path.partition("/{")[0])
    if listed == "/api/v2/assets/by-hash":
        connect().post("/v1/uploads", **MAKE["/v1/uploads"])
        return [f"blake3:{blake3(UPLOADED).hexdigest()}"]
    found = find_things(listed)
    if wanted := FITTING.get(path):
        if not any(fits(thing, wanted) for thing in found):
            make_fitting(path, wanted)
            found = list_things(listed)
        found = [thing for thing in found if fits(thing, wanted)] or found
    if path.endswith("/events"):
        # A stream of what has not ended does not end either.
        found = [job for job in found if job["status"] in TERMINAL]
    return [str(thing.get("id") or thing.get("name")) for thing in found]


def draw(value: Any) -> int:
    """The same number for the same value, whatever the process."""
    return zlib.crc32(repr(value).encode())


@schemathesis.hook
def map_path_parameters(context: schemathesis.HookContext, path_parameters: Json | None) -> Json | None:
    if path_parameters and context.operation is not None:
        method, path = context.operation.method.upper(), context.operation.path
        name = re.findall(r"{(\w+)}", path)[0]
        choice = draw(path_parameters[name])
        if choice % 2 and (known := find_own_workflow() if is_edit(method, path) else find_ids(path)):
            path_parameters[name] = known[choice // 2 % len(known)]
            path_parameters |= {inner: find_inner(inner, path_parameters[name]) for inner in path_parameters if inner != name}
    return path_parameters


def is_edit(method: str, path: str) -> bool:
    """Whether it is about workflows that callers bring: those that all other requests need are left in place."""
    return path.startswith("/v1/workflows/{name}") and (method != "GET" or "versions" in path)


def find_own_workflow() -> list[str]:
    if connect().get(f"/v1/workflows/{OWN}").status_code != httpx.codes.OK:
        connect().put(f"/v1/workflows/{OWN}", json=BROUGHT)
    return [OWN]


def find_inner(parameter: str, outer: str) -> str:
    """What stands behind the first parameter of a path."""
    if parameter == "version":
        return str(connect().get(f"/v1/workflows/{outer}/versions").json()["data"][-1]["version"])
    files = connect().get(f"/v1/datasets/{outer}").json().get("files")
    return str(files[0]["name"]) if files else "a.png"


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    if not isinstance(body, dict):
        return body
    changes: Json = {}
    if body.get("base_model") in ABSENT_MODELS:
        changes["base_model"] = "tinyflux"
    for name, (most, allowed) in SLOW.items():
        if isinstance(body.get(name), int) and most < body[name] <= allowed:
            changes[name] = most
    return {**body, **changes}


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case[Any], kwargs: Json) -> None:
    if case.operation.path == "/ready":
        remove_dead_instances()
    if case.operation.path.startswith("/v1/images/"):
        cancel_waiting()
    if case.operation.path.startswith("/v1/instances/{instance}") and case.path_parameters["instance"] == OWN_INSTANCE:
        # It learned the id from an answer. Without that instance every picture is waited for in vain.
        case.path_parameters["instance"] = "127.0.0.1-9"
    body = DONE.get((case.method.upper(), case.operation.path))
    is_positive = case.meta is None or case.meta.generation.mode is GenerationMode.POSITIVE
    if body is not None and is_positive and draw(case.body) % 3 == 0:
        case.body = {name: fill(value) for name, value in body.items()}


def remove_dead_instances() -> None:
    """A deployment with one is not ready, and 503 the right answer."""
    while dead := list_things("/v1/instances"):
        for instance in dead:
            connect().delete(f"/v1/instances/{quote(instance['id'], safe='')}")
        time.sleep(0.2)


def cancel_waiting() -> None:
    """Pictures of these routes are waited for, and hundreds of jobs may stand in line before them."""
    for batch in list_things("/v1/batches"):
        if not batch["finished_at"]:
            connect().post(f"/v1/batches/{batch['id']}/cancel")
    for job in connect().get("/v1/generations", params={"status": "queued", "limit": 100}).json().get("data", ()):
        connect().post(f"/v1/generations/{job['id']}/cancel")


def fill(value: Any) -> Any:
    if value in ("@upload", "@dataset"):
        ids = [thing["id"] for thing in find_things(f"/v1/{value[1:]}s")]
        return ids[0] if ids else value
    return json.loads(json.dumps(value)) if not isinstance(value, bytes) else value
