"""What the dispatchers know of each ComfyUI, in Redis, so that every process can answer from it."""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from gateway.jobs.model import now_ms
from gateway.redis_client import RedisClient, translate_redis

# Facts that nobody renewed for this long are those of an instance nobody watches any more.
FACTS_TTL_S = 20
RECENT_S = 1.0
# The longest that the letting go of models is taken to be under way: a dispatcher that died at it says nothing more.
FREEING_S = 30.0
LOOK_S = 0.05
_REMOVED = b"removed"
CATALOG_TTL_S = 24 * 3600
# Of the 12 nodes of our Flux graph 6 give what the job before had already, and loading another base model gives 3 more.
RESULTS_A_JOB = 10
MOST_KEPT_JOBS = 32

Catalog = dict[str, dict[str, list[str]]]  # node class -> combo input -> choices


class InstanceFacts(BaseModel):
    """One ComfyUI as last seen. Sizes in bytes."""

    model_config = ConfigDict(extra="ignore")
    id: str
    url: str
    state: str  # up, resting (breaker open), draining, training (its GPU is lent to one), down
    version: str | None = None
    kind: str = "comfyui"
    device: str | None = None
    torch_version: str | None = None
    vram_total_bytes: int | None = None
    vram_free_bytes: int | None = None
    slots_used: int = 0
    slots: int = 0
    base_model: str | None = None
    loras: list[str] = Field(default_factory=list)
    last_error: str | None = None
    seen_ms: int = 0
    catalog_version: str = ""
    shared_gpu: str | None = None  # on which trainings take turns with it


def instance_id(url: str) -> str:
    """A name that is the same in every process that watches this URL."""
    parts = urlsplit(url)
    return f"{parts.hostname}-{parts.port or (443 if parts.scheme == 'https' else 80)}{parts.path.rstrip('/').replace('/', '-')}"


def count_kept_jobs(argv: object) -> int:
    """Of how many jobs, the newest among them, a ComfyUI started so keeps the results. It says its flags in /system_stats.

    Without flags it is the last one. With `--cache-lru N` results go in the order of their jobs, so that no more than N are left.
    """
    words = [word for part in argv for word in str(part).split("=", 1)] if isinstance(argv, list) else []
    size = words[words.index("--cache-lru") + 1] if "--cache-lru" in words[:-1] else ""
    kept = int(size) // RESULTS_A_JOB if size.isascii() and size.isdigit() and len(size) < 10 else 1
    return min(max(1, kept), MOST_KEPT_JOBS)


def reduce_catalog(object_info: dict[str, Any]) -> Catalog:
    """Of `/object_info` the part that placement asks about: classes, and the choices of their combo inputs.

    Both wire forms are read: `[[...choices], {...}]` and the newer `["COMBO", {"options": [...]}]`.
    """
    catalog: Catalog = {}
    for name, info in object_info.items():
        catalog[name] = combos = {}
        sections = info.get("input") or {}
        for section in ("required", "optional"):
            for input_name, declared in (sections.get(section) or {}).items():
                # What an extension declares in no form of ours is no combo.
                kind = declared[0] if isinstance(declared, list) and declared else None
                if kind == "COMBO" and len(declared) > 1 and isinstance(declared[1], dict):
                    kind = declared[1].get("options")
                if isinstance(kind, list):
                    combos[input_name] = [str(choice) for choice in kind]
    return catalog


class FileHash(BaseModel):
    """What a file of a base model holds, and by what one sees that it is still the same."""

    model_config = ConfigDict(extra="ignore")
    sha256: str
    size_bytes: int
    mtime_ms: int


class Member(BaseModel):
    """An instance that the deployment wants. A draining one finishes what it holds and takes nothing new."""

    model_config = ConfigDict(extra="ignore")
    url: str
    draining: bool = False


