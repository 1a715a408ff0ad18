"""`/v1/instances`: each ComfyUI as the dispatchers see it; admins add, drain and remove them while everything runs."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field, field_validator

from gateway.errors import NotFound
from gateway.instances import InstanceFacts, Member
from gateway.presentation import rfc3339
from gateway.routes.deps import Admin, Once, OnceRoute, Runtime
from gateway.runtime import Runtime as RuntimeState

router = APIRouter(prefix="/v1/instances", tags=["instances"], route_class=OnceRoute)


def _present(facts: InstanceFacts) -> dict[str, Any]:
    record = facts.model_dump(exclude={"seen_ms", "catalog_version"})
    record["seen_at"] = rfc3339(facts.seen_ms or None)
    return record


@router.get("")
async def list_instances(runtime: Runtime, caller: Admin) -> dict[str, Any]:
    """Each ComfyUI: state, version, device, memory, what is loaded, what went wrong last. A removed one as long as it runs something."""
    return {"data": [_present(facts) for facts in await runtime.registry.all()]}


@router.get("/{instance}")
async def get_instance(instance: str, runtime: Runtime, caller: Admin) -> dict[str, Any]:
    """One ComfyUI by id."""
    facts = await _see(runtime, instance)
    if facts is None:
        raise _unknown(instance)
    return _present(facts)


_HOST = re.compile(r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?\.?|[0-9a-f:.]+")
_PATH = re.compile(r"(?:[A-Za-z0-9_~-][A-Za-z0-9._~-]*(?:/|$))*")


class NewInstance(BaseModel):
    """A ComfyUI to use from now on."""

    model_config = ConfigDict(extra="forbid")
    url: str = Field(description="Its base URL as the dispatchers reach it, http://HOST:PORT.", max_length=500)

    @field_validator("url")
    @classmethod
    def _be_a_base_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
            raise ValueError("write http://HOST:PORT, without user, query or fragment")
        # `port` raises ValueError when it is none.
        if (
            parts.port == 0
            or not value.isprintable()
            or not _HOST.fullmatch(parts.hostname)
            or not _PATH.fullmatch(value.partition("://")[2].partition("/")[2])
        ):
            raise ValueError("write http://HOST:PORT, with a host's name or address and at most a plain path behind it")
        return value.rstrip("/")


@router.post("", status_code=202, dependencies=[Depends(Once())])
async def add_instance(request: NewInstance, runtime: Runtime, caller: Admin) -> dict[str, Any]:
    """Use one more instance. Dispatchers pick it up within a second or two."""
    return {"id": await runtime.fleet.put(Member(url=request.url)), "url": request.url, "draining": False}


@router.post("/{instance}/drain", status_code=202, dependencies=[Depends(Once())])
async def drain_instance(instance: str, runtime: Runtime, caller: Admin) -> dict[str, Any]:
    """Let it finish what it holds and give it nothing new."""
    return await _set_draining(runtime, instance, True)


@router.post("/{instance}/resume", status_code=202, dependencies=[Depends(Once())])
async def resume_instance(instance: str, runtime: Runtime, caller: Admin) -> dict[str, Any]:
    """Give it work again."""
    return await _set_draining(runtime, instance, False)


@router.delete("/{instance}", status_code=202)
async def remove_instance(instance: str, runtime: Runtime, caller: Admin) -> dict[str, Any]:
    """Drain it, then forget it; also one that the settings name, until it is added again."""
    await _find(runtime, instance)
    await runtime.fleet.remove(instance)
    return {"id": instance, "removed": True}


async def _set_draining(runtime: RuntimeState, instance: str, draining: bool) -> dict[str, Any]:
    member = await _find(runtime, instance)
    await runtime.fleet.put(Member(url=member.url, draining=draining))
    return {"id": instance, "url": member.url, "draining": draining}


async def _find(runtime: RuntimeState, instance: str) -> Member:
    """One that is to be used, or that dispatchers use by settings of their own."""
    member = (await runtime.fleet.wanted(runtime.settings.comfyui_urls)).get(instance)
    if member is not None:
        return member
    facts = await _see(runtime, instance)
    if facts is None:
        raise _unknown(instance)
    return Member(url=facts.url)


async def _see(runtime: RuntimeState, instance: str) -> InstanceFacts | None:
    return next((facts for facts in await runtime.registry.all() if facts.id == instance), None)


def _unknown(instance: str) -> NotFound:
    return NotFound(f"There is no instance {instance!r}.", code="instance_not_found", details={"parameter": "instance", "value": instance})
