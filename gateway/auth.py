"""Who is calling, and how often it may. With no keys set, on loopback, everybody is the one local caller."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import time
from collections import Counter
from dataclasses import dataclass

from limits import RateLimitItemPerMinute
from limits.aio.storage import RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter

from gateway.callers.hub_tokens import TOKEN_START, HubTokens
from gateway.callers.keys import SCOPES, CallerLimits, Key, KeyStore, Ring, hash_secret, split_key
from gateway.callers.usage import Usage
from gateway.errors import FluxgateError, RedisUnavailable, TooManyRequests, Unauthorized
from gateway.jobs.model import now_ms
from gateway.jobs.records import DAY_MS
from gateway.redis_client import RedisClient, translate_redis
from gateway.settings import Settings

log = logging.getLogger(__name__)

REFRESH_S = 1.0
_NOBODY = Key(id="", prefix="", secret_sha256=hash_secret(""), name="", caller="", scopes=(), created_ms=0)


@dataclass(frozen=True, slots=True)
class Caller:
    """Owner of jobs, LoRAs and uploads. `scopes` says what it may do; `admin` includes the others."""

    id: str
    scopes: frozenset[str]
    requests_per_minute: int | None = None
    key: str | None = None  # prefix of the key it came with

    def may(self, scope: str) -> bool:
        return scope in self.scopes or "admin" in self.scopes


# Of whoever comes with a Hugging Face token.
HUB_SCOPES = frozenset({"generate", "train"})
LOCAL = Caller("local", frozenset(SCOPES))


def _refuse() -> Unauthorized:
    """The same for whatever is wrong."""
    return Unauthorized("That is no API key of this deployment, or one that was revoked or has expired.")


class UnsafeBinding(FluxgateError):
    code = "unsafe_binding"


def refuse_unsafe_binding(settings: Settings, *, has_keys: bool = False) -> None:
    """A gateway without keys that others can reach would run anybody's graphs: raise UnsafeBinding before it listens."""
    if not (settings.is_loopback or has_keys or settings.admin_key or settings.auth != "auto"):
        raise UnsafeBinding(
            f"HOST={settings.host} can be reached from outside and no API keys are set.",
            hint="Make a key with `python -m gateway keys create`, set ADMIN_KEY, AUTH=keys or AUTH=hf, or listen on HOST=127.0.0.1.",
            details={"parameter": "HOST", "value": settings.host, "allowed": "127.0.0.1, ::1, localhost"},
        )


class Rates:
    """Requests per minute over a moving window, counted in Redis for all processes."""

    def __init__(self, redis: RedisClient) -> None:
        # The library wants an address even where it gets a pool, and ignores it then.
        pool = redis.connection_pool
        storage = RedisStorage("async+redis://", implementation="redispy", key_prefix="fluxgate:rate", connection_pool=pool)
        self._window = MovingWindowRateLimiter(storage)

    @translate_redis
    async def take(self, caller: str, per_minute: int) -> float | None:
        """Count a request; seconds until the next may come when it is one too many."""
        item = RateLimitItemPerMinute(per_minute)
        if await self._window.hit(item, caller):
            return None
        return max(0.0, (await self._window.get_window_stats(item, caller)).reset_time - time.time())


