"""Known LoRAs: name, file, family, trigger word, and which instances have them. Names are resolved here; files are ComfyUI's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from gateway.errors import NotFound
from gateway.jobs.records import Claim
from gateway.redis_client import RedisClient, translate_redis


class Lora(BaseModel):
    """One LoRA. `family` None means its file does not say what it was trained on."""

    model_config = ConfigDict(extra="ignore")
    name: str
    file: str
    family: str | None = None
    base_model: str | None = None
    trigger_word: str | None = None
    # Of those published here; a file that only lies on an instance has none of these.
    sha256: str | None = None
    size_bytes: int | None = None
    rank: int | None = None
    format: str | None = None
    patched_layers: int | None = None
    training: str | None = None
    # The caller who trained or imported it; None: an operator put the file on an instance. Others see it when it is shared.
    owner: str | None = None
    shared: bool = False
    source: str | None = None  # of an imported one: `upload`, or the URL without its query
    created_ms: int | None = None
    # Jobs that drew the same seed without and with it.
    before: str | None = None
    after: str | None = None
    instances: list[str] = Field(default_factory=list)

    @property
    def key(self) -> str:
        """Where a published file lies in the bucket."""
        return f"loras/{self.file}"

    def is_for(self, caller: str) -> bool:
        """Whether this caller may know of it."""
        return self.owner is None or self.shared or self.owner == caller


class Source(BaseModel):
    """Where the worker gets an imported file: an object in S3 that its sender calls `name`, or a URL."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    url: str | None = None
    key: str | None = None
    name: str = ""
    size_bytes: int = 0


_LORAS = TypeAdapter(list[Lora])
# ARGV: caller, name, job id.
_FORGET_IMPORT = """
local imports = 'fluxgate:imports:' .. ARGV[1]
if redis.call('HGET', imports, ARGV[2]) == ARGV[3] then redis.call('HDEL', imports, ARGV[2]) end
"""
# ARGV: file, record as read, new record.
_REPLACE = """
if redis.call('HGET', 'fluxgate:published', ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HSET', 'fluxgate:published', ARGV[1], ARGV[3])
return 1
"""
# ARGV: file, record, job that made it or '', its lease  ->  1, or 0 when that job may not publish any more. A cancel is one step, too: it
# comes before this one and stops it, or after it and finds a LoRA. Sent twice over a broken connection, the first one counted.
_ANNOUNCE = """
if ARGV[3] ~= '' and redis.call('HGET', 'fluxgate:published', ARGV[1]) ~= ARGV[2] then
  local facts = redis.call('HMGET', 'fluxgate:job:' .. ARGV[3], 'status', 'lease')
  if facts[1] ~= 'running' or facts[2] ~= ARGV[4] then return 0 end
end
redis.call('HSET', 'fluxgate:published', ARGV[1], ARGV[2])
redis.call('SREM', 'fluxgate:withdrawn', ARGV[1])
return 1
"""


def describe_lora(file: str, metadata: dict[str, Any]) -> Lora:
    """A LoRA from its file name and the metadata in its header.

    Reads our own keys first, then those of kohya's scripts (`ss_base_model_version`) and of the model spec (`modelspec.architecture`).
    """
    family = metadata.get("fluxgate.family")
    declared = f"{metadata.get('ss_base_model_version', '')} {metadata.get('modelspec.architecture', '')}".lower()
    if family is None and "flux" in declared:
        family = "flux1"
    stem = file.replace("\\", "/").rpartition(".")[0] or file
    return Lora(
        name=stem,
        file=file,
        family=family,
        base_model=metadata.get("fluxgate.base_model"),
        trigger_word=metadata.get("fluxgate.trigger_word"),
    )


def _bare(file: str) -> str:
    """Without the folder: instances list what lies in subfolders by its path."""
    return file.replace("\\", "/").rpartition("/")[2]


