"""Two hundred jobs whose callers connect early, late, twice and never: each reads the stored stream, whole and once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import aiohttp
import redis

from tests.journeys.api import PATIENCE_S, TERMINAL, Api, SseEvent, parse_frame, strip_signatures

JOBS = 200


class Listener:
    """One caller of many: makes jobs and reads streams over a shared pool."""

    def __init__(self, session: aiohttp.ClientSession, api: Api) -> None:
        self._session = session
        self._url = str(api.http.base_url)

    async def create(self, number: int) -> str:
        # Every fourth job takes its time, so that its caller can leave and come back in the middle.
        body = {"workflow": "slow", "steps": 10, "delay_ms": 10} if number % 4 == 2 else {"workflow": "trivial", "color": number}
        async with self._session.post(f"{self._url}/v1/generations", json=body) as answer:
            assert answer.status == 202, await answer.text()
            return str((await answer.json())["id"])

    async def wait(self, job_id: str) -> None:
        while True:
            async with self._session.get(f"{self._url}/v1/generations/{job_id}") as answer:
                job = await answer.json()
            if job["status"] in TERMINAL:
                assert job["status"] == "succeeded", job
                return
            await asyncio.sleep(0.2)

    async def follow(self, job_id: str, after: str | None = None) -> AsyncIterator[SseEvent]:
        """Events with an id, to the end of the stream."""
        headers = {"Last-Event-ID": after} if after else {}
        async with self._session.get(f"{self._url}/v1/generations/{job_id}/events", headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            buffer = b""
            async for chunk in answer.content.iter_any():
                *frames, buffer = (buffer + chunk).split(b"\n\n")
                for event in (parse_frame(frame.decode()) for frame in frames):
                    if event is not None and event.id is not None:
                        yield event

    async def read(self, job_id: str, after: str | None = None) -> list[SseEvent]:
        return [event async for event in self.follow(job_id, after)]

    async def read_in_two_visits(self, job_id: str, leave_after: int) -> list[SseEvent]:
        seen: list[SseEvent] = []
        async for event in self.follow(job_id):
            seen.append(event)
            if len(seen) == leave_after:
                break
        return seen + await self.read(job_id, seen[-1].id)

    async def visit(self, number: int) -> tuple[str, list[list[SseEvent]]]:
        """Make a job and read it as callers of this kind do: the job's id, and what each of them has seen."""
        job_id = await self.create(number)
        match number % 4:
            case 0:
                return job_id, [await self.read(job_id)]
            case 1:
                await self.wait(job_id)
                return job_id, [await self.read(job_id)]
            case 2:
                visits = (self.read_in_two_visits(job_id, leave_after=1 + number % 7), self.read(job_id))
                return job_id, list(await asyncio.gather(*visits))
        await self.wait(job_id)
        return job_id, []


def strip(events: list[SseEvent]) -> list[SseEvent]:
    return [event._replace(data=strip_signatures(event.data)) for event in events]


async def test_no_event_is_lost_or_repeated_for_anybody(api: Api, redis_server: str) -> None:
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S * 2)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        listener = Listener(session, api)
        visits = await asyncio.gather(*(listener.visit(number) for number in range(JOBS)))
        replays = {job_id: await listener.read(job_id) for job_id, _ in visits}
    assert len(replays) == JOBS
    with redis.Redis.from_url(redis_server) as connection:
        stored = {job_id: [entry[0].decode() for entry in connection.xrange(f"fluxgate:events:{job_id}")] for job_id in replays}
    for job_id, replay in replays.items():
        assert [event.id for event in replay] == stored[job_id]
        assert [event.data["status"] for event in replay if event.kind == "status"] == ["queued", "running", "succeeded"]
    readings = [(job_id, seen) for job_id, reading in visits for seen in reading]
    assert len(readings) == JOBS // 4 * 4
    for job_id, seen in readings:
        assert strip(seen) == strip(replays[job_id])


def test_a_position_in_the_middle_gives_exactly_the_rest(api: Api) -> None:
    job = api.run(workflow="slow", steps=4, delay_ms=5)
    whole = strip(api.replay(job["id"]))
    assert len(whole) >= 8
    for index, event in enumerate(whole):
        assert strip(api.replay(job["id"], after=event.id)) == whole[index + 1 :]
    by_query = api.http.get(f"/v1/generations/{job['id']}/events", params={"after": whole[2].id}).text
    frames = [parse_frame(frame) for frame in by_query.split("\n\n")]
    assert [event.id for event in frames if event is not None] == [None, *(event.id for event in whole[3:])]


def test_a_stream_tells_proxies_to_keep_out_and_may_be_posted(api: Api) -> None:
    job = api.run(workflow="trivial")
    for method in ("GET", "POST"):
        answer = api.http.request(method, f"/v1/generations/{job['id']}/events")
        assert answer.headers["cache-control"] == "no-cache, no-transform"
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.text.rstrip("\n").rpartition("event: ")[2].startswith("status\n")


def count_open_streams(api: Api) -> float:
    metrics = api.http.get("/metrics").text
    return next(float(line.rpartition(" ")[2]) for line in metrics.splitlines() if line.startswith("fluxgate_event_streams "))


def test_a_stream_ends_with_its_client_and_not_with_its_job(api: Api) -> None:
    before = count_open_streams(api)
    job = api.create(workflow="slow", steps=400, delay_ms=50)
    with api.http.stream("GET", f"/v1/generations/{job['id']}/events") as answer:
        chunks = answer.iter_bytes()
        assert next(chunks)
        assert count_open_streams(api) == before + 1
    deadline = time.monotonic() + PATIENCE_S
    while count_open_streams(api) > before:
        assert time.monotonic() < deadline, "the stream outlives its client"
        time.sleep(0.05)
    assert api.http.get(f"/v1/generations/{job['id']}").json()["status"] in ("queued", "running")
    api.http.post(f"/v1/generations/{job['id']}/cancel")


def test_previews_come_to_those_who_ask_and_are_no_part_of_the_history(api: Api) -> None:
    job = api.create(workflow="slow", steps=20, delay_ms=30)
    text = api.http.get(f"/v1/generations/{job['id']}/events", params={"previews": "1"}).text
    events = [event for event in map(parse_frame, text.split("\n\n")) if event is not None]
    previews = [event for event in events if event.kind == "preview"]
    assert previews
    assert all(event.id is None and event.data["mime"] == "image/jpeg" for event in previews)
    assert "preview" not in {event.kind for event in api.replay(job["id"])}


def test_previews_that_nobody_asked_for_are_not_sent(api: Api, redis_server: str) -> None:
    job = api.run(workflow="slow", steps=5, delay_ms=50)
    with redis.Redis.from_url(redis_server) as connection:
        feed = [fields[b"k"] for _, fields in connection.xrange("fluxgate:feed") if fields[b"j"] == job["id"].encode()]
    assert b"progress" in feed
    assert b"preview" not in feed