class FleetRegistry:
    """Which instances there are to be: those of the settings, changed at run time by admins. Kept in Redis, for all processes."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis

    @translate_redis
    async def wanted(self, urls: Iterable[str]) -> dict[str, Member]:
        """By id. What was said at run time wins over the settings' list."""
        members = {instance_id(url): Member(url=url) for url in urls}
        for name, raw in (await self._redis.hgetall("fluxgate:fleet")).items():
            if raw == _REMOVED:
                members.pop(name.decode(), None)
            else:
                members[name.decode()] = Member.model_validate_json(raw)
        return members

    @translate_redis
    async def put(self, member: Member) -> str:
        """Add an instance, or change one; its id."""
        name = instance_id(member.url)
        await self._redis.hset("fluxgate:fleet", name, member.model_dump_json())
        return name

    @translate_redis
    async def remove(self, name: str) -> None:
        """Let an instance go, also one that the settings name."""
        await self._redis.hset("fluxgate:fleet", name, _REMOVED)

    @translate_redis
    async def want_free(self, names: Iterable[str]) -> None:
        """Have instances let go of their models; whoever watches them does it within seconds."""
        await self._redis.hset("fluxgate:free", mapping=dict.fromkeys(names, now_ms()))

    @translate_redis
    async def keep_models(self, name: str) -> None:
        """Whoever wanted an instance free has been answered by a later wish. What is done of the earlier one already is done to its end."""
        await self._redis.hdel("fluxgate:free", name)
        for _ in range(int(FREEING_S / LOOK_S)):
            if not await self._redis.exists(f"fluxgate:freeing:{name}"):
                return
            await asyncio.sleep(LOOK_S)

    @translate_redis
    async def take_free(self, names: Iterable[str]) -> list[str]:
        """Of these instances, those that shall let go of their models; each is told to one asker only, who then calls `end_freeing`."""
        wanted = {name.decode() for name in await self._redis.hkeys("fluxgate:free")}
        return [name for name in names if name in wanted and await self._begin_freeing(name)]

    async def _begin_freeing(self, name: str) -> bool:
        """Marked before the wish is gone, so that whoever withdraws it sees the one or the other."""
        if not await self._redis.set(f"fluxgate:freeing:{name}", 1, nx=True, px=int(FREEING_S * 1000)):
            return False
        if await self._redis.hdel("fluxgate:free", name):
            return True
        await self._redis.delete(f"fluxgate:freeing:{name}")
        return False

    @translate_redis
    async def end_freeing(self, name: str) -> None:
        """What was known to be loaded there has been forgotten, or is still there."""
        await self._redis.delete(f"fluxgate:freeing:{name}")


def _bring_up_to_date(raw: bytes, wish: bytes | None, used: int, warm: list[bytes | None]) -> InstanceFacts:
    """Facts as published, with what Redis itself knows better."""
    facts = InstanceFacts.model_validate_json(raw)
    facts.slots_used, facts.base_model, facts.loras = used, (warm[0] or b"").decode() or None, sorted(json.loads(warm[1] or "[]"))
    if facts.state != "down" and wish and (wish == _REMOVED or Member.model_validate_json(wish).draining):
        facts.state = "draining"
    return facts


