"""Lists: pages that show every job once, and the filters."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from gateway.jobs.model import now_ms
from tests.journeys.api import Api

GENERATIONS = "/v1/generations"


@pytest.fixture(scope="module")
def listed(api: Api) -> list[str]:
    """25 jobs, newest first: every fifth slow, the rest trivial, one of them canceled."""
    made = []
    for number in range(25):
        body = {"workflow": "slow", "steps": 1, "delay_ms": 1} if number % 5 == 0 else {"workflow": "trivial", "color": number}
        made.append(api.http.post(GENERATIONS, json=body).json()["id"])
    blocker = api.http.post(GENERATIONS, json={"workflow": "slow", "steps": 10_000, "delay_ms": 20, "priority": "high"}).json()["id"]
    api.http.post(f"{GENERATIONS}/{blocker}/cancel")
    for job_id in made:
        api.http.get(f"{GENERATIONS}/{job_id}/events")
    return [blocker, *reversed(made)]


def walk(api: Api, **query: Any) -> list[list[str]]:
    """Ids page by page, to the last."""
    pages: list[list[str]] = []
    cursor: str | None = None
    while cursor is not None or not pages:
        answer = api.http.get(GENERATIONS, params={**query, **({"cursor": cursor} if cursor else {})})
        assert answer.status_code == 200, answer.text
        pages.append([job["id"] for job in answer.json()["data"]])
        cursor = answer.json()["next_cursor"]
        assert len(pages) < 100
    return pages


def test_pages_show_every_job_once_and_newest_first(api: Api, listed: list[str]) -> None:
    oldest = api.http.get(f"{GENERATIONS}/{listed[-2]}").json()["created_at"]
    pages = walk(api, limit=10, created_after=oldest)
    assert [len(page) for page in pages[:2]] == [10, 10]
    shown = [job_id for page in pages for job_id in page]
    assert len(shown) == len(set(shown))
    # Jobs of the very millisecond of `created_after` are not after it.
    assert shown == listed[: len(shown)]
    assert len(shown) >= len(listed) - 5
    everything = [job_id for page in walk(api, limit=7) for job_id in page]
    assert everything[: len(listed)] == listed
    assert len(everything) == len(set(everything))


def test_filters_choose(api: Api, listed: list[str]) -> None:
    slow = [job_id for page in walk(api, limit=2, workflow="slow") for job_id in page]
    assert [job_id for job_id in slow if job_id in listed] == [listed[0], *listed[1:][4::5]]
    canceled = [job_id for page in walk(api, status="canceled") for job_id in page]
    assert set(canceled) & set(listed) == {listed[0]}
    assert set(listed) & {job_id for page in walk(api, status="succeeded", workflow="trivial") for job_id in page} == set(listed) - set(
        slow
    )
    for query in ({"workflow": "nothing"}, {"lora": "nothing"}, {"created_after": "2999-01-01T00:00:00Z"}, {"status": "expired"}):
        answer = api.http.get(GENERATIONS, params=query)
        assert answer.json() == {"data": [], "next_cursor": None}


def test_a_lora_filter_finds_its_jobs(api: Api) -> None:
    job = api.create(prompt="a red circle", steps=1, width=256, height=256, loras=[{"name": "tok", "weight": 0.5}])
    assert walk(api, lora="tok") == [[job["id"]]]


def test_a_cursor_from_far_away_is_an_empty_page(api: Api) -> None:
    for place in (b"-5:x", b"0:", b"0:\x00"):
        cursor = base64.urlsafe_b64encode(place).decode()
        assert api.http.get(GENERATIONS, params={"cursor": cursor}).json() == {"data": [], "next_cursor": None}


@pytest.fixture
def long_history(api: Api, redis_server: str) -> Iterator[list[str]]:
    """A caller whose newest 2,500 records have expired, and an older job."""
    job = api.run(workflow="trivial", color=3)
    names = {f"gen_{number:08x}": now_ms() + number for number in range(2500)}
    with redis.Redis.from_url(redis_server) as connection:
        connection.zadd("fluxgate:jobs:local", dict(names))
        connection.zadd("fluxgate:trainings:local", dict(names))
        yield [job["id"]]
        connection.zrem("fluxgate:jobs:local", *names)
        connection.delete("fluxgate:trainings:local")


def test_a_filter_that_fits_nothing_does_not_walk_a_whole_history(api: Api, long_history: list[str]) -> None:
    """It says where to go on instead; who goes on finds what is there."""
    pages = walk(api, workflow="trivial", limit=100)
    assert [len(page) for page in pages[:2]] == [0, 0]
    assert long_history[0] in pages[2]
    for path, name in (("/v1/trainings", "data"), ("/api/v2/jobs?metadata[a]=b", "jobs")):
        answer = api.http.get(path).json()
        assert answer[name] == []
        assert answer["next_cursor"]
