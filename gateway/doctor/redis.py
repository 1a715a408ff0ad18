"""Redis: reachable, of a version that has what is used, keeping what it is told, evicting nothing, near."""

from __future__ import annotations

import statistics
import time
from typing import Any

from gateway.doctor.finding import Finding, fault, skip, warn, well
from gateway.errors import RedisUnavailable
from gateway.redis_client import RedisClient, read_memory, translate_redis
from gateway.state_version import STATE_VERSION, StateRefused, read_version, require_known

PINGS = 20
SLOW_MS = 5.0
LEAST_VERSION = (6, 2)
MB = 1_000_000
# A full one refuses jobs; one that fills its machine is killed. Rewriting the append-only file takes room beside what is used.
FULL_SHARE, DOUBTFUL_SHARE = 0.9, 0.6
_MEMORY = "Give Redis more memory, or keep finished jobs for less than JOB_TTL_S: docs/scaling.md tells what a job takes."


async def examine_redis(redis: RedisClient) -> list[Finding]:
    try:
        info, latency_ms = await _ask(redis)
    except RedisUnavailable as error:
        return [fault("redis.reach", error.message, "Start Redis, or set REDIS_URL to where it listens, with its password.")]
    findings = [well("redis.reach", "answers"), _judge_version(str(info.get("valkey_version") or info.get("redis_version") or "0"))]
    findings += [
        _judge_persistence(info),
        _judge_eviction(info),
        _judge_memory(info),
        _judge_latency(latency_ms),
        await _judge_state(redis),
    ]
    return findings


@translate_redis
async def _ask(redis: RedisClient) -> tuple[dict[str, Any], float]:
    info, took_ms = await redis.info(), list[float]()
    for _ in range(PINGS):
        began = time.perf_counter()
        await redis.ping()
        took_ms.append((time.perf_counter() - began) * 1000)
    return info, statistics.median(took_ms)


def _judge_version(text: str) -> Finding:
    parts = tuple(int(part) for part in text.split(".")[:2] if part.isdigit())
    if parts < LEAST_VERSION:
        return fault("redis.version", f"is {text}", "Upgrade to Redis 6.2 or newer, or any Valkey.")
    return well("redis.version", f"is {text}")


def _judge_persistence(info: dict[str, Any]) -> Finding:
    if not int(info.get("aof_enabled", 0)):
        remedy = "Start it with --appendonly yes --appendfsync everysec, and a volume for its folder."
        return fault("redis.persistence", "keeps no append-only file: a restart loses accepted jobs, LoRAs and keys", remedy)
    if info.get("aof_last_write_status", "ok") != "ok":
        return fault("redis.persistence", "could not write its append-only file", "Free space on Redis's disk.")
    return well("redis.persistence", "the append-only file is on")


def _judge_memory(info: dict[str, Any]) -> Finding:
    used, limit = read_memory(info)
    if not limit:
        return skip("redis.memory", "does not say how much memory there is")
    said = f"uses {used / MB:.0f} MB of {limit / MB:.0f} MB"
    if used > FULL_SHARE * limit:
        return fault("redis.memory", said, _MEMORY)
    return warn("redis.memory", said, _MEMORY) if used > DOUBTFUL_SHARE * limit else well("redis.memory", said)


def _judge_eviction(info: dict[str, Any]) -> Finding:
    policy, limit = str(info.get("maxmemory_policy", "noeviction")), int(info.get("maxmemory", 0))
    remedy = "Set maxmemory-policy noeviction: what Redis evicts here are jobs and keys."
    if policy == "noeviction":
        return well("redis.eviction", "evicts nothing")
    if limit:
        return fault("redis.eviction", f"evicts keys by {policy} above {limit} bytes", remedy)
    return warn("redis.eviction", f"would evict keys by {policy}, once maxmemory is set", remedy)


def _judge_latency(latency_ms: float) -> Finding:
    said = f"a ping takes {latency_ms:.1f} ms"
    if latency_ms > SLOW_MS:
        return warn("redis.latency", said, "Move Redis nearer to the gateway: a job costs some ten round trips.")
    return well("redis.latency", said)


async def _judge_state(redis: RedisClient) -> Finding:
    try:
        found = await read_version(redis)
        require_known(found, "Redis")
    except StateRefused as error:
        return fault("redis.state", error.message, error.hint)
    except RedisUnavailable as error:
        return fault("redis.state", error.message, "Check that the user of REDIS_URL may read keys.")
    if found < STATE_VERSION:
        return skip("redis.state", f"has version {found}; the first process that starts brings it to {STATE_VERSION}")
    return well("redis.state", f"has version {found}")
