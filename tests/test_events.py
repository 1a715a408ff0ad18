"""Following a job's events: every kept event once and in order, whenever one comes, however slow one is, whatever Redis does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from gateway.errors import RedisUnavailable
from gateway.jobs.events import BACKLOG, EventFeed, Throttle
from gateway.jobs.model import Event, EventKind, Job, JobStatus
from gateway.jobs.records import Claim, EventDraft
from gateway.jobs.store import JobStore
from gateway.redis_client import RedisClient, connect_reader, connect_redis, translate_redis
from gateway.waiting import wait_until_ended
from local.child import pick_free_port
from local.services import RedisServer
from tests.job_specs import create, finish, is_in_order, read_all, statuses, take

T = TypeVar("T")

pytest_plugins = ["tests.store_fixtures"]

# What a wait may last before the test gives up: long, because it decides nothing.
PATIENCE_S = 30


@asynccontextmanager
async def running_feed(url: str, block_s: float = 2.0) -> AsyncIterator[EventFeed]:
    redis, reader = connect_redis(url), connect_reader(url, block_s)
    feed = EventFeed(redis, reader)
    await feed.open()
    task = asyncio.create_task(feed.run())
    try:
        yield feed
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await reader.aclose(close_connection_pool=True)
        await redis.aclose(close_connection_pool=True)


async def write(store: JobStore, claim: Claim, count: int) -> None:
    """`count` progress events, told apart by their data, in writes of at most 50."""
    for start in range(0, count, 50):
        claim.writes += 1
        drafts: list[EventDraft] = [
            (EventKind.PROGRESS, "", f'{{"write": {claim.writes}, "n": {number}}}') for number in range(start, min(start + 50, count))
        ]
        await persist(partial(store.update, claim, {}, drafts, write=claim.writes))


async def persist(call: Callable[[], Awaitable[T]]) -> T:
    """As a dispatcher does: the same call again until Redis is there."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await call()
            except RedisUnavailable:
                await asyncio.sleep(0.05)


async def follow_to_the_end(feed: EventFeed, job_id: str, after: str = "0") -> list[Event]:
    """Everything up to the terminal status, as a stream's client sees it."""
    events: list[Event] = []
    async with asyncio.timeout(PATIENCE_S):
        async for event in feed.follow(job_id, after, idle_s=0.5):
            if event is not None:
                events.append(event)
                if event.kind == EventKind.STATUS and Job.model_validate_json(event.data).is_terminal:
                    break
    return events


async def until_seen(feed: EventFeed, job_id: str, status: str) -> None:
    """Returns when the feed has delivered this status of this job to everybody."""
    seen = asyncio.Event()
    feed.observe(lambda which, kind, what, _: seen.set() if (which, kind, what) == (job_id, "status", status) else None)
    async with asyncio.timeout(PATIENCE_S):
        await seen.wait()


async def test_whoever_comes_when_they_come_gets_every_event_once(store: JobStore, redis_client: RedisClient, redis_url: str) -> None:
    async with running_feed(redis_url) as feed, asyncio.TaskGroup() as group:
        followers = [group.create_task(follow_to_the_end(feed, "job")) for _ in range(2)]
        await create(store, "job", "other")
        mine, foreign = await take(store, "job"), await take(store, "other")
        for _ in range(10):
            followers.append(group.create_task(follow_to_the_end(feed, "job")))
            await write(store, mine, 60)
            await write(store, foreign, 7)
        await finish(store, mine)
        followers.append(group.create_task(follow_to_the_end(feed, "job")))
    kept = await read_all(redis_client, "job")
    assert len(kept) == 602
    assert is_in_order(kept)
    for follower in followers:
        assert follower.result() == kept


async def test_coming_back_goes_on_after_the_last_event_seen(store: JobStore, redis_client: RedisClient, redis_url: str) -> None:
    await create(store, "job")
    mine = await take(store, "job")
    await write(store, mine, 30)
    halfway = await read_all(redis_client, "job")
    async with running_feed(redis_url) as feed, asyncio.TaskGroup() as group:
        returns = {event.id: group.create_task(follow_to_the_end(feed, "job", event.id)) for event in halfway[::6]}
        await write(store, mine, 30)
        await finish(store, mine)
    kept = await read_all(redis_client, "job")
    for event_id, follower in returns.items():
        assert follower.result() == [event for event in kept if event.is_after(event_id)]


