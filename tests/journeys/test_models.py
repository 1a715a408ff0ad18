"""Admins load a base model before anybody asks for it, and let go of what is loaded, while everything runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

from tests.journeys.api import Api, wait_until


def warm_on(api: Api, base_model: str = "tinyflux") -> list[str]:
    models = api.http.get("/v1/models").json()["data"]
    return list(next(model["warm_on"] for model in models if model["id"] == base_model))


def load(api: Api, **body: Any) -> tuple[int, dict[str, Any]]:
    answer = api.http.post("/v1/models/load", json={"base_model": "tinyflux", **body})
    return answer.status_code, answer.json()


def unload(api: Api, **body: Any) -> list[str]:
    answer = api.http.post("/v1/models/unload", json=body)
    assert answer.status_code == 202, answer.text
    wait_until(lambda: not warm_on(api), "the letting go")
    return list(answer.json()["instances"])


def test_a_model_is_loaded_by_the_smallest_picture_and_let_go_again(api: Api) -> None:
    # Whoever ran before on this engine has left its traces in no Redis of ours: nothing is known to be warm.
    (instance,) = (one["id"] for one in api.http.get("/v1/instances").json()["data"])
    assert warm_on(api) == []
    status, answer = load(api)
    assert (status, answer["instance"], answer["warm"]) == (202, instance, False)
    job = api.wait(answer["job"]["id"])
    assert (job["status"], job["instance"], job["priority"]) == ("succeeded", instance, "high")
    assert {name: job["parameters"][name] for name in ("width", "height", "steps", "num_images")} == {
        "width": 256,
        "height": 256,
        "steps": 1,
        "num_images": 1,
    }
    assert warm_on(api) == [instance]
    assert load(api) == (200, {"object": "model.load", "base_model": "tinyflux", "instance": instance, "warm": True, "job": None})
    assert unload(api) == [instance]
    status, answer = load(api, instance=instance)
    assert (status, api.wait(answer["job"]["id"])["warm"]) == (202, False)


def test_letting_go_disturbs_nothing_that_runs(api: Api) -> None:
    job = api.create(workflow="slow", steps=40, delay_ms=40)
    api.wait(job["id"], "running")
    instances = [one["id"] for one in api.http.get("/v1/instances").json()["data"]]
    assert unload(api, instance=instances[0]) == instances
    assert api.wait(job["id"])["status"] == "succeeded"


def test_a_load_in_the_middle_of_a_letting_go_is_not_lost(api: Api, redis_server: str) -> None:
    """The dispatcher has asked ComfyUI, and has not yet forgotten what was loaded: that is no longer so when the load is answered."""
    if not warm_on(api):
        api.wait(load(api)[1]["job"]["id"])
    (instance,) = warm_on(api)
    with redis.Redis.from_url(redis_server) as connection, ThreadPoolExecutor() as pool:
        connection.set(f"fluxgate:freeing:{instance}", 1)
        connection.hset("fluxgate:free", instance, 1)
        answer = pool.submit(load, api)
        wait_until(lambda: not connection.hexists("fluxgate:free", instance), "the later wish")
        connection.delete(f"fluxgate:warm:{instance}", f"fluxgate:freeing:{instance}")
    status, told = answer.result()
    assert (status, told["warm"]) == (202, False)
    api.wait(told["job"]["id"])
    # And right after one: no news of the dispatcher's is waited for.
    assert warm_on(api) == [instance]
    unload(api)
    assert load(api)[0] == 202


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("load", {"base_model": "none"}, 422, "base_model_not_found"),
        ("load", {"base_model": "flux1-dev"}, 503, "no_instance"),
        ("load", {"base_model": "tinyflux", "instance": "nowhere-1"}, 404, "instance_not_found"),
        ("load", {}, 422, "invalid_parameter"),
        ("unload", {"instance": "nowhere-1"}, 404, "instance_not_found"),
        ("unload", {"base_model": "tinyflux"}, 422, "invalid_parameter"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(api: Api, path: str, body: dict[str, Any], status: int, code: str) -> None:
    answer = api.http.post(f"/v1/models/{path}", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
