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
SLOW_GRAPH = (
    GRAPH.replace(b'"images": ["1", 0]', b'"images": ["3", 0]')[:-1]
    + b', "3": {"class_type": "SlowImage", "inputs": {"images": ["1", 0], "steps": 600, "delay_ms": 50}}}'
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


async def claim(store: JobStore, job_id: str, instance: Instance, graph: bytes = GRAPH) -> Claim:
    await store.create(make_spec(job_id), graph)
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


@pytest.mark.parametrize("started_anew", [True, False])
async def test_a_prompt_whose_job_was_started_anew_is_stopped(
    store: JobStore, instance: Instance, s3: S3Access, started_anew: bool
) -> None:
    """Whoever does not know the instance starts the job anew; whoever does follows the prompt that runs."""
    job_id = f"anew-{started_anew}"
    execution = execute(await claim(store, job_id, instance, SLOW_GRAPH), instance, store, s3)
    running = asyncio.create_task(execution.run(resumed=False))
    async with asyncio.timeout(20):
        runs = False
        while not runs:
            runs = f"prompt-{job_id}" in (await instance.client.queue()).running
        await asyncio.sleep(0.35)
        taken = await store.take_over(lease="theirs", lease_s=10, limit=5)
        if started_anew:
            assert await store.requeue(taken[0]) == "queued"
        execution.lose()
        with pytest.raises(LeaseLost):
            await running
        await execution.stop_if_replaced()
        still_runs = (await instance.client.queue()).holds(f"prompt-{job_id}")
        while started_anew and still_runs:
            still_runs = (await instance.client.queue()).holds(f"prompt-{job_id}")
        assert still_runs is not started_anew
        await instance.client.interrupt(f"prompt-{job_id}")


async def test_a_pause_that_nobody_used_is_no_loss(store: JobStore, instance: Instance, s3: S3Access) -> None:
    execution = execute(await claim(store, "kept", instance), instance, store, s3)
    await asyncio.sleep(0.35)
    # Its bucket was never made: that the picture cannot be stored shows that it was drawn.
    await execution.run(resumed=False)
    job = await store.load("kept")
    assert job is not None
    assert job.error is not None
    assert job.error.code == "upload_failed"
