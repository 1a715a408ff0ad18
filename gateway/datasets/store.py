"""Datasets in Redis: who owns them, what is in them, and every object they ever had in S3. It moves no bytes of pictures.

Keys (all begin with `fluxgate:`):
  dataset:{id}           hash: head (what was said at its making), updated_ms
  dataset:{id}:files     hash: name -> the file
  dataset:{id}:captions  hash: name -> its caption, which may come later and apart from it
  dataset:{id}:keys      set: objects in S3, noted before they are written
  datasets:{caller}      its datasets by time of making
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from gateway.datasets.records import MAX_FILES, Caption, Dataset, DatasetFile, DatasetHead
from gateway.errors import Conflict, NotFound
from gateway.jobs.model import now_ms
from gateway.redis_client import RedisClient, read_index, translate_redis

# Each field is set by itself, so that two uploads at once lose nothing of each other. A file that was refused replaces none that was taken.
# ARGV: key of the dataset, time, most files, number of files, then (name, file), then (name, caption).
_COMMIT = """
local key, now, most, count = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
if redis.call('EXISTS', key) == 0 then return {'gone'} end
local files, captions, replaced, added = key .. ':files', key .. ':captions', {}, 0
for i = 5, 3 + 2 * count, 2 do
  if redis.call('HEXISTS', files, ARGV[i]) == 0 then added = added + 1 end
