"""Instances come and go while everything runs; what is told of them is what was asked for, at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.conftest import EngineFactory
from tests.journeys.api import Api, wait_until

NOBODY = "http://127.0.0.1:9"


def see(api: Api, instance: str) -> dict[str, Any] | None:
    """As the list and the route of its own tell it, which agree. They are two requests: news may come between them."""
    told = list[httpx.Response]()

    def agree() -> bool:
        told[:] = [api.http.get(f"/v1/instances/{quote(instance, safe='')}"), api.http.get("/v1/instances")]
        assert told[0].status_code in (200, 404)
        return (told[0].status_code == 200) == any(one["id"] == instance for one in told[1].json()["data"])

    wait_until(agree, "the list and the instance's own route agree")
    return dict(told[0].json()) if told[0].status_code == 200 else None


def state(api: Api, instance: str) -> str | None:
    seen = see(api, instance)
    return seen["state"] if seen else None


def ask(api: Api, method: str, instance: str, verb: str = "") -> int:
    return api.http.request(method, f"/v1/instances/{instance}{verb}").status_code


def add(api: Api, url: str) -> str:
    answer = api.http.post("/v1/instances", json={"url": url})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def test_one_that_was_removed_is_gone_at_once_and_comes_back_when_it_is_added_again(api: Api) -> None:
    instance = add(api, NOBODY)
    for _ in range(2):
        assert add(api, NOBODY) == instance
        wait_until(lambda: see(api, instance) is not None, "the news of it")
        assert ask(api, "DELETE", instance) == 202
        assert see(api, instance) is None
        for method, verb in (("DELETE", ""), ("POST", "/drain"), ("POST", "/resume")):
            assert ask(api, method, instance, verb) == 404


@pytest.fixture
def second(api: Api, engine_factory: EngineFactory) -> Iterator[str]:
    """One more instance, which alone takes work."""
    first = next(one["id"] for one in api.http.get("/v1/instances").json()["data"] if one["state"] == "up")
    instance = add(api, engine_factory().url)
    wait_until(lambda: state(api, instance) == "up", "it is used")
    assert ask(api, "POST", first, "/drain") == 202
    yield instance
    ask(api, "POST", first, "/resume")
    ask(api, "DELETE", instance)
    wait_until(lambda: state(api, first) == "up", "the first works again")


def test_one_that_runs_something_is_draining_until_that_has_ended(api: Api, second: str) -> None:
    job = api.create(workflow="slow", steps=2000, delay_ms=40)
    wait_until(lambda: api.get(job["id"])["status"] == "running", "the job")
    assert api.get(job["id"])["instance"] == second
    for _ in range(2):
        assert ask(api, "DELETE", second) == 202
        seen = see(api, second)
        assert seen
        assert (seen["state"], seen["slots_used"]) == ("draining", 1)
    api.http.post(f"/v1/generations/{job['id']}/cancel")
    assert api.wait(job["id"])["status"] == "canceled"
    assert see(api, second) is None
    assert ask(api, "DELETE", second) == 404


@pytest.mark.parametrize(
    "url",
    [
        "http://a b",
        "http://\0",
        "http://h\n",
        "http://a\tb",
        "http://h:0",
        "http://h:65536",
        "http://h/../x",
        "http://h/%00",
        "http://h//x",
    ],
)
def test_what_is_no_address_of_an_instance_is_refused(api: Api, url: str) -> None:
    answer = api.http.post("/v1/instances", json={"url": url})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_parameter"), answer.text
