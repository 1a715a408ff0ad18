"""Published LoRAs in Redis, while several change them at once."""

from __future__ import annotations

import asyncio

from gateway.loras.registry import Lora, LoraRegistry
from gateway.redis_client import RedisClient

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