end
if redis.call('HLEN', files) + added > most then return {'full', tostring(redis.call('HLEN', files))} end
for i = 5, 3 + 2 * count, 2 do
  local old = redis.call('HGET', files, ARGV[i])
  local is_refused = cjson.decode(ARGV[i + 1]).key == cjson.null
  if not (old and is_refused and cjson.decode(old).key ~= cjson.null) then
    if old then replaced[#replaced + 1] = old end
    redis.call('HSET', files, ARGV[i], ARGV[i + 1])
  end
end
for i = 5 + 2 * count, #ARGV, 2 do
  if redis.call('HEXISTS', files, ARGV[i]) == 1 then redis.call('HSET', captions, ARGV[i], ARGV[i + 1]) end
end
redis.call('HSET', key, 'updated_ms', now)
return {'ok', unpack(replaced)}
"""
# ARGV: key of the dataset, time, name. Answers the file that was there.
_REMOVE = """
local old = redis.call('HGET', ARGV[1] .. ':files', ARGV[3])
if not old then return false end
redis.call('HDEL', ARGV[1] .. ':files', ARGV[3])
redis.call('HDEL', ARGV[1] .. ':captions', ARGV[3])
redis.call('HSET', ARGV[1], 'updated_ms', ARGV[2])
return old
"""
# ARGV: key of the dataset, keys in S3. A dataset that went meanwhile takes no new ones.
_NOTE = """
if redis.call('EXISTS', ARGV[1]) == 0 then return 0 end
for i = 2, #ARGV do redis.call('SADD', ARGV[1] .. ':keys', ARGV[i]) end
return 1
"""

# ARGV: key of the dataset, time, name, caption, whether to replace one that has words.
_SET_CAPTION = """
if redis.call('HEXISTS', ARGV[1] .. ':files', ARGV[3]) == 0 then return 0 end
local old = redis.call('HGET', ARGV[1] .. ':captions', ARGV[3])
if old and ARGV[5] == '0' and cjson.decode(old).text ~= '' then return 0 end
redis.call('HSET', ARGV[1] .. ':captions', ARGV[3], ARGV[4])
redis.call('HSET', ARGV[1], 'updated_ms', ARGV[2])
return 1
"""


class Change(NamedTuple):
    """What an upload adds. Captions are by the name of their picture, which is in this change or was there before."""

    files: Mapping[str, DatasetFile]
    captions: Mapping[str, Caption]


def _place(dataset_id: str) -> str:
    return f"fluxgate:dataset:{dataset_id}"


def absent(dataset_id: str) -> NotFound:
    return NotFound(f"There is no dataset {dataset_id!r}.", code="dataset_not_found", details={"parameter": "id", "value": dataset_id})


class DatasetStore:
    """All reads and writes of dataset records. Raises RedisUnavailable, and nothing else of Redis's."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis
        scripts = (_COMMIT, _REMOVE, _NOTE, _SET_CAPTION)
        self._commit, self._remove, self._note, self._set_caption = (redis.register_script(script) for script in scripts)

    @translate_redis
    async def create(self, head: DatasetHead) -> None:
        """A dataset without files."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hset(_place(head.id), mapping={"head": head.model_dump_json(), "updated_ms": head.created_ms})
            pipe.zadd(f"fluxgate:datasets:{head.caller}", {head.id: head.created_ms})
            await pipe.execute()

    @translate_redis
    async def load(self, dataset_id: str) -> Dataset | None:
        """The dataset with its files by name; None when there is none."""
        place = _place(dataset_id)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.hgetall(place).hgetall(f"{place}:files").hgetall(f"{place}:captions")
            fields, files, captions = await pipe.execute()
        return _decode(fields, files, captions) if fields else None

    @translate_redis
    async def ids_before(self, caller: str, before: tuple[int, str] | None, limit: int) -> list[tuple[int, str]]:
        """A caller's datasets made before `before` = (created_ms, id), newest first, as such pairs."""
        return await read_index(self._redis, f"fluxgate:datasets:{caller}", before, limit)

    @translate_redis
    async def note_key(self, dataset_id: str, key: str) -> None:
        """Remember an object before it is written, so that deleting the dataset finds it whatever happens. NotFound when it is gone."""
        if not await self._note(args=[_place(dataset_id), key]):
            raise absent(dataset_id)

    @translate_redis
    async def commit(self, dataset_id: str, change: Change) -> list[str]:
        """Add or replace files and captions, all or none; answers the S3 keys that nothing names any more.

        Raises NotFound when the dataset is gone, Conflict when it would hold more than MAX_FILES.
        """
        files = [part for name, file in change.files.items() for part in (name, file.model_dump_json())]
        captions = [part for name, caption in change.captions.items() for part in (name, caption.model_dump_json())]
        answer = await self._commit(args=[_place(dataset_id), now_ms(), MAX_FILES, len(change.files), *files, *captions])
        if answer[0] == b"gone":
            raise absent(dataset_id)
        if answer[0] == b"full":
            message = f"{dataset_id} has {answer[1].decode()} files; with these it would have more than {MAX_FILES}."
            raise Conflict(
                message, code="dataset_full", hint="Remove files first, or make another dataset.", details={"allowed": MAX_FILES}
            )
        return [key for raw in answer[1:] if (key := DatasetFile.model_validate_json(raw).key)]

    @translate_redis
    async def remove(self, dataset_id: str, name: str) -> DatasetFile | None:
        """Take a file out; answers what it was, None when it was not there."""
        raw = await self._remove(args=[_place(dataset_id), now_ms(), name])
        return DatasetFile.model_validate_json(raw) if raw else None

    @translate_redis
    async def set_caption(self, dataset_id: str, name: str, caption: Caption, *, overwrite: bool) -> bool:
        """Caption one file that is there; False when it is gone, or has words already that shall stay."""
        args = [_place(dataset_id), now_ms(), name, caption.model_dump_json(), int(overwrite)]
        return bool(await self._set_caption(args=args))

    @translate_redis
    async def forget_keys(self, dataset_id: str, keys: Iterable[str]) -> None:
        """These objects are gone from S3."""
        if gone := list(keys):
            await self._redis.srem(f"{_place(dataset_id)}:keys", *gone)

    @translate_redis
    async def delete(self, head: DatasetHead) -> list[str]:
        """Forget the dataset; answers the S3 keys it had, which are remembered until `forget_keys`."""
        place = _place(head.id)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.smembers(f"{place}:keys").delete(place, f"{place}:files", f"{place}:captions")
            pipe.zrem(f"fluxgate:datasets:{head.caller}", head.id)
            keys, *_ = await pipe.execute()
        return sorted(key.decode() for key in keys)


def _decode(fields: Mapping[bytes, bytes], files: Mapping[bytes, bytes], captions: Mapping[bytes, bytes]) -> Dataset:
    decoded = []
    for name, raw in files.items():
        file = DatasetFile.model_validate_json(raw)
        if (said := captions.get(name)) is not None:
            caption = Caption.model_validate_json(said)
            file = file.model_copy(update={"caption": caption.text, "problems": (*file.problems, *caption.problems)})
        decoded.append(file)
    head: dict[str, Any] = DatasetHead.model_validate_json(fields[b"head"]).model_dump()
    return Dataset(**head, updated_ms=int(fields[b"updated_ms"]), files=tuple(sorted(decoded, key=lambda file: file.name)))
