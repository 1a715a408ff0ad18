"""Whose turn it is on a GPU that trainings and instances share. A lease in Redis; it knows neither trainer nor ComfyUI."""

from __future__ import annotations

from gateway.redis_client import RedisClient, translate_redis

# KEYS: holder, drained. ARGV: holder.
_LET_GO = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1], KEYS[2]) end return 0"


class GpuLease:
    """One named GPU. A training takes it, the dispatchers empty their instances and say so, and take it back when it is let go."""

    def __init__(self, redis: RedisClient, name: str) -> None:
        self._redis, self.name = redis, name
        self._holder_key, self._drained_key = f"fluxgate:gpu:{name}", f"fluxgate:gpu:{name}:drained"
        self._let_go = redis.register_script(_LET_GO)

    @translate_redis
    async def take(self, holder: str, lease_s: float) -> bool:
        """Take it if it is free, keep it if it is ours already."""
        if await self._redis.set(self._holder_key, holder, nx=True, px=int(lease_s * 1000)):
            await self._redis.delete(self._drained_key)
            return True
        if await self._redis.get(self._holder_key) != holder.encode():
            return False
        return bool(await self._redis.pexpire(self._holder_key, int(lease_s * 1000)))

    @translate_redis
    async def let_go(self, holder: str) -> None:
        """Give it back, if it is still ours."""
        await self._let_go(keys=[self._holder_key, self._drained_key], args=[holder])

    @translate_redis
    async def holder(self) -> str | None:
        """Id of the training that has it."""
        raw = await self._redis.get(self._holder_key)
        return raw.decode() if raw is not None else None

    @translate_redis
    async def say_drained(self, holder: str, instance: str) -> None:
        """A dispatcher: this instance runs nothing and has let go of its models, for this holder."""
        await self._redis.hset(self._drained_key, instance, holder)

    @translate_redis
    async def drained(self, holder: str) -> set[str]:
        """Instances that are out of the way of this holder."""
        entries = await self._redis.hgetall(self._drained_key)
        return {name.decode() for name, value in entries.items() if value == holder.encode()}
