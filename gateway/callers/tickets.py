"""Tickets: a right to watch one job for some minutes, for browsers' streams, which can send no headers. Signed, and kept nowhere.

`fluxgate:ticket_secret` is the deployment's; every ticket dies with it.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import secrets
from typing import Any, NamedTuple

from gateway.errors import Unauthorized
from gateway.jobs.model import now_ms
from gateway.redis_client import RedisClient, translate_redis

_SECRET = "fluxgate:ticket_secret"


class Ticket(NamedTuple):
    """Who may watch which job until when; `key` is the prefix of the key it was got with, if it was one."""

    job_id: str
    caller: str
    key: str | None
    expires_ms: int


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)


class Tickets:
    """Writes and reads tickets. Raises RedisUnavailable, and Unauthorized for whatever is wrong with one, in the same words."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis

    @translate_redis
    async def _secret(self) -> bytes:
        await self._redis.set(_SECRET, secrets.token_bytes(32), nx=True)
        secret: bytes = await self._redis.get(_SECRET)
        return secret

    async def write(self, ticket: Ticket) -> str:
        payload = json.dumps(ticket, separators=(",", ":")).encode()
        return f"{_encode(payload)}.{_encode(hmac.digest(await self._secret(), payload, 'sha256'))}"

    async def read(self, text: str, job_id: str) -> Ticket:
        """The ticket, if it is ours, for this job, and not over. What it says is believed only once its signature is."""
        try:
            payload, signature = (_decode(part) for part in text.split("."))
            is_ours = hmac.compare_digest(hmac.digest(await self._secret(), payload, "sha256"), signature)
            fields: list[Any] = json.loads(payload) if is_ours else []
            ticket = Ticket(*fields)
        except (ValueError, TypeError, binascii.Error):
            raise _refuse() from None
        if ticket.job_id != job_id or now_ms() >= ticket.expires_ms:
            raise _refuse()
        return ticket


def _refuse() -> Unauthorized:
    return Unauthorized("That is no ticket for this job, or it is over.", code="invalid_ticket", hint="POST .../ticket gives a new one.")
