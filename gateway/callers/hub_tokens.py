"""Hugging Face tokens as callers' keys: whose a token is, asked of the hub once in a while. Of a token only its hash is kept.

Keys: `fluxgate:hf_token:{sha256}`: whose it is, empty for nobody's, and until when that needs no asking.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from gateway.errors import HubUnavailable
from gateway.jobs.model import now_ms
from gateway.redis_client import RedisClient, translate_redis

TOKEN_START = "hf_"
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,200}")
_USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,95}")
# Of the roles that a token may have, and of the permissions of one that has them one by one.
_READING_ROLES, _READING_PERMISSIONS = ("read", "write"), ("repo.content.read", "repo.write")
TIMEOUT_S = 8.0
# A good token is asked about again after a quarter of an hour, and serves for a day while the hub does not answer.
FRESH_S, KEPT_S = 900, 24 * 3600
REFUSED_S = 60
# In this process, without asking Redis either.
NEAR_S, NEAR = 30.0, 10_000
# The hub answers few such questions: guesses shall not use them up.
AT_ONCE, PER_MINUTE = 4, 60

Take = Callable[[str, int], Awaitable[float | None]]


class _Kept(NamedTuple):
    """What is known of a token: `user` is empty when it opens nothing."""

    user: str
    fresh_until_ms: int


def read_user(facts: Mapping[str, Any], allowed: Collection[str]) -> str:
    """The user whose token may read, from what the hub says of it; empty when it may not, or the user is not allowed in."""
    token = (facts.get("auth") or {}).get("accessToken") or {}
    name = facts.get("name")
    if facts.get("type") != "user" or not isinstance(name, str) or not _USER.fullmatch(name) or not _may_read(token):
        return ""
    names = {name.lower()} | {str(org.get("name")).lower() for org in facts.get("orgs") or ()}
    return name if not allowed or not names.isdisjoint(each.lower() for each in allowed) else ""


def _may_read(token: Mapping[str, Any]) -> bool:
    if token.get("role") != "fineGrained":
        return token.get("role") in _READING_ROLES
    fine = token.get("fineGrained") or {}
    granted = {*(fine.get("global") or ()), *(one for scope in fine.get("scoped") or () for one in scope.get("permissions") or ())}
    return not granted.isdisjoint(_READING_PERMISSIONS)


class HubTokens:
    """Raises HubUnavailable, RedisUnavailable."""

    def __init__(self, redis: RedisClient, endpoint: str, allowed: Collection[str], take: Take) -> None:
        """`allowed`: users and organisations, empty for all. `take` counts questions in all processes: seconds to wait, None for none."""
        self._redis, self._endpoint, self._allowed, self._take = redis, endpoint.rstrip("/"), allowed, take
        self._near = OrderedDict[str, tuple[float, str]]()
        self._locks = WeakValueDictionary[str, asyncio.Lock]()
        self._asking = asyncio.Semaphore(AT_ONCE)

    async def identify(self, token: str) -> str | None:
        """The user whose token it is; None for one that opens nothing, whatever the reason."""
        if not _TOKEN.fullmatch(token):
            return None
        digest = hashlib.sha256(token.encode()).hexdigest()
        until, user = self._near.get(digest, (0.0, ""))
        if time.monotonic() >= until:
            async with self._locks.setdefault(digest, asyncio.Lock()):
                user = await self._find(digest, token)
            self._near[digest] = time.monotonic() + NEAR_S, user
            if len(self._near) > NEAR:
                self._near.popitem(last=False)
        return user or None

    async def _find(self, digest: str, token: str) -> str:
        kept = await self._read(digest)
        if kept is not None and now_ms() < kept.fresh_until_ms:
            return kept.user
        try:
            user = await self._ask(token)
        except HubUnavailable:
            if kept is not None and kept.user:
                return kept.user
            raise
        await self._keep(digest, user)
        return user

    @translate_redis
    async def _read(self, digest: str) -> _Kept | None:
        raw = await self._redis.get(f"fluxgate:hf_token:{digest}")
        return _Kept(*json.loads(raw)) if raw is not None else None

    @translate_redis
    async def _keep(self, digest: str, user: str) -> None:
        fresh_s, kept_s = (FRESH_S, KEPT_S) if user else (REFUSED_S, REFUSED_S)
        await self._redis.set(f"fluxgate:hf_token:{digest}", json.dumps([user, now_ms() + fresh_s * 1000]), ex=kept_s)

    async def _ask(self, token: str) -> str:
        # No caller is called so: users have a name behind it.
        wait_s = await self._take("hf:", PER_MINUTE)
        if wait_s is not None:
            message = f"Hugging Face is asked about at most {PER_MINUTE} tokens a minute."
            raise HubUnavailable(message, retry_after_s=max(1, math.ceil(wait_s)))
        try:
            async with asyncio.timeout(TIMEOUT_S), self._asking:
                facts = await asyncio.to_thread(self._whoami, token)
        except TimeoutError as error:
            raise HubUnavailable(f"Hugging Face did not answer within {TIMEOUT_S:g} s.", retry_after_s=10) from error
        return read_user(facts, self._allowed) if facts is not None else ""

    def _whoami(self, token: str) -> Mapping[str, Any] | None:
        """None for a token that the hub does not know."""
        try:
            facts: Mapping[str, Any] = HfApi(endpoint=self._endpoint).whoami(token=token)
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403):
                return None
            raise HubUnavailable(f"Hugging Face answered {status} when it was asked about a token.", retry_after_s=10) from error
        except Exception as error:  # boundary: which library carries its requests changes with its versions
            raise HubUnavailable("Hugging Face is out of reach.", retry_after_s=10) from error
        return facts