class InstanceRegistry:
    """Facts by instance id. Written by dispatchers, read by everyone."""

    def __init__(self, redis: RedisClient) -> None:
        self._redis = redis
        self._catalogs: dict[str, tuple[str, Catalog]] = {}
        self._recent: tuple[float, list[InstanceFacts]] = (-RECENT_S, [])
        self._is_asking = False

    async def recent(self) -> list[InstanceFacts]:
        """`all`, at most a second old: for decisions taken at every request. Asked again while none is up: that ends at any moment.

        Of many who find it too old one asks; meanwhile it is good enough for the others.
        """
        if all(facts.state != "up" for facts in self._recent[1]):
            self._recent = (time.monotonic(), await self.all())
        elif time.monotonic() - self._recent[0] >= RECENT_S and not self._is_asking:
            self._is_asking = True
            try:
                self._recent = (time.monotonic(), await self.all())
            finally:
                self._is_asking = False
        return self._recent[1]

    @translate_redis
    async def publish(self, facts: InstanceFacts) -> None:
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.set(f"fluxgate:instance:{facts.id}", facts.model_dump_json(), ex=FACTS_TTL_S)
            pipeline.sadd("fluxgate:instances", facts.id)
            await pipeline.execute()

    @translate_redis
    async def publish_catalog(self, instance: str, version: str, catalog: Catalog, object_info: dict[str, Any]) -> None:
        """What an instance has: the part that placement asks about, and the whole, which alike instances share."""
        whole = await asyncio.to_thread(lambda: zlib.compress(json.dumps(object_info).encode()))
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.set(f"fluxgate:catalog:{instance}", json.dumps(catalog), ex=CATALOG_TTL_S)
            pipeline.set(f"fluxgate:object_info:{version}", whole, ex=CATALOG_TTL_S)
            await pipeline.execute()
        self._catalogs[instance] = (version, catalog)

    @translate_redis
    async def keep_catalog(self, instance: str, version: str) -> bool:
        """It is still so; False when that was forgotten meanwhile, and has to be published again."""
        async with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.expire(f"fluxgate:catalog:{instance}", CATALOG_TTL_S)
            pipeline.expire(f"fluxgate:object_info:{version}", CATALOG_TTL_S)
            return all(await pipeline.execute())

    @translate_redis
    async def note_file_hash(self, place: str, known: FileHash) -> None:
        """Of a file below the models folder, as `vae/ae.safetensors`."""
        await self._redis.hset("fluxgate:model_hashes", place, known.model_dump_json())

    @translate_redis
    async def file_hashes(self) -> dict[str, FileHash]:
        """By place."""
        known = await self._redis.hgetall("fluxgate:model_hashes")
        return {place.decode(): FileHash.model_validate_json(raw) for place, raw in known.items()}

    async def hashes_by_name(self) -> dict[str, str]:
        """SHA-256 by the name under which ComfyUI lists a file; without names that two folders have for different files."""
        found: dict[str, set[str]] = {}
        for place, known in (await self.file_hashes()).items():
            found.setdefault(place.partition("/")[2], set()).add(known.sha256)
        return {name: next(iter(hashes)) for name, hashes in found.items() if len(hashes) == 1}

    @translate_redis
    async def object_info(self, version: str) -> dict[str, Any] | None:
        """The whole node catalogue of the instances with this version."""
        raw = await self._redis.get(f"fluxgate:object_info:{version}")
        if raw is None:
            return None
        found: dict[str, Any] = await asyncio.to_thread(lambda: json.loads(zlib.decompress(raw)))
        return found

    @translate_redis
    async def all(self) -> list[InstanceFacts]:
        """Every instance some dispatcher watches, by id; a removed one as long as it holds jobs. What it holds, what is loaded there and
        whether it drains are read as they are now, the rest is as its dispatcher last saw it."""
        ids = sorted(await self.watched())
        if not ids:
            return []
        async with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.mget([f"fluxgate:instance:{instance}" for instance in ids])
            pipeline.hmget("fluxgate:fleet", ids)
            for instance in ids:
                pipeline.scard(f"fluxgate:slots:{instance}")
                pipeline.hmget(f"fluxgate:warm:{instance}", "base_model", "loras")
            raws, wishes, *loads = await pipeline.execute()
        if gone := [instance for instance, raw in zip(ids, raws, strict=True) if raw is None]:
            await self._redis.srem("fluxgate:instances", *gone)
        seen = zip(raws, wishes, loads[::2], loads[1::2], strict=True)
        return [_bring_up_to_date(raw, wish, used, warm) for raw, wish, used, warm in seen if raw and (used or wish != _REMOVED)]

    @translate_redis
    async def watched(self) -> set[str]:
        """Ids of all that some dispatcher watches, or watched a moment ago."""
        return {member.decode() for member in await self._redis.smembers("fluxgate:instances")}

    @translate_redis
    async def base_model_on(self, instance: str) -> str | None:
        """What is loaded there now."""
        raw = await self._redis.hget(f"fluxgate:warm:{instance}", "base_model")
        return raw.decode() if raw else None

    @translate_redis
    async def note_base_models(self, names: Iterable[str], now_ms: int) -> None:
        """They are at work now: whoever makes room in the models folder begins with those that were not for longest."""
        if times := dict.fromkeys(names, now_ms):
            await self._redis.hset("fluxgate:base_models_used", mapping=times)

    @translate_redis
    async def base_models_used(self) -> dict[str, int]:
        """When each was last at work anywhere, in milliseconds since the epoch."""
        return {name.decode(): int(used_ms) for name, used_ms in (await self._redis.hgetall("fluxgate:base_models_used")).items()}

    @translate_redis
    async def catalog(self, facts: InstanceFacts) -> Catalog | None:
        """The instance's node classes and choices, kept in this process until their version changes."""
        known = self._catalogs.get(facts.id)
        if known is not None and known[0] == facts.catalog_version:
            return known[1]
        raw = await self._redis.get(f"fluxgate:catalog:{facts.id}")
        if raw is None:
            return None
        catalog: Catalog = json.loads(raw)
        self._catalogs[facts.id] = (facts.catalog_version, catalog)
        return catalog
