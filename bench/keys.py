"""What keys, rate limits and idempotency cost: the cheapest picture through two gateways that differ by them alone, in turns.

Both stand on one Redis, in databases of their own, and on one engine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from bench.caller import Caller, open_caller
from bench.deployment import open_gateway, open_servers
from bench.measure import format_table, summarize
from bench.overhead import Way, measure
from gateway.callers.keys import CallerLimits, KeyStore, mint_key
from gateway.jobs.model import now_ms
from gateway.redis_client import connect_redis

SIDE = 64
# So high that nothing is refused: each request is counted all the same.
LIMITS = CallerLimits(requests_per_minute=1_000_000, jobs_in_flight=1_000_000, gpu_seconds_per_day=10_000_000)


async def _make_key(redis_url: str) -> str:
    redis = connect_redis(redis_url)
    key, text = mint_key("bench", ("generate",), expires_ms=now_ms() + 3_600_000)
    await KeyStore(redis).add(key, LIMITS)
    await redis.aclose(close_connection_pool=True)
    return text


def _way(name: str, caller: Caller, pids: dict[str, int]) -> Way:
    async def make(side: int, color: int, *, follows: bool) -> Any:
        body = {"workflow": "trivial", "width": side, "height": side, "seed": color}
        return await (caller.make_streaming(body) if follows else caller.make_waiting(body))

    return Way(name, partial(make, follows="stream" in name), caller.fetch_picture, pids)


@asynccontextmanager
async def open_ways(state_dir: Path) -> AsyncIterator[list[Way]]:
    async with open_servers(state_dir) as servers:
        keyed_url = servers.redis.url.rpartition("/")[0] + "/1"
        key = await _make_key(keyed_url)
        async with open_gateway(servers) as plain, open_gateway(servers, {"REDIS_URL": keyed_url}) as keyed:
            async with open_caller(plain.url) as anybody, open_caller(keyed.url, key) as caller:
                without, having = ({**servers.pids(), "gateway": gateway.pid} for gateway in (plain, keyed))
                yield [
                    way
                    for kind in ("Prefer: wait", "event stream")
                    for way in (_way(f"{kind}, without", anybody, without), _way(f"{kind}, with keys", caller, having))
                ]


def report(ways: list[Way]) -> str:
    rows = []
    for without, having in zip(ways[::2], ways[1::2], strict=True):
        base = summarize(without.seconds)
        for way in (without, having):
            summary = summarize(way.seconds)
            cpu_ms = sum(way.cpu_s.values()) / way.parallel_jobs * 1000
            gateway_ms = way.cpu_s.get("gateway", 0.0) / way.parallel_jobs * 1000
            times = [f"{value * 1000:.2f}" for value in (summary.p50, summary.p95, summary.p50 - base.p50)]
            rows.append((way.name, *times, f"{way.rate:.1f}", f"{cpu_ms:.2f}", f"{gateway_ms:.2f}"))
    return format_table(("64 px", "p50 ms", "p95 ms", "more at p50 ms", "jobs/s at 32", "CPU ms/job", "of it gateway"), rows)


async def run(state_dir: Path, share: float) -> None:
    """Print the table. `share` scales the number of jobs (1 is 800 one by one and 600 in parallel, each way)."""
    blocks = 8
    async with open_ways(state_dir) as ways:
        await measure(ways, SIDE, blocks=blocks, one_by_one=int(800 * share), parallel=max(blocks * 32, int(600 * share)))
        print(report(ways), end="\n\n", flush=True)
