"""What does one finished job hold in Redis? The built-in engine makes a picture of 20 steps, and its keys are written 10,000 times more.
Redis's `used_memory` before and after, without the live feed, which holds a bounded number of events however many jobs there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from bench.caller import open_caller
from bench.deployment import open_gateway, open_servers
from bench.measure import format_table
from gateway.jobs.events import FEED
from gateway.redis_client import RedisClient, connect_redis

JOBS = 10_000
AT_ONCE = 100
TTL_S = 3600
PROMPT = "a red circle on a blue background, in the style of an old photograph, soft light, grain, 35 mm"
BODY = {"workflow": "flux", "base_model": "tinyflux", "prompt": PROMPT, "width": 256, "height": 256, "steps": 20, "seed": 7}
# The keys of one job beside the indexes that name it; gateway/jobs/store.py lists all.
PARTS = ("job", "graph", "events")


async def _used(redis: RedisClient) -> int:
    """Bytes, without the feed's."""
    memory: dict[str, Any] = await redis.info("memory")
    return int(memory["used_memory"]) - int(await redis.memory_usage(FEED, samples=0) or 0)


class Written(NamedTuple):
    """What one job wrote. It is written again, not copied: what grows entry by entry holds room to grow."""

    fields: dict[bytes, bytes]
    graph: bytes
    events: list[tuple[bytes, dict[bytes, bytes]]]
    indexes: list[bytes]


async def _read(redis: RedisClient, job_id: str) -> Written:
    fields, graph = await redis.hgetall(f"fluxgate:job:{job_id}"), await redis.get(f"fluxgate:graph:{job_id}")
    indexes = [key async for key in redis.scan_iter("fluxgate:jobs*")]
    return Written(fields, graph, await redis.xrange(f"fluxgate:events:{job_id}"), indexes)


async def _write(redis: RedisClient, written: Written, job_ids: list[str]) -> None:
    async with redis.pipeline(transaction=False) as pipeline:
        for job_id in job_ids:
            for name, value in written.fields.items():
                pipeline.hset(f"fluxgate:job:{job_id}", name, value)
            pipeline.set(f"fluxgate:graph:{job_id}", written.graph)
            for event_id, entry in written.events:
                pipeline.xadd(f"fluxgate:events:{job_id}", entry, event_id)
            for part in PARTS:
                pipeline.expire(f"fluxgate:{part}:{job_id}", TTL_S)
            for index in written.indexes:
                pipeline.zadd(index, {job_id: int(written.fields[b"finished_ms"])})
        await pipeline.execute()


async def measure(redis: RedisClient, job_id: str, jobs: int) -> dict[str, float]:
    """Bytes a job, and those of each of its keys."""
    parts = {part: float(await redis.memory_usage(f"fluxgate:{part}:{job_id}", samples=0) or 0) for part in PARTS}
    written, before = await _read(redis, job_id), await _used(redis)
    for first in range(0, jobs, AT_ONCE):
        await _write(redis, written, [f"{job_id[:-8]}{number:08d}" for number in range(first, min(first + AT_ONCE, jobs))])
    return {"a job": (await _used(redis) - before) / jobs, **parts}


async def run(state_dir: Path, share: float) -> None:
    """Print the table. `share` scales the jobs (1 is 10,000)."""
    jobs = max(100, round(JOBS * share))
    async with open_servers(state_dir) as servers:
        async with open_gateway(servers) as gateway, open_caller(gateway.url) as caller:
            await caller.wait_for_instances(1)
            job = await caller.make_streaming(BODY)
        redis = connect_redis(servers.redis.url)
        try:
            measured = await measure(redis, job["id"], jobs)
        finally:
            await redis.aclose(close_connection_pool=True)
    print(format_table(("bytes in Redis", *measured), [["", *(f"{size:.0f}" for size in measured.values())]]))
    print(
        f"  {jobs} finished jobs of {BODY['steps']} steps; what is not a key of its own are the indexes and Redis's table of keys",
        flush=True,
    )