class Doorkeeper:
    """Knows all keys, as they were at most a second ago. Raises Unauthorized, TooManyRequests, RedisUnavailable, HubUnavailable."""

    def __init__(self, settings: Settings, keys: KeyStore, rates: Rates, usage: Usage, tokens: HubTokens | None = None) -> None:
        """`tokens`: where Hugging Face's are taken as well."""
        self._settings, self._keys, self._rates, self._usage, self._tokens = settings, keys, rates, usage, tokens
        self._ring = Ring(0, {}, {})
        self._admin_sha256 = hash_secret(settings.admin_key.get_secret_value()) if settings.admin_key else None
        self._counted, self._used = Counter[tuple[str, int, str]](), dict[str, int]()

    @property
    def is_open(self) -> bool:
        """Whether everybody is the local caller: only on loopback, before the first key exists."""
        return self._settings.auth == "auto" and self._settings.is_loopback and not self._ring.keys and self._admin_sha256 is None

    async def refresh(self) -> None:
        """Read the keys again if any changed."""
        if await self._keys.version() != self._ring.version:
            self._ring = await self._keys.load()

    async def run(self) -> None:
        """For ever: learn of changes, and write down what was counted."""
        while True:
            await asyncio.sleep(REFRESH_S)
            try:
                await self.refresh()
                await self.write_counts()
            except RedisUnavailable as error:
                log.warning("keys not read", extra={"error": error.message})

    async def write_counts(self) -> None:
        """Requests and times of use since the last call. What cannot be written now is written later."""
        counted, self._counted = self._counted, Counter()
        used, self._used = self._used, {}
        try:
            if counted:
                await self._usage.add(counted)
            if used:
                await self._keys.note_used(used)
        except RedisUnavailable:
            self._counted.update(counted)
            raise

    async def admit(self, authorization: str | None) -> Caller:
        """The caller of a request, which counts against its requests per minute."""
        caller = LOCAL if self.is_open else await self.identify(authorization)
        limit = caller.requests_per_minute
        wait_s = await self._rates.take(caller.id, limit) if limit else None
        self._counted[caller.id, now_ms() // DAY_MS, "requests" if wait_s is None else "refused"] += 1
        if wait_s is not None:
            reset_s = math.ceil(wait_s)
            raise TooManyRequests(
                f"You may make {limit} requests a minute.",
                code="rate_limited",
                retry_after_s=max(1, reset_s),
                details={"limit": "requests_per_minute", "value": limit, "allowed": limit, "reset_s": reset_s},
            )
        return caller

    async def identify(self, authorization: str | None) -> Caller:
        """The caller that `Authorization: Bearer ...` proves. Raises Unauthorized."""
        scheme, _, token = (authorization or "").partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise Unauthorized("This needs an API key.", hint="Send Authorization: Bearer KEY.")
        if self._is_admin_key(token):
            return Caller("admin", frozenset(SCOPES))
        if self._tokens is not None and token.startswith(TOKEN_START):
            return await self._identify_by_hub(self._tokens, token)
        key = self._match(token)
        if key is None:
            # It may have been made a moment ago.
            await self.refresh()
            key = self._match(token)
        if key is None:
            raise _refuse()
        now = now_ms()
        self._used[key.prefix] = now
        limits = self._ring.limits.get(key.caller, CallerLimits())
        per_minute = limits.requests_per_minute or self._settings.requests_per_minute or None
        return Caller(key.caller, frozenset(key.scopes), per_minute, key.prefix)

    async def _identify_by_hub(self, tokens: HubTokens, token: str) -> Caller:
        """A user of Hugging Face's; never an admin. The name has a colon, which no key's caller has."""
        user = await tokens.identify(token)
        if user is None:
            raise _refuse()
        return Caller(f"hf:{user}", HUB_SCOPES, self._settings.requests_per_minute or None)

    def is_good(self, prefix: str) -> bool:
        """Whether the key with this prefix still opens anything."""
        key = self._ring.keys.get(prefix)
        return key is not None and key.is_good(now_ms())

    def _is_admin_key(self, token: str) -> bool:
        return self._admin_sha256 is not None and hmac.compare_digest(hash_secret(token), self._admin_sha256)

    def _match(self, token: str) -> Key | None:
        """The good key with this text. An unknown prefix is compared as well, so that time tells nobody which there are."""
        prefix, secret = split_key(token) or ("", "")
        key = self._ring.keys.get(prefix, _NOBODY)
        is_right = hmac.compare_digest(hash_secret(secret), key.secret_sha256)
        return key if is_right and key is not _NOBODY and key.is_good(now_ms()) else None
