"""Batches in Redis. Their items become jobs by the same script as every other job, which knows whose turn in the batch it is.

Keys (all begin with `fluxgate:`):
  batch:{id}           hash: spec, caller, total, fed (items that are jobs, or never will be), canceled, ended_ms, archive, ...
  batch:{id}:items     packets of items, as accepted
  batch:{id}:states    one letter for each item
  batch:{id}:live      ids of its jobs that have not ended
  batches              those that have not ended; batches:{caller} all of a caller's; both by time of making
  open_batches:{caller}  a caller's that have not ended
  batch_chores         those to be zipped or cleared away, by the time somebody may do it
  batch_feeder:{id}    who hands out its items just now; a hint that saves work, no lock
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from gateway.errors import TooManyRequests
from gateway.jobs.batch_records import PACKET, Archive, Batch, BatchSpec, pack, unpack
from gateway.jobs.model import JobStatus
from gateway.jobs.records import IDEMPOTENCY_TTL_S, IdempotencyKey, Item, pair_up
from gateway.jobs.scripts import load_scripts
from gateway.jobs.store import LONGEST_LIFE_S
from gateway.redis_client import RedisClient, read_index, translate_redis


class BatchStore:
    """All reads and writes of batches but that of an item becoming a job. Raises RedisUnavailable."""

    def __init__(self, redis: RedisClient, *, ttl_s: int, per_caller: int) -> None:
        """`ttl_s`: how long a batch that has ended is kept; `per_caller`: unfinished batches of one caller."""
        self._redis, self._ttl_s, self._per_caller = redis, ttl_s, per_caller
        names = ("create_batch", "look_batch", "cancel_batch", "delete_batch", "claim_chore")
        self._create, self._look, self._cancel, self._delete, self._claim_chore = load_scripts(redis, *names)

    @translate_redis
    async def create(self, spec: BatchSpec, items: Sequence[Item], webhook: str, key: IdempotencyKey | None) -> str:
        """Accept a batch whole; its id, or that of the first request with this key. Raises TooManyRequests."""
        # Packing 10,000 items takes a second: other requests go on meanwhile.
        packets = [await asyncio.to_thread(pack, items[start : start + PACKET]) for start in range(0, len(items), PACKET)]
        replay = [key.record, key.body_hash, IDEMPOTENCY_TTL_S] if key else ["", "", 0]
        answer = await self._create(
            args=[
                *("", spec.id, spec.caller, spec.created_ms, spec.model_dump_json(), spec.total, webhook, self._per_caller),
                *(*replay, spec.created_ms - (self._ttl_s + LONGEST_LIFE_S) * 1000, *packets),
            ]
        )
        if answer[0] == b"caller_full":
            message = f"You have {answer[1]} unfinished batches."
            raise TooManyRequests(message, code="too_many_batches", retry_after_s=60, details={"allowed": self._per_caller})
        if answer[0] == b"replay":
            assert key is not None, "only a request with a key can be a replay"
            key.require_same_body(answer[1].decode())
            return str(answer[2].decode())
        return spec.id

    @translate_redis
    async def load(self, batch_id: str) -> Batch | None:
        """The batch at this moment, also one that is being cleared away."""
        answer = await self._look(args=[batch_id])
        return _decode(*answer) if answer else None

    @translate_redis
    async def ids_before(self, caller: str, before: tuple[int, str] | None, limit: int) -> list[tuple[int, str]]:
        """A caller's batches older than `before` = (created_ms, id), newest first, as such pairs."""
        return await read_index(self._redis, f"fluxgate:batches:{caller}", before, limit)

    @translate_redis
    async def packet(self, batch_id: str, number: int) -> list[Item]:
        """The items from PACKET * number on; empty when there are none."""
        raw = await self._redis.hget(f"fluxgate:batch:{batch_id}:items", number)
        return unpack(raw) if raw is not None else []

    @translate_redis
    async def cancel(self, batch_id: str) -> list[str]:
        """Nothing of it becomes a job any more; the ids of its jobs that are still to be canceled."""
        return [job_id.decode() for job_id in await self._cancel(args=["", batch_id, self._ttl_s])]

    # -- handing out -------------------------------------------------------------------------------------------

    @translate_redis
    async def unfinished(self) -> list[str]:
        """Ids of all batches that have not ended, oldest first."""
        return [batch_id.decode() for batch_id in await self._redis.zrange("fluxgate:batches", 0, -1)]

    @translate_redis
    async def next_place(self, batch_id: str) -> tuple[int, int, int, bool]:
        """(index of the next item, number of items, unfinished jobs, canceled)"""
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.hmget(f"fluxgate:batch:{batch_id}", "fed", "total", "canceled")
            pipeline.scard(f"fluxgate:batch:{batch_id}:live")
            (fed, total, canceled), live = await pipeline.execute()
        return int(fed or 0), int(total or 0), int(live), canceled is not None

    @translate_redis
    async def webhook(self, batch_id: str) -> str | None:
        """What only the teller of the jobs' ends may read."""
        raw = await self._redis.hget(f"fluxgate:batch:{batch_id}", "webhook")
        return raw.decode() if raw else None

    @translate_redis
    async def live(self, batch_id: str) -> list[str]:
        return [job_id.decode() for job_id in await self._redis.smembers(f"fluxgate:batch:{batch_id}:live")]

    @translate_redis
    async def tend(self, batch_id: str, who: str, for_ms: int) -> bool:
        """Whether `who` shall hand out this batch's items for a while."""
        key = f"fluxgate:batch_feeder:{batch_id}"
        if await self._redis.set(key, who, nx=True, px=for_ms):
            return True
        if await self._redis.get(key) != who.encode():
            return False
        await self._redis.pexpire(key, for_ms)
        return True

    # -- chores ------------------------------------------------------------------------------------------------

    @translate_redis
    async def delete(self, batch_id: str) -> bool:
        """Take it from its caller and have it cleared away; False while it has not ended."""
        return bool(await self._delete(args=["", batch_id]))

    @translate_redis
    async def want_archive(self, batch_id: str) -> None:
        """Have its pictures zipped by whoever looks for chores next."""
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.hset(f"fluxgate:batch:{batch_id}", "archive", Archive().model_dump_json())
            pipeline.zadd("fluxgate:batch_chores", {batch_id: 0})
            await pipeline.execute()

    @translate_redis
    async def write_archive(self, batch_id: str, archive: Archive) -> None:
        """How far it is. A batch that is gone meanwhile stays gone."""
        if await self._redis.exists(f"fluxgate:batch:{batch_id}"):
            await self._redis.hset(f"fluxgate:batch:{batch_id}", "archive", archive.model_dump_json())

    @translate_redis
    async def claim_chore(self, lease_s: float) -> str | None:
        answer = await self._claim_chore(args=["", int(lease_s * 1000)])
        return answer.decode() or None

    @translate_redis
    async def keep_chore(self, batch_id: str, until_ms: int) -> None:
        await self._redis.zadd("fluxgate:batch_chores", {batch_id: until_ms}, xx=True)

    @translate_redis
    async def end_chore(self, batch_id: str) -> None:
        await self._redis.zrem("fluxgate:batch_chores", batch_id)

    @translate_redis
    async def forget(self, batch_id: str) -> None:
        key = f"fluxgate:batch:{batch_id}"
        await self._redis.delete(key, f"{key}:items", f"{key}:states", f"{key}:live")


def _decode(record: list[bytes], states: bytes, live: list[bytes]) -> Batch:
    fields = pair_up(record)
    return Batch(
        spec=BatchSpec.model_validate_json(fields[b"spec"]),
        fed=int(fields[b"fed"]),
        states=states.decode(),
        live={job_id.decode(): JobStatus(status.decode()) for job_id, status in pair_up(live).items()},
        canceled=b"canceled" in fields,
        deleted=b"deleted" in fields,
        ended_ms=int(fields[b"ended_ms"]) if b"ended_ms" in fields else None,
        webhook=fields[b"webhook"].decode() if b"webhook" in fields else None,
        archive=Archive.model_validate_json(fields[b"archive"]) if b"archive" in fields else None,
    )
