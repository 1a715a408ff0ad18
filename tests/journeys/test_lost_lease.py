"""A dispatcher that was paused between its claim and its submit: what became somebody else's meanwhile is not run for nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest
from pydantic import SecretStr

from gateway.dispatch.execution import Execution
from gateway.dispatch.ingest import Ingest
from gateway.dispatch.instance import Instance
from gateway.dispatch.writer import LeaseLost
from gateway.jobs.records import Claim
from gateway.jobs.store import JobStore
from gateway.moderation.verdicts import Moderation
from gateway.redis_client import connect_redis
from gateway.settings import Settings
from gateway.storage import Storage
from tests.conftest import S3Access
from tests.job_specs import make_spec

SETTINGS = Settings(lease_s=0.3)
GRAPH = (
    b'{"1": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 0}},'
    b' "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "lost_lease/image"}}}'
)


@pytest.fixture
async def store(redis_url: str) -> AsyncIterator[JobStore]:
    redis = connect_redis(redis_url)
    yield JobStore(redis, ttl_s=1000)
    await redis.aclose()


@pytest.fixture
async def instance(engine: str) -> AsyncIterator[Instance]:
    async with aiohttp.ClientSession() as session:
        instance = Instance(engine, session, slots=2)
        socket = asyncio.create_task(instance.socket.run())
        assert await instance.socket.wait_connected(5)
        yield instance
        socket.cancel()


async def claim(store: JobStore, job_id: str, instance: Instance) -> Claim:
    await store.create(make_spec(job_id), GRAPH)
    claim = await store.claim(
        job_id, instance=instance.id, lease="ours", lease_s=0.3, slots=2, prompt_id=f"prompt-{job_id}", base_model="", lora_files=()
    )
    assert claim is not None
    return claim


def execute(claim: Claim, instance: Instance, store: JobStore, s3: S3Access) -> Execution:
    settings = Settings(
        s3_endpoint_url=s3.endpoint_url,
        s3_bucket=s3.bucket,
        aws_access_key_id=s3.access_key_id,
        aws_secret_access_key=SecretStr(s3.secret_access_key),
    )
    ingest = Ingest(Storage(settings), Moderation(None), tries=1)
    return Execution(claim, instance, store, ingest, SETTINGS, lambda: None, lambda job_id: False)


async def test_a_job_taken_over_during_a_pause_is_not_submitted(store: JobStore, instance: Instance, s3: S3Access) -> None:
    execution = execute(await claim(store, "taken", instance), instance, store, s3)
    await asyncio.sleep(0.35)
    assert [other.id for other in await store.take_over(lease="theirs", lease_s=10, limit=5)] == ["taken"]
    with pytest.raises(LeaseLost):
        await execution.run(resumed=False)
    queue = await instance.client.queue()
    assert not queue.holds("prompt-taken")
    assert await instance.client.history("prompt-taken") is None


async def test_a_job_canceled_during_a_pause_is_not_submitted(store: JobStore, instance: Instance, s3: S3Access) -> None:
    execution = execute(await claim(store, "canceled", instance), instance, store, s3)
    await store.cancel("canceled")
    await asyncio.sleep(0.15)
    await execution.run(resumed=False)
    job = await store.load("canceled")
    assert job is not None
    assert job.status == "canceled"
    assert await instance.client.history("prompt-canceled") is None


async def test_a_pause_that_nobody_used_is_no_loss(store: JobStore, instance: Instance, s3: S3Access) -> None:
    execution = execute(await claim(store, "kept", instance), instance, store, s3)
    await asyncio.sleep(0.35)
    # Its bucket was never made: that the picture cannot be stored shows that it was drawn.
    await execution.run(resumed=False)
    job = await store.load("kept")
    assert job is not None
    assert job.error is not None
    assert job.error.code == "upload_failed"
