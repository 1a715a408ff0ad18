"""`/v1/keys` for admins, `/v1/usage` for everybody. A key's text is in the answer that made it, and nowhere else."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from gateway.callers.keys import CALLER_NAME, CallerLimits, Key, mint_key
from gateway.callers.usage import LONGEST_DAYS
from gateway.jobs.model import now_ms
from gateway.presentation import rfc3339
from gateway.routes.deps import Admin, AnyCaller, Once, OnceRoute, Runtime
from gateway.runtime import Runtime as RuntimeState

router = APIRouter(prefix="/v1", tags=["keys"], route_class=OnceRoute)


def _refuse_number(value: Any) -> Any:
    """Seconds or milliseconds, since when? Say it in words."""
    if value is not None and not isinstance(value, str):
        raise ValueError("must be an RFC 3339 time, such as 2026-01-31T12:00:00Z")
    return value


_Moment = Annotated[AwareDatetime, BeforeValidator(_refuse_number)]


_Name = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")]
_Scopes = Annotated[list[Literal["generate", "train", "admin"]], Field(min_length=1, max_length=3)]


def _in_ms(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp() * 1000)


class NewKey(BaseModel):
    """What a key may do, and whose things it reaches."""

    model_config = ConfigDict(extra="forbid")

    name: _Name = Field("key", description="For people; need not be unique.")
    scopes: _Scopes = Field(["generate"], description="`admin` includes the others.")
    caller: str | None = Field(
        None, pattern=CALLER_NAME, description="Keys with one caller share jobs, LoRAs, limits and usage. Without: the key's own."
    )
    expires_at: _Moment | None = Field(None, description="RFC 3339 time from which the key is refused.")
    limits: CallerLimits = Field(default_factory=CallerLimits, description="Those given become the caller's.")


class KeyChange(BaseModel):
    """What is left out stays as it is. Whose things a key reaches never changes."""

    model_config = ConfigDict(extra="forbid")

    name: _Name = Field("", description="For people.")
    scopes: _Scopes = Field([], description="What the key may do from now on.")
    expires_at: _Moment | None = Field(None, description="RFC 3339 time from which the key is refused; null for never.")
    limits: CallerLimits = Field(
        default_factory=CallerLimits, description="Of the key's caller, so of all its keys; null leaves one to the settings again."
    )

    def changes(self) -> dict[str, Any]:
        """Fields of the key's record."""
        said = {"name": self.name, "scopes": tuple(dict.fromkeys(self.scopes)), "expires_at": _in_ms(self.expires_at)}
        return {"expires_ms" if name == "expires_at" else name: said[name] for name in self.model_fields_set & said.keys()}


async def _present(runtime: RuntimeState, key: Key, limits: CallerLimits | None, used_ms: int | None) -> dict[str, Any]:
    today = await runtime.usage.read(key.caller, days=1)
    return {
        "id": key.id,
        "object": "key",
        "name": key.name,
        "prefix": f"fg_{key.prefix}",
        "caller": key.caller,
        "scopes": list(key.scopes),
        "limits": (limits or CallerLimits()).model_dump(),
        "is_good": key.is_good(now_ms()),
        "created_at": rfc3339(key.created_ms),
        "last_used_at": rfc3339(used_ms),
        "expires_at": rfc3339(key.expires_ms),
        "revoked_at": rfc3339(key.revoked_ms),
        "usage_today": today[0] if today else None,
    }


@router.post("/keys", status_code=201, dependencies=[Depends(Once("key"))])
async def create_key(request: NewKey, runtime: Runtime, caller: Admin) -> dict[str, Any]:
    """Make a key. `key` is its text, shown this once: only its hash is kept."""
    key, text = mint_key(request.name, tuple(dict.fromkeys(request.scopes)), caller=request.caller, expires_ms=_in_ms(request.expires_at))
    await runtime.keys.add(key, request.limits)
    await runtime.doorkeeper.refresh()
    ring = await runtime.keys.load()
    return {**await _present(runtime, key, ring.limits.get(key.caller), None), "key": text}


@router.get("/keys")
async def list_keys(runtime: Runtime, caller: Admin) -> dict[str, Any]:
    """Every key there was, the newest first, with today's usage of its caller."""
    ring, used = await runtime.keys.load(), await runtime.keys.last_used()
    keys = sorted(ring.keys.values(), key=lambda key: (key.created_ms, key.id), reverse=True)
    return {"data": [await _present(runtime, key, ring.limits.get(key.caller), used.get(key.prefix)) for key in keys]}


@router.patch("/keys/{key_id}")
async def change_key(key_id: str, request: KeyChange, runtime: Runtime, caller: Admin) -> dict[str, Any]:
    """Change a key's name, scopes or end, and its caller's limits: here at once, in other gateway processes within a second."""
    await runtime.keys.change(key_id, request.changes(), request.limits.model_dump(exclude_unset=True))
    await runtime.doorkeeper.refresh()
    ring, used = await runtime.keys.load(), await runtime.keys.last_used()
    key = ring.keys[key_id.removeprefix("key_")]
    return await _present(runtime, key, ring.limits.get(key.caller), used.get(key.prefix))


@router.delete("/keys/{key_id}")
async def revoke_key(key_id: str, runtime: Runtime, caller: Admin) -> dict[str, Any]:
    """Refuse a key from now on: here at once, by other gateway processes within a second. Its jobs go on, and stay its caller's."""
    key = await runtime.keys.revoke(key_id)
    await runtime.doorkeeper.refresh()
    return {"id": key.id, "object": "key", "revoked_at": rfc3339(key.revoked_ms)}


@router.get("/usage")
async def get_usage(runtime: Runtime, caller: AnyCaller, days: Annotated[int, Query(ge=1, le=LONGEST_DAYS)] = 7) -> dict[str, Any]:
    """What the caller used, by day in UTC, and its limits. Requests of the last second may be missing."""
    limits = (await runtime.keys.load()).limits.get(caller.id) or CallerLimits()
    return {
        "caller": caller.id,
        "scopes": sorted(caller.scopes),
        "limits": limits.model_dump(),
        "days": await runtime.usage.read(caller.id, days),
    }