async def test_a_listener_that_falls_behind_catches_up_from_the_stream(store: JobStore, redis_client: RedisClient, redis_url: str) -> None:
    await create(store, "job")
    mine = await take(store, "job")
    async with running_feed(redis_url) as feed:
        events: list[Event | None] = []
        async with asyncio.timeout(PATIENCE_S):
            async for event in feed.follow("job"):
                events.append(event)
                if len(events) == 1:
                    # While this listener is busy with its first event everything else is written and delivered.
                    delivered = asyncio.create_task(until_seen(feed, "job", "succeeded"))
                    await asyncio.sleep(0)
                    await write(store, mine, BACKLOG + 700)
                    await finish(store, mine)
                    await delivered
                if len(events) == BACKLOG + 702:
                    break
    assert events == await read_all(redis_client, "job")


@translate_redis
async def kill_connections(redis: RedisClient) -> None:
    """Every connection but the one that says so."""
    await redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


async def test_what_is_past_is_told_while_the_feed_is_silent(
    store: JobStore, redis_client: RedisClient, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer than the test's patience: whoever waits for the feed's own read to end waits in vain.
    monkeypatch.setattr("gateway.jobs.events.BLOCK_MS", 10 * PATIENCE_S * 1000)
    await create(store, "job")
    await finish(store, await take(store, "job"))
    async with running_feed(redis_url, 10 * PATIENCE_S) as feed:
        await asyncio.sleep(0.05)
        assert await follow_to_the_end(feed, "job") == await read_all(redis_client, "job")


async def test_a_cut_connection_costs_no_event(store: JobStore, redis_client: RedisClient, redis_url: str) -> None:
    await create(store, "job")
    mine = await take(store, "job")
    async with running_feed(redis_url) as feed, asyncio.TaskGroup() as group:
        follower = group.create_task(follow_to_the_end(feed, "job"))
        for _ in range(5):
            await write(store, mine, 20)
            await persist(lambda: kill_connections(redis_client))
            await write(store, mine, 20)
        await finish(store, mine)
    assert follower.result() == await read_all(redis_client, "job")


async def test_a_restart_of_redis_costs_no_event(tmp_path: Path) -> None:
    server = RedisServer(tmp_path, pick_free_port())
    server.start()
    server.wait_ready()
    redis = connect_redis(server.url)
    try:
        store = JobStore(redis, ttl_s=1000)
        await create(store, "job")
        mine = await take(store, "job")
        async with running_feed(server.url) as feed, asyncio.TaskGroup() as group:
            follower = group.create_task(follow_to_the_end(feed, "job"))
            await write(store, mine, 20)
            await asyncio.to_thread(server.stop)
            server.start()
            await asyncio.to_thread(server.wait_ready)
            await write(store, mine, 20)
            await persist(lambda: finish(store, mine))
        assert follower.result() == await read_all(redis, "job")
    finally:
        await redis.aclose(close_connection_pool=True)
        server.stop()


async def test_previews_go_to_those_who_ask_and_only_the_newest(store: JobStore, redis_url: str) -> None:
    await create(store, "job")
    mine = await take(store, "job")
    async with running_feed(redis_url) as feed:
        with feed.subscribe("job", previews=True) as asking, feed.subscribe("job") as other:
            previews: list[EventDraft] = [(EventKind.PREVIEW, "", f'{{"n": {number}}}') for number in range(5)]
            delivered = asyncio.create_task(until_seen(feed, "job", "succeeded"))
            await asyncio.sleep(0)
            await store.update(mine, {}, [*previews, (EventKind.PROGRESS, "", "{}")], write=1)
            await finish(store, mine)
            await delivered
            assert [(event.kind, event.data) for event in asking.take()][::2] == [("progress", b"{}"), ("preview", b'{"n": 4}')]
            assert [event.kind for event in other.take()] == ["progress", "status"]


async def test_silence_is_told(store: JobStore, redis_url: str) -> None:
    await create(store, "job")
    async with running_feed(redis_url) as feed:
        said = []
        async for event in feed.follow("job", idle_s=0.01):
            said.append(event.kind if event else None)
            if len(said) == 3:
                break
        assert said == ["status", None, None]


async def test_closing_the_feed_ends_every_stream(store: JobStore, redis_url: str) -> None:
    await create(store, "job")
    async with running_feed(redis_url) as feed:
        began = [asyncio.Event() for _ in range(3)]

        async def follow(started: asyncio.Event) -> int:
            count = 0
            async for event in feed.follow("job", idle_s=0.05):
                count += event is not None
                started.set()
            return count

        followers = [asyncio.create_task(follow(started)) for started in began]
        async with asyncio.timeout(PATIENCE_S):
            for started in began:
                await started.wait()
            feed.close()
            assert await asyncio.gather(*followers) == [1, 1, 1]
            assert [event async for event in feed.follow("job")] == [], "one that comes later is not kept waiting either"


async def test_observers_see_every_event_of_every_job(store: JobStore, redis_url: str) -> None:
    seen: list[tuple[str, str, str]] = []
    async with running_feed(redis_url) as feed:
        feed.observe(lambda job_id, kind, status, _: seen.append((job_id, kind, status)))
        ended = asyncio.create_task(until_seen(feed, "two", "failed"))
        await asyncio.sleep(0)
        await create(store, "one", "two")
        await store.cancel("one")
        await finish(store, await take(store, "two"), JobStatus.FAILED)
        await ended
    told = [("one", "queued"), ("two", "queued"), ("one", "canceled"), ("two", "failed")]
    assert [(job_id, status) for job_id, kind, status in seen if kind == "status"] == told


async def test_what_was_written_before_the_feed_opened_is_no_news(store: JobStore, redis_client: RedisClient, redis_url: str) -> None:
    await create(store, "old")
    seen: list[str] = []
    async with running_feed(redis_url) as feed:
        feed.observe(lambda job_id, *_: seen.append(job_id))
        done = asyncio.create_task(until_seen(feed, "new", "queued"))
        await asyncio.sleep(0)
        await create(store, "new")
        await done
    assert seen == ["new"]
    assert statuses(await read_all(redis_client, "old")) == ["queued"]


# -- thinning --------------------------------------------------------------------------------------------------


def progress(number: int) -> Event:
    return Event(f"{number}-0", EventKind.PROGRESS, b"{}")


@pytest.fixture
def seconds() -> list[float]:
    """A clock: its only element is the time."""
    return [0.0]


def ids(events: list[Event]) -> list[str]:
    return [event.id for event in events]


def test_a_burst_passes_and_a_flood_is_thinned(seconds: list[float]) -> None:
    throttle = Throttle(rate_per_s=10, burst=5, clock=lambda: seconds[0])
    passed = [event for number in range(50) for event in throttle.thin([progress(number)])]
    assert ids(passed) == ["0-0", "1-0", "2-0", "3-0", "4-0"]
    seconds[0] += 0.25
    assert ids(throttle.thin([progress(number) for number in range(50, 60)])) == ["50-0", "51-0"]


def test_the_newest_held_back_comes_before_what_is_no_progress(seconds: list[float]) -> None:
    throttle = Throttle(rate_per_s=1, burst=1, clock=lambda: seconds[0])
    throttle.thin([progress(number) for number in range(3)])
    assert ids(throttle.thin([Event("3-0", EventKind.OUTPUT, b"{}")])) == ["2-0", "3-0"]
    assert throttle.thin([]) == []
    assert throttle.due_s is None


def test_what_was_held_back_goes_when_its_time_has_come(seconds: list[float]) -> None:
    throttle = Throttle(rate_per_s=4, burst=1, clock=lambda: seconds[0])
    assert ids(throttle.thin([progress(number) for number in range(3)])) == ["0-0"]
    assert throttle.thin([]) == []
    assert throttle.due_s == 0.25
    seconds[0] += 0.25
    assert throttle.thin([]) == [progress(2)]
    assert throttle.due_s is None


async def test_who_waits_hears_an_end_of_this_process_without_the_feed(store: JobStore, redis_client: RedisClient) -> None:
    """The feed brings it too, to all processes; here it is not even read."""
    feed = EventFeed(redis_client, redis_client)
    await create(store, "one", "two")
    one, two = await take(store, "one"), await take(store, "two")
    waiting = asyncio.create_task(wait_until_ended(store, feed, one.job, PATIENCE_S))
    await asyncio.sleep(0)
    assert await finish(store, two)
    assert not await store.finish(Claim(one.job, one.graph, "another's"), one.job), "only an end that counts is told"
    assert not waiting.done()
    assert await finish(store, one)
    async with asyncio.timeout(PATIENCE_S / 10):
        assert (await waiting).status is JobStatus.SUCCEEDED
