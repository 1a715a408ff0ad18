"""Published LoRAs in Redis, while several change them at once."""

from __future__ import annotations

import asyncio

from gateway.jobs.trainings import TrainingStore
from gateway.loras.registry import Lora, LoraRegistry
from gateway.redis_client import RedisClient
from tests.job_specs import make_spec

pytest_plugins = ["tests.store_fixtures"]
FILE = "style-1.safetensors"


async def read(registry: LoraRegistry) -> list[tuple[bool, str | None]]:
    return [(lora.shared, lora.before) for lora in await registry.published()]


async def test_what_two_change_at_once_is_both_kept(redis_client: RedisClient) -> None:
    """Who takes back what was shared must not find it shared again because its pictures were drawn meanwhile."""
    registry = LoraRegistry(redis_client)
    for turn in range(20):
        await registry.announce(Lora(name="style", file=FILE, sha256="0" * 64, owner="ann", shared=True))
        before = f"gen_{turn}"
        await asyncio.gather(registry.change(FILE, before=before), registry.change(FILE, shared=False), registry.change(FILE, after="gen"))
        assert await read(registry) == [(False, before)]


async def test_what_was_taken_back_stays_so_whatever_is_learnt_of_it_later(redis_client: RedisClient) -> None:
    registry = LoraRegistry(redis_client)
    await registry.announce(Lora(name="style", file=FILE, sha256="0" * 64, owner="ann"))
    await registry.withdraw(FILE)
    assert await registry.change(FILE, before="gen_1", after="gen_2") is None
    assert await read(registry) == []
    assert await redis_client.sismember("fluxgate:withdrawn", FILE)


async def test_a_cancel_and_a_publication_know_of_each_other_whichever_is_first(redis_client: RedisClient) -> None:
    registry, trainings = LoraRegistry(redis_client), TrainingStore(redis_client, ttl_s=1000)
    lora = Lora(name="style", file=FILE, sha256="0" * 64, owner="ann")
    for turn in range(20):
        job_id = f"imp_{turn}"
        await trainings.create_training(make_spec(job_id, kind="training"))
        claim = await trainings.claim_training(job_id, lease="worker", lease_s=10)
        assert claim is not None
        assert await trainings.update(claim, {"status": "running"}, [], write=1) == "running"
        published, status = await asyncio.gather(registry.announce(lora, claim), trainings.cancel(job_id))
        assert status == "canceling"
        assert bool(await read(registry)) is published
        assert await registry.announce(lora, claim) is published, "sent twice over a broken connection"
        await registry.withdraw(FILE)
        assert await registry.announce(lora, claim) is False
        assert await read(registry) == []


async def test_who_lost_its_job_publishes_nothing(redis_client: RedisClient) -> None:
    registry, trainings = LoraRegistry(redis_client), TrainingStore(redis_client, ttl_s=1000)
    await trainings.create_training(make_spec("imp_1", kind="training"))
    lost = await trainings.claim_training("imp_1", lease="one", lease_s=0.001)
    await asyncio.sleep(0.01)
    mine = await trainings.claim_training("imp_1", lease="other", lease_s=10)
    assert lost is not None
    assert mine is not None
    await trainings.update(mine, {"status": "running"}, [], write=1)
    lora = Lora(name="style", file=FILE, sha256="0" * 64, owner="ann")
    assert [await registry.announce(lora, claim) for claim in (lost, mine)] == [False, True]
