"""Assets in Redis: who owns which uploaded bytes, under which key they lie in S3, and until when. It moves no bytes.

One caller's equal bytes lie in S3 once, whatever names he gave them; two callers' never share anything.

Keys (all begin with `fluxgate:`):
  asset:{id}        hash: record (JSON), key (in S3), expires_ms
  assets:{caller}   its listed assets by time of making
  assets            every asset by expires_ms
  blobs:{caller}    hash: `sha256:...` and `blake3:...` -> key, of bytes that were verified
  blob:{key}        set: the assets that stand on this object; when the last one goes, so does the object
  made:{caller}:{}  what was made of an asset: an unlisted one
  garbage           objects to delete by when that is due; noted before they are written, so that a crash leaves none behind
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from gateway.jobs.model import now_ms
from gateway.redis_client import RedisClient, read_index, translate_redis

# `own`: the object at `key` has been written, or is promised; of bytes the caller has already it becomes garbage, and theirs is used.
# `share`: stand on the caller's equal bytes, or do nothing. `replace`: as `own`, for a record that must still be there.
# ARGV: mode, id, caller, record, key, expires_ms, created_ms, now, listed (1 or 0), sha256 and blake3 (empty while not verified).
_SAVE = """
local mode, id, caller, record, key, expires, created, now, listed, sha256, blake3 = unpack(ARGV)
local place, blobs, own = 'fluxgate:asset:' .. id, 'fluxgate:blobs:' .. caller, key
local before, old = unpack(redis.call('HMGET', place, 'key', 'record'))
local known = sha256 ~= '' and redis.call('HGET', blobs, 'sha256:' .. sha256)
if mode == 'share' and not known then return false end
if mode == 'replace' and not before then
  redis.call('ZADD', 'fluxgate:garbage', now, own)
  return false
end
if known then
  key = known
  if own ~= key and mode ~= 'share' then redis.call('ZADD', 'fluxgate:garbage', now, own) end
elseif sha256 ~= '' then
  redis.call('HSET', blobs, 'sha256:' .. sha256, key, 'blake3:' .. blake3, key)
end
if before and before ~= key then
  redis.call('SREM', 'fluxgate:blob:' .. before, id)
  -- While its signed URL lives it may be written once more.
  redis.call('ZADD', 'fluxgate:garbage', math.max(now, cjson.decode(old).writable_ms), before)
end
redis.call('HSET', place, 'record', record, 'key', key, 'expires_ms', expires)
redis.call('SADD', 'fluxgate:blob:' .. key, id)
redis.call('ZREM', 'fluxgate:garbage', key)
redis.call('ZADD', 'fluxgate:assets', expires, id)
if listed == '1' then redis.call('ZADD', 'fluxgate:assets:' .. caller, created, id) end
return key
"""
# ARGV: id, caller, now, expired (1: only when its time has come). Answers whether it went.
_REMOVE = """
local id, caller, now, expired = unpack(ARGV)
local place = 'fluxgate:asset:' .. id
local key, record, expires = unpack(redis.call('HMGET', place, 'key', 'record', 'expires_ms'))
if not key then
  redis.call('ZREM', 'fluxgate:assets', id)
  return 0
end
if expired == '1' and tonumber(expires) > tonumber(now) then return 0 end
record = cjson.decode(record)
if caller ~= '' and record.caller ~= caller then return 0 end
redis.call('DEL', place)
redis.call('ZREM', 'fluxgate:assets', id)
redis.call('ZREM', 'fluxgate:assets:' .. record.caller, id)
redis.call('SREM', 'fluxgate:blob:' .. key, id)
if redis.call('EXISTS', 'fluxgate:blob:' .. key) == 0 then
  local blobs = 'fluxgate:blobs:' .. record.caller
  for _, name in ipairs({'sha256:' .. record.sha256, 'blake3:' .. (type(record.blake3) == 'string' and record.blake3 or '')}) do
    if redis.call('HGET', blobs, name) == key then redis.call('HDEL', blobs, name) end
  end
  redis.call('ZADD', 'fluxgate:garbage', math.max(now, record.writable_ms), key)
end
return 1
"""
# ARGV: id, expires_ms. An asset's time is only ever put off.
_TOUCH = """
local place = 'fluxgate:asset:' .. ARGV[1]
local expires = redis.call('HGET', place, 'expires_ms')
if expires and tonumber(expires) < tonumber(ARGV[2]) then
  redis.call('HSET', place, 'expires_ms', ARGV[2])
  redis.call('ZADD', 'fluxgate:assets', ARGV[2], ARGV[1])
