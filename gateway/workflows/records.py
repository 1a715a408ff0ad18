"""Workflows that admins put in place while everything runs, in Redis. A version, once kept, never changes.

`fluxgate:workflows` names the current version of each, `fluxgate:workflow:{name}` holds all versions and
`fluxgate:workflow_dates:{name}` when each came, and `fluxgate:workflow_changes` counts changes.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from gateway.jobs.model import now_ms
from gateway.redis_client import RedisClient, translate_redis


class WorkflowSource(BaseModel):
    """A workflow's three files: what the editor exported, the bindings as TOML, and a request."""

    model_config = ConfigDict(extra="ignore")

    graph: dict[str, Any]
    bindings: str
    example: dict[str, Any]
    by: str = ""
    created_ms: int = 0


class WorkflowRecords:
    """Raises RedisUnavailable."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis

    @translate_redis
    async def changes(self) -> int:
        """A number that grows with every change."""
        return int(await self._redis.get("fluxgate:workflow_changes") or 0)

    @translate_redis
    async def current(self) -> dict[str, str]:
        """The version of each that is in place."""
        return {name.decode(): version.decode() for name, version in (await self._redis.hgetall("fluxgate:workflows")).items()}

    @translate_redis
    async def source(self, name: str, version: str) -> WorkflowSource | None:
        raw = await self._redis.hget(f"fluxgate:workflow:{name}", version)
        return WorkflowSource.model_validate_json(raw) if raw is not None else None

    @translate_redis
    async def versions(self, name: str) -> list[str]:
        """Every version there was, oldest first."""
        return [version.decode() for version in await self._redis.zrange(f"fluxgate:workflow_dates:{name}", 0, -1)]

    @translate_redis
    async def put(self, name: str, version: str, source: WorkflowSource) -> None:
        dated = source.model_copy(update={"created_ms": now_ms()})
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.hsetnx(f"fluxgate:workflow:{name}", version, dated.model_dump_json())
            pipeline.zadd(f"fluxgate:workflow_dates:{name}", {version: dated.created_ms}, nx=True)
            pipeline.hset("fluxgate:workflows", name, version)
            pipeline.incr("fluxgate:workflow_changes")
            await pipeline.execute()

    @translate_redis
    async def remove(self, name: str) -> None:
        """Take it out of place; its versions stay."""
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.hdel("fluxgate:workflows", name)
            pipeline.incr("fluxgate:workflow_changes")
            await pipeline.execute()
