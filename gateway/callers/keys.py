"""API keys in Redis: what is stored of a key, how one is made and read. The secret itself is known to its holder alone.

Keys (all begin with `fluxgate:`):
  keys             hash: prefix -> record; `keys:version` changes with it, so that a process knows when to read again
  keys:used        hash: prefix -> when it was last used, ms
  limits:{caller}  hash: what a caller may do; absent fields leave it to the settings
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from gateway.errors import Conflict, NotFound
from gateway.jobs.model import now_ms
from gateway.redis_client import RedisClient, translate_redis

SCOPES = ("generate", "train", "admin")
_TOKEN = re.compile(r"fg_([0-9a-f]{12})_([A-Za-z0-9_\-]{43})")
# Names that operators may give a caller. No colon: Hugging Face's users are `hf:NAME`, and parts of Redis keys are apart by one.
CALLER_NAME = r"^[a-z0-9][a-z0-9_.\-]{2,63}$"


class CallerLimits(BaseModel):
    """What a caller may do; None leaves it to the settings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: int | None = Field(None, strict=True, ge=1, le=1_000_000, description="Requests in any 60 s.")
    jobs_in_flight: int | None = Field(None, strict=True, ge=1, le=1_000_000, description="Unfinished jobs at one time.")
    gpu_seconds_per_day: int | None = Field(
        None, strict=True, ge=1, le=10_000_000, description="Seconds of GPU time from one midnight UTC to the next."
    )


class Key(BaseModel):
    """A key as it is stored. `prefix` finds it, `secret_sha256` proves it, `caller` owns what is made with it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    prefix: str
    secret_sha256: str
    name: str
    caller: str
    scopes: tuple[str, ...]
    created_ms: int
    expires_ms: int | None = None
    revoked_ms: int | None = None

    def is_good(self, now: int) -> bool:
        return self.revoked_ms is None and (self.expires_ms is None or now < self.expires_ms)


class Ring(NamedTuple):
    """All keys by prefix and the limits by caller, as they were at one version."""

    version: int
    keys: Mapping[str, Key]
    limits: Mapping[str, CallerLimits]


def hash_secret(secret: str) -> str:
    """SHA-256: a secret of 32 random bytes needs no slow hash."""
    return hashlib.sha256(secret.encode()).hexdigest()


def mint_key(name: str, scopes: tuple[str, ...], *, caller: str | None = None, expires_ms: int | None = None) -> tuple[Key, str]:
    """A new key and its text, which is shown once. Without a `caller` the key is a caller of its own."""
    prefix, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    key = Key(
        id=f"key_{prefix}",
        prefix=prefix,
        secret_sha256=hash_secret(secret),
        name=name,
        caller=caller or f"key_{prefix}",
        scopes=scopes,
        created_ms=now_ms(),
        expires_ms=expires_ms,
    )
    return key, f"fg_{prefix}_{secret}"


def split_key(text: str) -> tuple[str, str] | None:
    """(prefix, secret) of a key's text; None when it is none."""
    found = _TOKEN.fullmatch(text)
    return (found[1], found[2]) if found else None


class KeyStore:
    """All reads and writes of keys. Raises RedisUnavailable."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis
        self._replace_script = redis.register_script((files("gateway.jobs") / "lua" / "replace_key.lua").read_text())

    @translate_redis
    async def version(self) -> int:
        """Changes with every change of a key or a limit; 0 before the first."""
        return int(await self._redis.get("fluxgate:keys:version") or 0)

    @translate_redis
    async def load(self) -> Ring:
        """Every key, revoked ones too, and the limits of their callers."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.get("fluxgate:keys:version").hvals("fluxgate:keys")
            version, raw = await pipe.execute()
        keys = {key.prefix: key for key in (Key.model_validate_json(each) for each in raw)}
        callers = sorted({key.caller for key in keys.values()})
        async with self._redis.pipeline(transaction=False) as pipe:
            for caller in callers:
                pipe.hgetall(f"fluxgate:limits:{caller}")
            found = await pipe.execute()
        limits = {caller: _decode_limits(fields) for caller, fields in zip(callers, found, strict=True)}
        return Ring(int(version or 0), keys, limits)

    @translate_redis
    async def add(self, key: Key, limits: CallerLimits) -> None:
        """Store a key. Limits that are given become its caller's, whatever they were; others stay."""
        given = limits.model_dump(exclude_none=True)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset("fluxgate:keys", key.prefix, key.model_dump_json())
            if given:
                pipe.hset(f"fluxgate:limits:{key.caller}", mapping=given)
            pipe.incr("fluxgate:keys:version")
            await pipe.execute()

    @translate_redis
    async def revoke(self, key_id: str) -> Key:
        """Make a key useless for ever. Its record stays: a deployment that had keys does not open again. Raises NotFound."""
        while True:
            raw, key = await self._read(key_id)
            if key.revoked_ms is not None:
                return key
            revoked = key.model_copy(update={"revoked_ms": now_ms()})
            if await self._replace(raw, revoked, {}):
                return revoked

    @translate_redis
    async def change(self, key_id: str, changes: Mapping[str, Any], limits: Mapping[str, int | None]) -> Key:
        """Change what a key says, and its caller's limits; a limit that is None is the settings' again. Raises NotFound, Conflict."""
        while True:
            raw, key = await self._read(key_id)
            if key.revoked_ms is not None:
                raise Conflict(f"{key_id} is revoked.", code="key_revoked", hint="Make another key.")
            changed = key.model_copy(update=dict(changes))
            if await self._replace(raw, changed, limits):
                return changed

    async def _read(self, key_id: str) -> tuple[bytes, Key]:
        raw = await self._redis.hget("fluxgate:keys", key_id.removeprefix("key_"))
        if raw is None or not key_id.startswith("key_"):
            raise NotFound(f"There is no key {key_id!r}.", code="key_not_found", details={"parameter": "id", "value": key_id})
        return raw, Key.model_validate_json(raw)

    async def _replace(self, raw: bytes, key: Key, limits: Mapping[str, int | None]) -> bool:
        """False when another process changed the key since it was read."""
        pairs = [part for name, value in limits.items() for part in (name, "" if value is None else value)]
        names = ("fluxgate:keys", "fluxgate:keys:version", f"fluxgate:limits:{key.caller}")
        return bool(await self._replace_script(keys=names, args=[key.prefix, raw, key.model_dump_json(), *pairs]))

    @translate_redis
    async def note_used(self, used_ms: Mapping[str, int]) -> None:
        """When these prefixes were last used."""
        await self._redis.hset("fluxgate:keys:used", mapping=dict(used_ms))

    @translate_redis
    async def last_used(self) -> dict[str, int]:
        """Prefix -> ms."""
        return {prefix.decode(): int(moment) for prefix, moment in (await self._redis.hgetall("fluxgate:keys:used")).items()}


def _decode_limits(fields: Mapping[bytes, bytes]) -> CallerLimits:
    return CallerLimits(**{name.decode(): int(value) for name, value in fields.items()})
