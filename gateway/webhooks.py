"""Tells the end of jobs to whom their makers named: signed after Standard Webhooks, tried again for a day, by whichever process is free.

What is told is what `GET` answers at that moment. What a receiver says is not read, and nothing of either is logged.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated
from urllib.parse import urlsplit

import standardwebhooks
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, WithJsonSchema, field_serializer, field_validator

from gateway.errors import RedisUnavailable, Unprocessable
from gateway.jobs.deliveries import DeliveryStore, Due
from gateway.jobs.model import Delivery, Webhook, now_ms
from gateway.outside.urls import Outside
from gateway.presentation import present_job
from gateway.settings import Settings, require_webhook_secret
from gateway.storage import Storage
from gateway.telemetry import Metrics, job_context

log = logging.getLogger(__name__)

TIMEOUT_S = 15.0
POLL_S, BUSY_POLL_S = 0.5, 0.05
# Between one try and the next: eight tries, the last about 24 h after the first.
PAUSES_S = (5.0, 30.0, 180.0, 900.0, 3600.0, 5 * 3600.0, 17 * 3600.0)
JITTER = 0.1
GONE = 410
# Of one process: tries at a time, and to one host.
MOST_AT_ONCE, MOST_PER_HOST = 128, 4
# A try and writing it down fit in: one that is not written down by then is made again by somebody.
LEASE_S = TIMEOUT_S + 5.0
LONGEST_PUT_OFF_S = 60.0


class WebhookWish(BaseModel):
    """Whom to tell of a job's end, as a request writes it."""

    model_config = ConfigDict(extra="forbid")

    url: str = Field(max_length=4096)
    secret: SecretStr | None = None

    @field_validator("secret")
    @classmethod
    def _need_secret(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is not None:
            require_webhook_secret(secret.get_secret_value())
        return secret

    @field_serializer("secret")
    def _hash(self, secret: SecretStr | None) -> str | None:
        """Two requests with different secrets are different requests; neither shows it."""
        return None if secret is None else hashlib.sha256(secret.get_secret_value().encode()).hexdigest()


_URL_SCHEMA = {"type": "string", "format": "uri", "maxLength": 4096}
_SECRET_SCHEMA = {"type": "string", "description": "whsec_ and 24 to 64 bytes in base64; never shown again"}
_SCHEMA = {
    "anyOf": [
        _URL_SCHEMA,
        {
            "type": "object",
            "properties": {"url": _URL_SCHEMA, "secret": _SECRET_SCHEMA},
            "required": ["url"],
            "additionalProperties": False,
        },
    ]
}
WebhookField = Annotated[
    WebhookWish | None,
    BeforeValidator(lambda value: {"url": value} if isinstance(value, str) else value),
    WithJsonSchema(_SCHEMA),
    Field(description="Told when the job has ended: an https URL, or `{url, secret}`."),
]


@dataclass(slots=True)
class _Host:
    """What one process has going on with one host: tries, how long the last one took, and until when others were put off."""

    running: int = 0
    try_s: float = 0.1
    busy_until: float = 0.0

    def draw_pause_s(self) -> float:
        """Puts one more off: in the pace of the host, so that a backlog for it is not looked at again and again."""
        now = time.monotonic()
        self.busy_until = max(self.busy_until, now) + self.try_s / MOST_PER_HOST
        return min(self.busy_until - now, LONGEST_PUT_OFF_S * random.uniform(0.5, 1))


class Webhooks:
    """Accepts webhooks and makes the deliveries."""

    def __init__(
        self,
        settings: Settings,
        store: DeliveryStore,
        storage: Storage,
        outside: Outside,
        metrics: Metrics,
        *,
        pauses_s: Sequence[float] = PAUSES_S,
    ) -> None:
        self._settings, self._store, self._storage, self._outside, self._metrics = settings, store, storage, outside, metrics
        self._pauses_s = pauses_s
        self._hosts = dict[str, _Host]()

    async def accept(self, wish: WebhookWish | None, base_url: str) -> Webhook | None:
        """The webhook of a job to be. Raises Unprocessable for one that could not be signed or is not gone to."""
        if wish is None:
            return None
        if wish.secret is None and self._settings.webhook_secret is None:
            raise Unprocessable(
                "There is nothing to sign the webhook with.",
                code="webhook_secret_missing",
                hint='Send {"webhook": {"url": ..., "secret": "whsec_..."}}, or set WEBHOOK_SECRET for the deployment.',
                details={"parameter": "webhook.secret", "value": None, "allowed": "whsec_ and 24 to 64 bytes in base64"},
            )
        await self._outside.check(wish.url, parameter="webhook")
        return Webhook(url=wish.url, secret=wish.secret, base_url=base_url)

    async def run(self) -> None:
        """For ever: make the deliveries that are due. A slow receiver holds up nobody's but its own."""
        async with asyncio.TaskGroup() as group:
            while True:
                dues = list[Due]()
                try:
                    if free := MOST_AT_ONCE - sum(host.running for host in self._hosts.values()):
                        dues = await self._store.claim_due(lease_s=LEASE_S, limit=free)
                    for due in dues:
                        await self._start(due, group)
                except RedisUnavailable as error:
                    log.warning("webhooks not looked for", extra={"error": error.message})
                if not dues:
                    await asyncio.sleep(BUSY_POLL_S if self._hosts else POLL_S)

    async def _start(self, due: Due, group: asyncio.TaskGroup) -> None:
        """Begin a try, or put it off for about as long as those before it will take the host."""
        name = urlsplit(due.webhook.url).netloc
        host = self._hosts.setdefault(name, _Host())
        if host.running < MOST_PER_HOST:
            host.running += 1
            group.create_task(self._hold(due, name, host))
        else:
            await self._store.put_off(due.job.id, host.draw_pause_s())

    async def _hold(self, due: Due, name: str, host: _Host) -> None:
        started = time.monotonic()
        try:
            with job_context(due.job.id):
                await self._deliver(due)
        except RedisUnavailable as error:
            # The lease runs out and somebody does it again: at least once is what was promised.
            log.warning("a delivery was not written down", extra={"error": error.message})
        finally:
            host.running -= 1
            host.try_s = time.monotonic() - started
            if not host.running:
                del self._hosts[name]

    async def _deliver(self, due: Due) -> None:
        """One try, written into the job's log."""
        started, at_ms, status = time.perf_counter(), now_ms(), None
        try:
            status = await self._send(due)
            error = None if 200 <= status < 300 else f"it answered with status {status}"
        except Unprocessable as refused:
            error = str(refused.details["reason"])
        except Exception:  # boundary: one record that cannot be told must not end the telling of all others
            log.exception("a webhook could not be made")
            error = "it could not be made; the gateway's log says why"
        elapsed_ms = round((time.perf_counter() - started) * 1000)
        delivery = Delivery(at_ms=at_ms, attempt=due.tries + 1, status=status, ms=elapsed_ms, error=error)
        next_in_s = self._pause_after(delivery)
        await self._store.settle(due.job.id, delivery, next_in_s=next_in_s)
        outcome = "delivered" if error is None else "failed" if next_in_s is not None else "given up"
        self._metrics.webhooks.labels(outcome).inc()
        log.info("webhook", extra={"outcome": outcome, "status": status, "attempt": delivery.attempt, "ms": elapsed_ms, "error": error})

    def _pause_after(self, delivery: Delivery) -> float | None:
        """Seconds until the next try; None after a success, after `410 Gone`, and after the last."""
        if delivery.error is None or delivery.status == GONE or delivery.attempt > len(self._pauses_s):
            return None
        return self._pauses_s[delivery.attempt - 1] * random.uniform(1 - JITTER, 1 + JITTER)

    async def _send(self, due: Due) -> int:
        job, webhook = due.job, due.webhook
        content = present_job(job, base_url=webhook.base_url, storage=self._storage)
        body = json.dumps(content, allow_nan=False, separators=(",", ":"))
        return await self._outside.post(
            webhook.url, parameter="webhook", body=body.encode(), headers=self._sign(job.id, body, webhook.secret), timeout_s=TIMEOUT_S
        )

    def _sign(self, job_id: str, body: str, own_secret: SecretStr | None) -> dict[str, str]:
        """The headers of Standard Webhooks. The id is the same at every try, so that a receiver knows what it has seen."""
        secret = own_secret or self._settings.webhook_secret
        if secret is None:
            raise Unprocessable(
                "WEBHOOK_SECRET is gone.", details={"reason": "WEBHOOK_SECRET, with which it was to be signed, is not set here"}
            )
        message_id, moment = f"msg_{job_id}", datetime.now(UTC)
        return {
            "Content-Type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": str(int(moment.timestamp())),
            "webhook-signature": standardwebhooks.Webhook(secret.get_secret_value()).sign(message_id, moment, body),
        }
