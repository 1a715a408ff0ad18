"""A store on an empty Redis whose clock the test moves. A module that wants it says `pytest_plugins = ["tests.store_fixtures"]`."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from gateway.jobs.store import JobStore
from gateway.redis_client import RedisClient, connect_redis
from tests.job_specs import Clock


@pytest.fixture
async def redis_client(redis_url: str) -> AsyncIterator[RedisClient]:
    client = connect_redis(redis_url)
    yield client
    await client.aclose(close_connection_pool=True)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(redis_client: RedisClient, clock: Clock) -> JobStore:
    return JobStore(redis_client, ttl_s=1000, cache_ttl_s=1000, clock=clock)
