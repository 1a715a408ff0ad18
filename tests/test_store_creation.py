"""Accepting jobs against a real Redis: records, limits, idempotency keys, twins, and what is said when Redis is away."""

from __future__ import annotations

import pytest

from gateway.errors import RedisUnavailable, TooManyRequests, Unprocessable
from gateway.jobs.model import Job, JobError, JobStatus, Output, new_job_id
from gateway.jobs.records import Claim, IdempotencyKey, Limits, Made
from gateway.jobs.store import JobStore
from gateway.redis_client import RedisClient, connect_redis
from local.child import pick_free_port
from tests.job_specs import GRAPH, START_MS, Clock, claim, create, finish, line, make_spec, read_all, statuses, take

pytest_plugins = ["tests.store_fixtures"]

ERROR = JobError(code="queue_timeout", message="too long")


# -- creating --------------------------------------------------------------------------------------------------


async def test_a_created_job_waits_with_its_record_graph_and_first_event(store: JobStore, redis_client: RedisClient) -> None:
    spec = make_spec("one", metadata={"naïve": "日本"})
    assert await store.create(spec, GRAPH) == ("created", "one")
    assert await store.load("one") == Job(spec=spec)
    assert await store.graph("one") == GRAPH
    assert await store.depth() == 1
    assert statuses(await read_all(redis_client, "one")) == ["queued"]


async def test_creating_twice_counts_once(store: JobStore, redis_client: RedisClient) -> None:
    await create(store, "one", "one")
    assert await line(store) == ["one"]
    assert len(await read_all(redis_client, "one")) == 1


async def test_unknown_jobs_are_unknown(store: JobStore) -> None:
    assert await store.load("none") is None
    assert await store.graph("none") is None
    assert await store.position("none") is None
    assert await store.cancel("none") is None
    assert await claim(store, "none") is None
    assert await store.load_many(["none"]) == []


async def test_a_full_queue_and_a_caller_with_too_much_are_refused(redis_client: RedisClient) -> None:
    store = JobStore(redis_client, ttl_s=1000, limits=Limits(queue_depth=3, jobs_per_caller=2))
    await create(store, "a1", "a2")
    with pytest.raises(TooManyRequests) as refused:
        await create(store, "a3")
    assert refused.value.code == "too_many_jobs"
    await create(store, "b1", caller="bob")
    with pytest.raises(TooManyRequests) as refused:
        await create(store, "b2", caller="bob")
    assert refused.value.code == "queue_full"
    assert refused.value.retry_after_s
    assert await store.load("a3") is None
    assert await store.load("b2") is None
    # A job that has ended counts for nobody any more.
    await store.cancel("a1")
    await create(store, "a4")


