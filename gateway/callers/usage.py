"""What callers used, by day in UTC: requests here, jobs and GPU time by the scripts that end jobs (`count_usage` in `_prelude.lua`).

`fluxgate:usage:{caller}:{day}`: hash of counts, kept for 40 days; `day` counts from the epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, timedelta
from typing import Any

from gateway.jobs.model import now_ms
from gateway.jobs.records import DAY_MS
from gateway.redis_client import RedisClient, translate_redis

KEPT_S = 40 * 86_400
LONGEST_DAYS = 31
_EPOCH = date(1970, 1, 1)
_OUTCOMES = ("succeeded", "failed", "canceled", "expired")


def _present_day(day: int, counts: Mapping[bytes, bytes]) -> dict[str, Any]:
    def read(name: str) -> int:
        return int(counts.get(name.encode(), 0))

    return {
        "date": (_EPOCH + timedelta(days=day)).isoformat(),
        "requests": read("requests"),
        "refused": read("refused"),
        "jobs": {outcome: read(f"jobs_{outcome}") for outcome in _OUTCOMES},
        "gpu_seconds": read("gpu_ms") / 1000,
    }


class Usage:
    """Counts by caller and day. Raises RedisUnavailable."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis

    @translate_redis
    async def add(self, counts: Mapping[tuple[str, int, str], int]) -> None:
        """Add by (caller, day, what)."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for (caller, day, name), amount in counts.items():
                place = f"fluxgate:usage:{caller}:{day}"
                pipe.hincrby(place, name, amount).expire(place, KEPT_S)
            await pipe.execute()

    @translate_redis
    async def read(self, caller: str, days: int = LONGEST_DAYS) -> list[dict[str, Any]]:
        """The caller's days on which anything happened, the newest first, of the last `days`."""
        today = now_ms() // DAY_MS
        async with self._redis.pipeline(transaction=False) as pipe:
            for day in range(today, today - days, -1):
                pipe.hgetall(f"fluxgate:usage:{caller}:{day}")
            found = await pipe.execute()
        return [_present_day(today - back, counts) for back, counts in enumerate(found) if counts]