end
"""


class Asset(BaseModel):
    """Bytes that a caller gave. `pending`: promised by `sha256` and `size_bytes`, and not looked at yet.

    `name` is the caller's and never part of a key or a path. `is_listed` is false for what was made of another asset. Until
    `writable_ms` a signed URL may write its object.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    id: str
    caller: str
    name: str | None = None
    content_type: str
    size_bytes: int
    sha256: str
    blake3: str | None = None
    key: str = ""
    width: int | None = None
    height: int | None = None
    status: Literal["pending", "ready"] = "ready"
    tags: tuple[str, ...] = ()
    is_listed: bool = True
    writable_ms: int = 0
    created_ms: int
    expires_ms: int


class AssetRecords:
    """All reads and writes of asset records. Raises RedisUnavailable, and nothing else of Redis's."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis
        self._save, self._remove, self._touch = (redis.register_script(script) for script in (_SAVE, _REMOVE, _TOUCH))

    @translate_redis
    async def save(self, asset: Asset, mode: Literal["own", "share", "replace"]) -> Asset | None:
        """Make or replace a record; the answer names the key its bytes really lie under.

        None: there are no equal bytes to `share`, or the record to `replace` is gone.
        """
        hashes = (asset.sha256, asset.blake3 or "") if asset.status == "ready" else ("", "")
        record = asset.model_dump_json(exclude={"key", "expires_ms"})
        times = (asset.expires_ms, asset.created_ms, now_ms())
        key = await self._save(args=[mode, asset.id, asset.caller, record, asset.key, *times, int(asset.is_listed), *hashes])
        return asset.model_copy(update={"key": key.decode()}) if key else None

    @translate_redis
    async def load(self, asset_id: str) -> Asset | None:
        """An asset, whoever owns it; None when there is none, or its time is over."""
        record, key, expires_ms = await self._redis.hmget(f"fluxgate:asset:{asset_id}", "record", "key", "expires_ms")
        if record is None or int(expires_ms) <= now_ms():
            return None
        asset = Asset.model_validate_json(record.removesuffix(b"}") + b',"expires_ms":%d}' % int(expires_ms))
        return asset.model_copy(update={"key": key.decode()})

    @translate_redis
    async def find_key(self, caller: str, name: str) -> str | None:
        """Where the caller's bytes of this hash lie; `name` is `sha256:...` or `blake3:...`."""
        key = await self._redis.hget(f"fluxgate:blobs:{caller}", name)
        return key.decode() if key else None

    @translate_redis
    async def ids_on(self, key: str) -> list[str]:
        """The assets that stand on an object."""
        return sorted(found.decode() for found in await self._redis.smembers(f"fluxgate:blob:{key}"))

    @translate_redis
    async def ids_before(self, caller: str, before: tuple[int, str] | None, limit: int) -> list[tuple[int, str]]:
        """A caller's listed assets made before `before` = (created_ms, id), newest first, as such pairs."""
        return await read_index(self._redis, f"fluxgate:assets:{caller}", before, limit)

    @translate_redis
    async def touch(self, asset_id: str, expires_ms: int) -> None:
        """Keep an asset until then, if it would go before."""
        await self._touch(args=[asset_id, expires_ms])

    @translate_redis
    async def remove(self, asset_id: str, caller: str) -> bool:
        """Forget a caller's asset; False when he has none of that id."""
        return bool(await self._remove(args=[asset_id, caller, now_ms(), 0]))

    @translate_redis
    async def remove_expired(self, limit: int = 100) -> int:
        """Forget assets whose time is over; answers how many were due."""
        due = await self._redis.zrangebyscore("fluxgate:assets", "-inf", now_ms(), 0, limit)
        for asset_id in due:
            await self._remove(args=[asset_id.decode(), "", now_ms(), 1])
        return len(due)

    @translate_redis
    async def find_made(self, caller: str, how: str) -> Asset | None:
        """What was made of one of the caller's assets before; `how` names the source's sha256 and what was done."""
        asset_id = await self._redis.get(f"fluxgate:made:{caller}:{how}")
        return await self.load(asset_id.decode()) if asset_id else None

    @translate_redis
    async def note_made(self, caller: str, how: str, asset: Asset) -> None:
        await self._redis.set(f"fluxgate:made:{caller}:{how}", asset.id, pxat=asset.expires_ms)

    @translate_redis
    async def note_garbage(self, key: str, due_ms: int) -> None:
        """An object that is to go at `due_ms`, unless a record claims it before."""
        await self._redis.zadd("fluxgate:garbage", {key: due_ms})

    @translate_redis
    async def garbage(self, limit: int = 100) -> list[str]:
        """Objects that are due to go."""
        return [key.decode() for key in await self._redis.zrangebyscore("fluxgate:garbage", "-inf", now_ms(), 0, limit)]

    @translate_redis
    async def forget_garbage(self, keys: list[str]) -> None:
        """These objects are gone from S3."""
        if keys:
            await self._redis.zrem("fluxgate:garbage", *keys)
