"""Answers to POSTs that make no job, kept by the Idempotency-Key they were asked for with.

`idempotency:{caller}:{key}`, which jobs use as well, so that a key is one whatever it is sent to. While a request is at work its record
holds a `lease` and lives no longer than that: when its process dies the next request with the key is the first.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from gateway.errors import Conflict, RedisUnavailable
from gateway.jobs.records import IDEMPOTENCY_TTL_S, IdempotencyKey
from gateway.redis_client import RedisClient, translate_redis

log = logging.getLogger(__name__)

LEASE_MS = 10_000
RENEW_S = 3.0
# How long a twin waits for the first, and how often it looks.
WAIT_S, LOOK_S = 60.0, 0.1

# ARGV: record, lease, further ones. Only the holder of the lease changes anything.
_HELD = "if redis.call('HGET', ARGV[1], 'lease') ~= ARGV[2] then return 0 end\n"
# ARGV: record, lease, body hash, lease in ms  ->  {'ours'} · {'busy', body hash} · {'done', body hash, status, headers, body, is whole}
_CLAIM = """
local known = redis.call('HMGET', ARGV[1], 'hash', 'status', 'headers', 'body', 'whole', 'lease')
if not known[1] then
  redis.call('HSET', ARGV[1], 'hash', ARGV[3], 'lease', ARGV[2])
  redis.call('PEXPIRE', ARGV[1], ARGV[4])
  return {'ours'}
end
if known[6] == ARGV[2] then return {'ours'} end
if known[2] then return {'done', known[1], known[2], known[3], known[4], known[5]} end
return {'busy', known[1]}
"""
# ARGV: lease in ms
_RENEW = f"{_HELD} return redis.call('PEXPIRE', ARGV[1], ARGV[3])"
# ARGV: status, headers, body, is whole, ttl_s
_RECORD = f"""{_HELD}
redis.call('HSET', ARGV[1], 'status', ARGV[3], 'headers', ARGV[4], 'body', ARGV[5], 'whole', ARGV[6])
redis.call('HDEL', ARGV[1], 'lease')
return redis.call('EXPIRE', ARGV[1], ARGV[7])
"""
_RELEASE = f"{_HELD} return redis.call('DEL', ARGV[1])"


class Answer(NamedTuple):
    """What was answered; not `is_whole` when secrets were left out of the body."""

    status: int
    headers: dict[str, str]
    body: bytes
    is_whole: bool = True


class Claim:
    """The right to answer a request; `answer`, once set, is what its twins get."""

    def __init__(self) -> None:
        self.answer: Answer | None = None


class AnswerStore:
    """Raises RedisUnavailable, Unprocessable for a key that came with another body, and Conflict when a twin takes too long."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis
        self._claim, self._renew = redis.register_script(_CLAIM), redis.register_script(_RENEW)
        self._record, self._release = redis.register_script(_RECORD), redis.register_script(_RELEASE)

    @asynccontextmanager
    async def claim(self, key: IdempotencyKey) -> AsyncIterator[Claim | Answer]:
        """The answer there is, or the right to give it. Without one at the end of the block the key is free again."""
        lease, claim = secrets.token_hex(8), Claim()
        if (known := await self._wait(key, lease)) is not None:
            yield known
            return
        renewing = asyncio.create_task(self._keep_renewing(key, lease))
        try:
            yield claim
        finally:
            renewing.cancel()
            try:
                await self._settle(key, lease, claim.answer)
            except RedisUnavailable as error:
                # What was done is done, and its caller is told; the lease runs out.
                log.warning("answer not kept", extra={"error": error.message})

    async def _wait(self, key: IdempotencyKey, lease: str) -> Answer | None:
        """The first's answer, when it has one; None when the first is us."""
        deadline = asyncio.get_running_loop().time() + WAIT_S
        while True:
            outcome, *known = await self._look(key, lease)
            if outcome == b"ours":
                return None
            key.require_same_body(known[0].decode())
            if outcome == b"done":
                return Answer(int(known[1]), json.loads(known[2]), zlib.decompress(known[3]), known[4] == b"1")
            if asyncio.get_running_loop().time() >= deadline:
                details = {"parameter": "Idempotency-Key", "value": key.key[:100]}
                hint = "Send it again in a while; it is answered like the first."
                raise Conflict(
                    "A request with this Idempotency-Key is still at work.",
                    code="idempotency_key_in_use",
                    hint=hint,
                    details=details,
                    retry_after_s=10,
                )
            await asyncio.sleep(LOOK_S)

    @translate_redis
    async def _look(self, key: IdempotencyKey, lease: str) -> list[bytes]:
        found: list[bytes] = await self._claim(args=[key.record, lease, key.body_hash, LEASE_MS])
        return found

    async def _keep_renewing(self, key: IdempotencyKey, lease: str) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                await self._renew_once(key, lease)
            except RedisUnavailable as error:
                log.warning("key of a request not held", extra={"error": error.message})

    @translate_redis
    async def _renew_once(self, key: IdempotencyKey, lease: str) -> None:
        await self._renew(args=[key.record, lease, LEASE_MS])

    @translate_redis
    async def _settle(self, key: IdempotencyKey, lease: str, answer: Answer | None) -> None:
        if answer is None:
            await self._release(args=[key.record, lease])
            return
        # Reports on data sets have some hundred kilobytes.
        body = zlib.compress(answer.body, 1)
        said = [answer.status, json.dumps(answer.headers), body, int(answer.is_whole), IDEMPOTENCY_TTL_S]
        await self._record(args=[key.record, lease, *said])
