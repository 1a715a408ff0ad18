"""Where an imported file comes from may hold a key of its sender's: it is kept as long as the worker may ask for it, and no longer."""

from __future__ import annotations

import pytest

from gateway.errors import TooManyRequests
from gateway.jobs.model import JobSpec, JobStatus
from gateway.jobs.records import IdempotencyKey, Limits
from gateway.jobs.trainings import IMPORT, TrainingStore
from gateway.redis_client import RedisClient
from tests.job_specs import LEASE_S, make_spec
from tests.journeys.planted import read_redis

pytest_plugins = ["tests.store_fixtures"]
SECRET = "https://somewhere.example/style.safetensors?token=planted-for-this-test"


def make_import(job_id: str) -> JobSpec:
    return make_spec(job_id, kind="training", workflow=IMPORT)


def find_secret(redis_url: str) -> list[str]:
    return [place for place, said in read_redis(redis_url) if SECRET.encode() in said]


@pytest.fixture
def imports(redis_client: RedisClient) -> TrainingStore:
    return TrainingStore(redis_client, ttl_s=1000, limits=Limits(jobs_per_caller=1))


@pytest.mark.parametrize("ending", ["canceled in the queue", "canceled at work", "failed", "succeeded"])
async def test_it_is_gone_however_the_import_ends(imports: TrainingStore, redis_url: str, ending: str) -> None:
    await imports.create_training(make_import("imp_1"), source=SECRET)
    assert await imports.source_of("imp_1") == SECRET.encode()
    assert find_secret(redis_url) == ["fluxgate:job:imp_1 source"], "nobody's record shows it"
    claim = await imports.claim_training("imp_1", lease="worker", lease_s=LEASE_S) if ending != "canceled in the queue" else None
    if ending.startswith("canceled"):
        await imports.cancel("imp_1")
    if claim:
        assert SECRET not in repr(claim.job)
        status = JobStatus(ending.partition(" ")[0])
        assert await imports.source_of("imp_1"), "it is not over"
        assert await imports.finish(claim, claim.job.model_copy(update={"status": status}))
    job = await imports.load("imp_1")
    assert job
    assert job.is_terminal
    assert await imports.source_of("imp_1") is None
    assert find_secret(redis_url) == []


async def test_of_a_request_that_makes_no_import_nothing_is_kept(imports: TrainingStore, redis_url: str) -> None:
    key = IdempotencyKey("ann", "k", "hash")
    await imports.create_training(make_import("imp_1"), key=key, source="")
    again = await imports.create_training(make_import("imp_2"), key=key, source=SECRET)
    assert (again.outcome, again.job_id) == ("replay", "imp_1")
    with pytest.raises(TooManyRequests):
        await imports.create_training(make_import("imp_3"), source=SECRET)
    assert find_secret(redis_url) == []