async def test_jobs_are_listed_newest_first_by_page(store: JobStore) -> None:
    for number in range(7):
        await create(store, f"job{number}", created_ms=START_MS + number // 2)
    await create(store, "foreign", caller="bob")
    pages, before = list[list[str]](), None
    while page := await store.ids_before("ann", before, 3):
        pages.append([job_id for _, job_id in page])
        before = page[-1]
    assert pages == [["job6", "job5", "job4"], ["job3", "job2", "job1"], ["job0"]]


# -- idempotency -----------------------------------------------------------------------------------------------


async def test_the_same_key_and_body_is_the_first_job(store: JobStore) -> None:
    key = IdempotencyKey("ann", "k1", "hash-1")
    assert await store.find_replay(key) is None
    await store.create(make_spec("one"), GRAPH, key=key)
    assert await store.create(make_spec("two"), GRAPH, key=key) == ("replay", "one")
    assert await store.load("two") is None
    await store.record_answer(key, b"first")
    await store.record_answer(key, b"second")
    assert await store.find_replay(key) == ("one", b"first")


async def test_the_same_key_with_another_body_is_refused(store: JobStore) -> None:
    await store.create(make_spec("one"), GRAPH, key=IdempotencyKey("ann", "k1", "hash-1"))
    other = IdempotencyKey("ann", "k1", "hash-2")
    for attempt in (store.find_replay(other), store.create(make_spec("two"), GRAPH, key=other)):
        with pytest.raises(Unprocessable) as refused:
            await attempt
        assert refused.value.code == "idempotency_key_reuse"
    assert await store.find_replay(IdempotencyKey("bob", "k1", "hash-2")) is None, "keys are each caller's own"


# -- twins -----------------------------------------------------------------------------------------------------


async def test_a_twin_waits_for_the_first_and_finds_its_result(store: JobStore) -> None:
    await store.create(make_spec("first", cache_key="same"), GRAPH, reuse=True)
    assert await store.create(make_spec("second", cache_key="same"), GRAPH, reuse=True) == ("following", "second")
    assert await line(store) == ["first"]
    assert await finish(store, await take(store, "first"))
    assert await line(store) == ["second"]
    assert (await take(store, "second")).cached_in == "first"
    assert await store.create(make_spec("third", cache_key="same"), GRAPH, reuse=True) == ("cached", "first")
    await store.forget_cached("same")
    assert (await store.create(make_spec("third", cache_key="same"), GRAPH, reuse=True)).outcome == "created"


@pytest.mark.parametrize("claimed", [False, True])
async def test_when_the_first_fails_its_twins_try_one_at_a_time(store: JobStore, claimed: bool) -> None:
    for job_id in ("first", "second", "third"):
        await store.create(make_spec(job_id, cache_key="same"), GRAPH, reuse=True)
    if claimed:
        await finish(store, await take(store, "first"), JobStatus.FAILED)
    else:
        await store.cancel("first")
    assert await line(store) == ["second"]
    newcomer = await store.create(make_spec("fourth", cache_key="same"), GRAPH, reuse=True)
    assert newcomer.outcome == "following", "the second is the one to wait for now"
    taken = await take(store, "second")
    assert taken.cached_in is None
    await finish(store, taken)
    assert await line(store) == ["third", "fourth"]


async def test_a_twin_can_be_canceled_while_it_follows(store: JobStore) -> None:
    for job_id in ("first", "second", "third"):
        await store.create(make_spec(job_id, cache_key="same"), GRAPH, reuse=True)
    assert await store.cancel("second") == "canceled"
    await store.cancel("first")
    assert await line(store) == ["third"]


async def test_a_twin_that_follows_waits_no_longer_than_it_said(store: JobStore, clock: Clock) -> None:
    await store.create(make_spec("first", cache_key="same", queue_timeout_s=600), GRAPH, reuse=True)
    await store.create(make_spec("second", cache_key="same", queue_timeout_s=60), GRAPH, reuse=True)
    leader = await take(store, "first")
    clock.pass_s(61)
    assert await store.overdue(10) == ["second"]
    assert await store.expire("second", ERROR) == "expired"
    await finish(store, leader)
    assert await line(store) == [], "what has expired is not woken by its leader's end"
    assert await store.overdue(10) == []


async def test_a_job_answered_from_the_cache_is_over_when_it_begins(store: JobStore, redis_client: RedisClient) -> None:
    output = Output(index=0, key="k", content_type="image/png", size_bytes=3, sha256="s")
    job = Job(spec=make_spec("one"), status=JobStatus.SUCCEEDED, cached=True, outputs=(output,))
    key = IdempotencyKey("ann", "k", "h")
    assert await store.create_finished(job, GRAPH, key=key) == ("created", "one")
    assert await store.create_finished(job.model_copy(update={"spec": make_spec("two")}), GRAPH, key=key) == ("replay", "one")
    kept = await store.load("one")
    assert kept is not None
    assert (kept.status, kept.cached, kept.outputs) == (JobStatus.SUCCEEDED, True, (output,))
    assert statuses(await read_all(redis_client, "one")) == ["succeeded"]
    assert await line(store) == []


# -- without Redis ---------------------------------------------------------------------------------------------


async def test_every_call_says_redis_is_away() -> None:
    redis = connect_redis(f"redis://127.0.0.1:{pick_free_port()}/0")
    store, spec, key = JobStore(redis, ttl_s=10), make_spec("one"), IdempotencyKey("ann", "k", "h")
    held = Claim(Job(spec=spec), GRAPH, "lease")
    calls = [
        store.create(spec, GRAPH),
        store.create_finished(held.job, GRAPH),
        store.find_replay(key),
        store.record_answer(key, b""),
        store.forget_cached("k"),
        store.load("one"),
        store.load_many(["one"]),
        store.graph("one"),
        store.ids_before("ann", None, 1),
        store.depth(),
        store.position("one"),
        store.peek(1),
        claim(store, "one"),
        store.overdue(1),
        store.take_over(lease="l", lease_s=1, limit=1),
        store.renew([held], 1),
        store.release([held]),
        store.update(held, {}, write=1),
        store.finish(held, held.job),
        store.requeue(held),
        store.cancel("one"),
        store.expire("one", ERROR),
        store.delete("one"),
    ]
    for call in calls:
        with pytest.raises(RedisUnavailable):
            await call
    await redis.aclose()


async def test_who_has_a_job_as_it_was_made_is_told_no_more_than_that_it_is_claimed(store: JobStore) -> None:
    specs = [make_spec(f"gen_{number}", cache_key=f"key{number}") for number in range(2)]
    for spec in specs:
        await store.create(spec, GRAPH, reuse=True)
    claims = [await take(store, spec.id, made=Made(Job(spec=spec), GRAPH)) for spec in specs]
    for taken in claims:
        stored = await store.load(taken.id)
        assert taken.job == stored
        assert taken.graph == GRAPH
    assert await store.requeue(claims[0], avoid=("a",)) == "queued"
    again = await take(store, specs[0].id, instance="b", made=Made(Job(spec=specs[0]), GRAPH))
    assert (again.job.attempts, again.job.avoid) == (2, ("a",)), "what was written since it was made counts"


async def test_places_of_expired_records_leave_every_callers_list(store: JobStore, redis_client: RedisClient) -> None:
    month_ms = 30 * 24 * 3600 * 1000
    for number in range(150):
        for caller in ("ann", "bob"):
            spec = make_spec(new_job_id(), caller=caller, created_ms=START_MS + number * month_ms)
            await store.create(spec, GRAPH)
            await store.cancel(spec.id)
    for index in ("fluxgate:jobs:ann", "fluxgate:jobs:bob", "fluxgate:jobs"):
        # One id in sixteen sweeps: that none of a hundred did is as likely as to guess a number of two digits.
        assert await redis_client.zcard(index) < 120
