"""Which shape the state in Redis has, and how an older one becomes today's. What is newer than this program is refused, not guessed at.

Keys (all begin with `fluxgate:`):
  state_version       the number; absent in state from before it was written down, which counts as 0
  state_version:lock  held by the one process that migrates
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from gateway.errors import FluxgateError
from gateway.redis_client import RedisClient, connect_redis, translate_redis

log = logging.getLogger(__name__)

_KEY = "fluxgate:state_version"
LOCK_S = 30.0

Migration = Callable[[RedisClient], Awaitable[None]]


async def _name_owners(redis: RedisClient) -> None:
    """0 -> 1: LoRAs trained before owners were written down belong to who trained them, and stay open to all, as they were."""
    for file, raw in (await redis.hgetall("fluxgate:published")).items():
        lora = json.loads(raw)
        if lora.get("owner") or not lora.get("training"):
            continue
        spec = await redis.hget(f"fluxgate:job:{lora['training']}", "spec")
        if spec is not None:
            await redis.hset("fluxgate:published", file, json.dumps({**lora, "owner": json.loads(spec)["caller"], "shared": True}))


# The step at index N makes version N + 1 of version N. A step may be run again after a crash in its midst, and must bear that.
MIGRATIONS: tuple[Migration, ...] = (_name_owners,)
STATE_VERSION = len(MIGRATIONS)


class StateRefused(FluxgateError):
    """The state in Redis is not one that this program can work on."""

    code = "state_refused"


def require_known(found: int, where: str, known: int = STATE_VERSION) -> None:
    """Raise StateRefused for a state of a newer program."""
    if found > known:
        raise StateRefused(
            f"The state in {where} has version {found}; this program knows versions up to {known}.",
            hint="Start the newer program that wrote it, or restore a backup from before the upgrade.",
            details={"found": found, "known": known},
        )


async def prepare_state(redis: RedisClient, migrations: tuple[Migration, ...] = MIGRATIONS) -> None:
    """Bring the state to today's version, or wait until another process has. Raises StateRefused, RedisUnavailable."""
    found = await read_version(redis)
    require_known(found, "Redis", len(migrations))
    if found == len(migrations):
        return
    async with _alone(redis):
        # Who waited for the lock finds the work done; a newer program may even have gone further.
        found = await read_version(redis)
        require_known(found, "Redis", len(migrations))
        for number, migrate in enumerate(migrations[found:], found + 1):
            await _apply(redis, migrate, number)


async def prepare_state_at(url: str) -> None:
    """The same, for a process that has no connection of its own yet."""
    redis = connect_redis(url)
    try:
        await prepare_state(redis)
    finally:
        await redis.aclose(close_connection_pool=True)


@translate_redis
async def read_version(redis: RedisClient) -> int:
    """The number; 0 where none is written. Raises StateRefused for what is no number."""
    raw = await redis.get(_KEY)
    if raw is not None and not raw.isdigit():
        raise StateRefused(
            f"{_KEY} in Redis is {raw[:40]!r}, which is no version.", hint="Check REDIS_URL: another program may own that key."
        )
    return int(raw or 0)


@translate_redis
async def _apply(redis: RedisClient, migrate: Migration, number: int) -> None:
    await migrate(redis)
    await redis.set(_KEY, number)
    log.info("state has a new version", extra={"version": number})


@asynccontextmanager
async def _alone(redis: RedisClient) -> AsyncIterator[None]:
    """Hold the lock. It is renewed as long as we live and falls to another process soon after we died."""
    lock = redis.lock(f"{_KEY}:lock", timeout=LOCK_S, sleep=0.05)
    await _call(lock.acquire())
    renewing = asyncio.create_task(_renew(lock))
    try:
        yield
    finally:
        renewing.cancel()
        await _call(lock.release())


@translate_redis
async def _call(call: Awaitable[object]) -> None:
    await call


async def _renew(lock: RedisClient) -> None:
    while True:
        await asyncio.sleep(LOCK_S / 3)
        await lock.reacquire()