class LoraRegistry:
    """What the instances list, merged by file. Raises RedisUnavailable."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis, self._forget_import = redis, redis.register_script(_FORGET_IMPORT)
        self._replace, self._announce = redis.register_script(_REPLACE), redis.register_script(_ANNOUNCE)

    @translate_redis
    async def publish(self, instance: str, loras: list[Lora]) -> None:
        """Replace what one instance is known to have."""
        await self._redis.hset("fluxgate:loras", instance, _LORAS.dump_json(loras).decode())

    @translate_redis
    async def keep_only(self, instances: Iterable[str]) -> None:
        """Forget what instances had that are no part of the fleet any more."""
        gone = {name.decode() for name in await self._redis.hkeys("fluxgate:loras")} - set(instances)
        if gone:
            await self._redis.hdel("fluxgate:loras", *gone)

    @translate_redis
    async def announce(self, lora: Lora, by: Claim | None = None) -> bool:
        """A published LoRA. Its name stands for the newest file published under it.

        False, and nothing is published, when the job `by` which it was made is being canceled, or is somebody else's by now.
        """
        maker = (by.id, by.lease) if by is not None else ("", "")
        return bool(await self._announce(args=[lora.file, lora.model_dump_json(exclude={"instances"}), *maker]))

    @translate_redis
    async def change(self, file: str, **fields: Any) -> Lora | None:
        """What is newly known of a published LoRA, beside what others change at the same time; None when it was taken back meanwhile."""
        while (raw := await self._redis.hget("fluxgate:published", file)) is not None:
            changed = Lora.model_validate_json(raw).model_copy(update=fields)
            if await self._replace(args=[file, raw, changed.model_dump_json(exclude={"instances"})]):
                return changed
        return None

    @translate_redis
    async def claim_pictures(self, file: str) -> bool:
        """Whether the before and after pictures are the asker's to queue; told to one asker in ten minutes."""
        return bool(await self._redis.set(f"fluxgate:pictures:{file}", 1, nx=True, ex=600))

    @translate_redis
    async def release_pictures(self, file: str) -> None:
        """They could not be queued: the next asker may."""
        await self._redis.delete(f"fluxgate:pictures:{file}")

    @translate_redis
    async def touch(self, files: Iterable[str], now_ms: int) -> None:
        """They are in use now: what is used least leaves the instances' folders first."""
        if times := dict.fromkeys(files, now_ms):
            await self._redis.hset("fluxgate:lora_used", mapping=times)

    @translate_redis
    async def used(self) -> dict[str, int]:
        """When each file was last in use anywhere, in milliseconds since the epoch."""
        return {file.decode(): int(used_ms) for file, used_ms in (await self._redis.hgetall("fluxgate:lora_used")).items()}

    @translate_redis
    async def withdraw(self, file: str) -> None:
        """Forget a published LoRA. Instances may have the file for ever: it is remembered as nobody's."""
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.hdel("fluxgate:published", file).hdel("fluxgate:lora_used", file)
            await pipeline.sadd("fluxgate:withdrawn", file).execute()

    @translate_redis
    async def note_import(self, caller: str, name: str, job_id: str) -> None:
        """The caller's newest import under a name."""
        await self._redis.hset(f"fluxgate:imports:{caller}", name, job_id)

    @translate_redis
    async def imports(self, caller: str) -> dict[str, str]:
        """The job of the caller's newest import under each name."""
        return {name.decode(): job_id.decode() for name, job_id in (await self._redis.hgetall(f"fluxgate:imports:{caller}")).items()}

    @translate_redis
    async def forget_import(self, caller: str, name: str, job_id: str) -> None:
        """Forget it, unless a newer one has the name by now."""
        await self._forget_import(args=[caller, name, job_id])

    @translate_redis
    async def published(self) -> list[Lora]:
        """Every published LoRA, oldest first; instances are not told."""
        loras = [Lora.model_validate_json(raw) for raw in (await self._redis.hgetall("fluxgate:published")).values()]
        return sorted(loras, key=lambda lora: (lora.created_ms or 0, lora.file))

    @translate_redis
    async def all(self) -> list[Lora]:
        """Every LoRA that is published or that some instance has, by name, whosever it is."""
        merged = {lora.file: lora for lora in await self.published()}
        withdrawn = await self._withdrawn()
        for instance, raw in (await self._redis.hgetall("fluxgate:loras")).items():
            for lora in _LORAS.validate_json(raw):
                if _bare(lora.file) not in withdrawn:
                    merged.setdefault(lora.file, lora).instances.append(instance.decode())
        return sorted(merged.values(), key=lambda lora: lora.name)

    async def _withdrawn(self) -> set[str]:
        return {file.decode() for file in await self._redis.smembers("fluxgate:withdrawn")}

    async def of(self, caller: str) -> list[Lora]:
        """Those that this caller may know of, by name."""
        return [lora for lora in await self.all() if lora.is_for(caller)]

    @translate_redis
    async def hidden_from(self, caller: str) -> frozenset[str]:
        """Files that lie on instances and are not for this caller."""
        return frozenset(await self._withdrawn() | {lora.file for lora in await self.published() if not lora.is_for(caller)})

    async def resolve(self, names: Iterable[str], caller: str) -> list[Lora]:
        """The LoRAs of these names, in order. NotFound names the missing one and the nearest known ones.

        Of several with one name it is the caller's own, then the newest.
        """
        wanted = list(names)
        if not wanted:
            return []
        everything = sorted(await self.of(caller), key=lambda lora: (lora.owner == caller, lora.created_ms or 0))
        known = {lora.name: lora for lora in everything}
        by_file = {lora.file: lora for lora in everything} | {lora.file.rpartition(".")[0]: lora for lora in everything}
        found = []
        for name in wanted:
            lora = known.get(name) or by_file.get(name)
            if lora is None:
                nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
                raise NotFound(
                    f"There is no LoRA {name!r}.",
                    code="lora_not_found",
                    hint=f"Did you mean {', '.join(nearest)}?" if nearest else "GET /v1/loras lists those there are.",
                    details={"parameter": "loras", "value": name, "nearest": nearest},
                )
            found.append(lora)
        return found
