"""What the trainer workers say of the machines they run on: the last report of each, for as long as it renews it."""

from __future__ import annotations

from gateway.redis_client import RedisClient, translate_redis
from gateway.trainings.presets import Machine

# A worker that does not report for so long has ended: what its machine was like says nothing any more.
REPORT_TTL_S = 60
_KEY = "fluxgate:trainers"


class TrainerMachines:
    """Written by the workers, read by whoever admits a training. Raises RedisUnavailable."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis

    @translate_redis
    async def publish(self, worker: str, machine: Machine) -> None:
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.set(f"{_KEY}:{worker}", machine.model_dump_json(), ex=REPORT_TTL_S)
            pipeline.sadd(_KEY, worker)
            await pipeline.execute()

    @translate_redis
    async def all(self) -> dict[str, Machine]:
        """By worker."""
        workers = sorted(name.decode() for name in await self._redis.smembers(_KEY))
        raws = await self._redis.mget([f"{_KEY}:{worker}" for worker in workers]) if workers else []
        if gone := [worker for worker, raw in zip(workers, raws, strict=True) if raw is None]:
            await self._redis.srem(_KEY, *gone)
        return {worker: Machine.model_validate_json(raw) for worker, raw in zip(workers, raws, strict=True) if raw is not None}
