"""A batch beside another caller's job, and beside the sudden death of the process that hands its items out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest

from local.services import Gateway
from tests.callers import as_caller, make_key
from tests.conftest import OpenGateway
from tests.deployment import wait_for_answers
from tests.journeys.api import PATIENCE_S, count_saved, wait_until

ADMIN_KEY = "an-admin-key-for-tests-and-nothing-else"


class Plant(NamedTuple):
    """A gateway, and two callers who differ by their key alone."""

    gateway: Gateway
    ann: httpx.Client
    bob: httpx.Client


@pytest.fixture(scope="module")
def plant(open_gateway: OpenGateway) -> Iterator[Plant]:
    with open_gateway(ADMIN_KEY=ADMIN_KEY) as gateway, as_caller(gateway.url, ADMIN_KEY) as admin:
        ann, bob = (as_caller(gateway.url, make_key(admin, "generate", caller=name)["key"]) for name in ("ann", "bob"))
        with ann, bob:
            yield Plant(gateway, ann, bob)


def create(caller: httpx.Client, **body: Any) -> str:
    answer = caller.post("/v1/batches", json=body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def get(caller: httpx.Client, batch_id: str) -> dict[str, Any]:
    answer = caller.get(f"/v1/batches/{batch_id}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def items(caller: httpx.Client, batch_id: str) -> list[dict[str, Any]]:
    found = list[dict[str, Any]]()
    cursor: str | None = "0"
    while cursor is not None:
        page = caller.get(f"/v1/batches/{batch_id}/items", params={"limit": 100, "cursor": cursor}).json()
        found, cursor = found + page["data"], page["next_cursor"]
    return found


def test_another_callers_job_waits_for_one_job_of_the_batch_and_not_for_the_batch(plant: Plant) -> None:
    sweep = {"color": {"from": 1, "to": 300}}
    batch_id = create(plant.ann, workflow="slow", parameters={"steps": 1, "delay_ms": 30}, sweep=sweep)
    wait_until(lambda: get(plant.ann, batch_id)["counts"]["succeeded"] >= 10, "a part of the batch")
    job = plant.bob.post("/v1/generations", json={"workflow": "trivial", "color": 5}, headers={"Prefer": "wait=60"}).json()
    assert job["status"] == "succeeded", job
    batch = get(plant.ann, batch_id)
    assert batch["counts"]["queued"] > 150, "the batch was over before it could be in anybody's way"
    jobs = [plant.ann.get(f"/v1/generations/{item['id']}").json() for item in items(plant.ann, batch_id)[: 300 - batch["counts"]["queued"]]]
    between = [one for one in jobs if one.get("started_at") and job["created_at"] < one["started_at"] < job["started_at"]]
    # Two slots were taken when it came, and a turn of the batch's may have been in the middle of being given.
    assert len(between) <= 3, f"{len(between)} items went before it"
    plant.ann.post(f"/v1/batches/{batch_id}/cancel")


def test_nobody_else_sees_a_batch_or_can_touch_it(plant: Plant) -> None:
    batch_id = create(plant.ann, workflow="trivial", items=[{"color": 1}])
    for method, path in [
        ("GET", ""),
        ("GET", "/items"),
        ("GET", "/contact-sheet"),
        ("POST", "/cancel"),
        ("POST", "/archive"),
        ("DELETE", ""),
    ]:
        answer = plant.bob.request(method, f"/v1/batches/{batch_id}{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "batch_not_found"), path
    assert plant.bob.get("/v1/batches").json()["data"] == []


def test_a_batch_survives_the_process_that_hands_it_out_and_makes_everything_once(plant: Plant, engine: str) -> None:
    batch_id = create(plant.ann, workflow="slow", parameters={"steps": 1, "delay_ms": 10}, sweep={"color": {"from": 1, "to": 150}})
    wait_until(lambda: get(plant.ann, batch_id)["counts"]["succeeded"] >= 20, "a part of the batch")
    plant.gateway.kill()
    plant.gateway.start()
    wait_for_answers(plant.gateway)
    assert get(plant.ann, batch_id)["counts"]["queued"] > 20, "it was killed too late to matter"
    wait_until(lambda: get(plant.ann, batch_id)["status"] == "succeeded", f"the end in {PATIENCE_S:g} s")
    found = items(plant.ann, batch_id)
    assert [item["index"] for item in found] == list(range(150))
    # Those that were under way when it died, and some of those around.
    resumed = [item for item in found if plant.ann.get(item["urls"]["self"]).json()["attempts"] > 1]
    assert {count_saved(engine, item["id"]) for item in [*found[15:90:5], *resumed]} == {1}, "each was made once"
    assert all(len(item["outputs"]) == 1 for item in found)


def test_unfinished_batches_are_bounded(plant: Plant) -> None:
    body = {"workflow": "slow", "parameters": {"steps": 600, "delay_ms": 100}, "items": [{"color": 1}]}
    ids = [create(plant.bob, **body) for _ in range(10)]
    refused = plant.bob.post("/v1/batches", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_batches")
    assert int(refused.headers["Retry-After"]) > 0
    for batch_id in ids:
        plant.bob.post(f"/v1/batches/{batch_id}/cancel")
    wait_until(lambda: all(get(plant.bob, batch_id)["status"] == "canceled" for batch_id in ids), "their end")
