"""What a caller used, counted by the scripts that end jobs, and the limits that follow from it. Against a real Redis."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.callers.keys import CallerLimits, KeyStore, mint_key
from gateway.callers.usage import Usage
from gateway.errors import TooManyRequests
from gateway.jobs.model import Job, JobError, JobStatus, Metrics, now_ms
from gateway.jobs.records import DAY_MS, Limits, seconds_until_midnight
from gateway.jobs.store import JobStore
from gateway.jobs.trainings import TrainingStore
from gateway.redis_client import RedisClient
from tests.job_specs import GRAPH, create, make_spec, take

pytest_plugins = ["tests.store_fixtures"]


def make_store(redis_client: RedisClient, **limits: int) -> JobStore:
    """One whose days are today's."""
    return JobStore(redis_client, ttl_s=1000, limits=Limits(**limits))


async def end(
    store: JobStore, job_id: str, status: JobStatus = JobStatus.SUCCEEDED, *, execution_ms: int | None = None, **more: Any
) -> None:
    taken = await take(store, job_id)
    changes = {"status": status, "metrics": Metrics(execution_ms=execution_ms), **more}
    assert await store.finish(taken, taken.job.model_copy(update=changes))


async def read_today(redis_client: RedisClient, caller: str = "ann") -> dict[str, Any]:
    days = await Usage(redis_client).read(caller, days=2)
    return days[0] if days else {}


async def test_jobs_and_gpu_time_are_counted_once_by_outcome(redis_client: RedisClient) -> None:
    store = make_store(redis_client)
    await create(store, "one", "two", "three", "four")
    await end(store, "one", execution_ms=1500)
    await end(store, "two", JobStatus.FAILED, execution_ms=500, error=JobError(code="x", message="x"))
    await end(store, "three", execution_ms=9000, cached=True)
    await store.cancel("four")
    await store.cancel("four")
    today = await read_today(redis_client)
    assert today["jobs"] == {"succeeded": 2, "failed": 1, "canceled": 1, "expired": 0}
    assert today["gpu_seconds"] == 2.0, "what the cache answered took no GPU"
    assert await read_today(redis_client, "bob") == {}


async def test_an_end_that_is_told_twice_counts_once(redis_client: RedisClient) -> None:
    store = make_store(redis_client)
    await create(store, "one")
    taken = await take(store, "one")
    ended = taken.job.model_copy(update={"status": JobStatus.SUCCEEDED, "metrics": Metrics(execution_ms=700)})
    assert [await store.finish(taken, ended) for _ in range(2)] == [True, True]
    assert (await read_today(redis_client))["gpu_seconds"] == 0.7


async def test_a_job_stopped_while_it_ran_counts_from_its_start(redis_client: RedisClient) -> None:
    store = make_store(redis_client)
    await create(store, "one")
    taken = await take(store, "one")
    await store.update(taken, {"status": JobStatus.RUNNING, "started_ms": now_ms() - 60_000}, write=1)
    assert await store.finish(taken, taken.job.model_copy(update={"status": JobStatus.CANCELED}))
    assert 60 <= (await read_today(redis_client))["gpu_seconds"] < 120


async def test_gpu_seconds_of_the_day_are_a_limit_until_midnight(redis_client: RedisClient) -> None:
    store = make_store(redis_client, gpu_seconds_per_day=2)
    await create(store, "one")
    await end(store, "one", execution_ms=1999)
    await create(store, "two")
    await end(store, "two", execution_ms=1)
    with pytest.raises(TooManyRequests) as refused:
        await create(store, "three")
    assert refused.value.code == "gpu_seconds_spent"
    assert refused.value.details["limit"] == "gpu_seconds_per_day"
    assert (refused.value.details["value"], refused.value.details["allowed"]) == (2, 2)
    assert refused.value.retry_after_s is not None
    assert 1 <= refused.value.retry_after_s <= DAY_MS // 1000
    assert await store.load("three") is None
    await create(store, "bobs", caller="bob")
    trainings = TrainingStore(redis_client, ttl_s=1000, limits=Limits(gpu_seconds_per_day=2))
    with pytest.raises(TooManyRequests):
        await trainings.create_training(make_spec("four", kind="training"))


async def test_the_limits_of_a_key_replace_those_of_the_settings(redis_client: RedisClient) -> None:
    store, keys = make_store(redis_client, jobs_per_caller=1, gpu_seconds_per_day=1), KeyStore(redis_client)
    key, _ = mint_key("k", ("generate",), caller="ann")
    await keys.add(key, CallerLimits(jobs_in_flight=2, gpu_seconds_per_day=10))
    await create(store, "one")
    await end(store, "one", execution_ms=5000)
    await create(store, "two", "three")
    with pytest.raises(TooManyRequests) as refused:
        await create(store, "four")
    assert refused.value.details == {"limit": "jobs_in_flight", "value": 2, "allowed": 2}
    await store.cancel("three")
    await store.cancel("two")
    await keys.add(mint_key("another", ("generate",), caller="ann")[0], CallerLimits(gpu_seconds_per_day=5))
    with pytest.raises(TooManyRequests) as refused:
        await create(store, "five")
    assert refused.value.details["limit"] == "gpu_seconds_per_day"


async def test_what_is_answered_from_the_cache_needs_no_gpu_seconds(redis_client: RedisClient) -> None:
    store = JobStore(redis_client, ttl_s=1000, cache_ttl_s=1000, limits=Limits(gpu_seconds_per_day=1))
    await create(store, "one", cache_key="same")
    await end(store, "one", execution_ms=5000)
    admitted = await store.create(make_spec("two", cache_key="same"), GRAPH, reuse=True)
    assert admitted == ("cached", "one")
    answered = Job(spec=make_spec("two", cache_key="same"), status=JobStatus.SUCCEEDED, cached=True)
    assert (await store.create_finished(answered, GRAPH)).outcome == "created"
    assert (await read_today(redis_client))["jobs"]["succeeded"] == 2


@pytest.mark.parametrize(("now", "seconds"), [(0, 86401), (DAY_MS - 1, 1), (DAY_MS, 86401), (5 * DAY_MS + 3_600_000, 82801)])
def test_the_day_ends_at_midnight(now: int, seconds: int) -> None:
    assert seconds_until_midnight(now) == seconds
