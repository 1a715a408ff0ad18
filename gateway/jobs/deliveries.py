"""Which ended jobs are still to be told to their webhooks, in Redis: due by time, claimed by lease, so that no crash forgets one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from gateway.errors import Conflict, NotFound
from gateway.jobs.model import Delivery, Job, Webhook, now_ms
from gateway.jobs.records import decode_job, pair_up
from gateway.jobs.scripts import load_scripts
from gateway.redis_client import RedisClient, translate_redis

LOG_LENGTH = 50


class Due(NamedTuple):
    """An ended job, whom to tell, and how often that was tried since it ended or was asked for again."""

    job: Job
    webhook: Webhook
    tries: int


class DeliveryStore:
    """The tries of every job's webhook. Raises RedisUnavailable, and nothing else of Redis's."""

    def __init__(self, redis: RedisClient, *, clock: Callable[[], int] | None = None) -> None:
        """`clock` gives milliseconds; without one Redis's own clock decides."""
        self._redis, self._clock = redis, clock
        self._claim, self._settle, self._replay = load_scripts(redis, "claim_webhooks", "settle_webhook", "replay_webhook")

    def _now(self) -> str:
        return "" if self._clock is None else str(self._clock())

    @translate_redis
    async def claim_due(self, *, lease_s: float, limit: int) -> list[Due]:
        """Those whose time has come, earliest first. One that is not settled within the lease is given out again."""
        records = await self._claim(args=[self._now(), int(lease_s * 1000), limit])
        return [_read_due(pair_up(flat)) for flat in records]

    @translate_redis
    async def settle(self, job_id: str, delivery: Delivery, *, next_in_s: float | None) -> None:
        """Write a try into the job's log, and when the next one is; None: there is none."""
        pause = "" if next_in_s is None else int(next_in_s * 1000)
        await self._settle(args=[self._now(), job_id, delivery.model_dump_json(), delivery.attempt, pause, LOG_LENGTH])

    @translate_redis
    async def put_off(self, job_id: str, pause_s: float) -> None:
        """Give it out again after a pause; this was no try."""
        now = self._clock() if self._clock else now_ms()
        await self._redis.zadd("fluxgate:webhooks", {job_id: now + int(pause_s * 1000)}, xx=True)

    @translate_redis
    async def replay(self, job_id: str) -> None:
        """Tell it again, with all its tries. Raises NotFound, and Conflict when there is nothing or nobody to tell."""
        outcome = (await self._replay(args=[self._now(), job_id])).decode()
        if outcome == "":
            raise NotFound(f"There is no job {job_id!r}.", code="job_not_found", details={"parameter": "id", "value": job_id})
        if outcome == "silent":
            raise Conflict(f"{job_id} has no webhook.", code="no_webhook", hint="A job's webhook is named when it is made.")
        if outcome == "living":
            raise Conflict(f"{job_id} has not ended.", code="job_not_ended", hint="Its webhook is told when it has.")

    @translate_redis
    async def webhook_of(self, job: Job) -> Webhook | None:
        """Whom the job tells, with what the record itself does not show."""
        private = await self._redis.hget(f"fluxgate:job:{job.id}", "webhook")
        return _read_webhook(job, private) if private is not None else None


def _read_due(fields: dict[bytes, bytes]) -> Due:
    job = decode_job(fields)
    return Due(job, _read_webhook(job, fields[b"webhook"]), int(fields.get(b"webhook_tries", 0)))


def _read_webhook(job: Job, private: bytes) -> Webhook:
    return (job.spec.webhook or Webhook(url="")).with_private(private.decode())
