"""What every route may ask for: the runtime, the caller, the base URL of links."""

from __future__ import annotations

import base64
import binascii
from datetime import datetime
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request

from gateway.auth import LOCAL, Caller
from gateway.comfy_v2 import ComfyPresenter
from gateway.errors import BadRequest, Forbidden, NotFound
from gateway.jobs.model import Job
from gateway.runtime import Runtime as RuntimeState


# Coroutines, although none waits: the framework would call plain functions in a thread, half a millisecond each time.
async def _runtime(request: Request) -> RuntimeState:
    runtime: RuntimeState = request.app.state.runtime
    return runtime


async def _caller(request: Request) -> Caller:
    return LOCAL


async def _base_url(request: Request) -> str:
    runtime: RuntimeState = request.app.state.runtime
    return (runtime.settings.public_url or str(request.base_url)).rstrip("/")


async def _admin(caller: Annotated[Caller, Depends(_caller)]) -> Caller:
    if "admin" not in caller.scopes:
        raise Forbidden("This needs a key with the scope `admin`.", details={"allowed": "admin", "value": sorted(caller.scopes)})
    return caller


async def _comfy(base_url: Annotated[str, Depends(_base_url)], runtime: Annotated[RuntimeState, Depends(_runtime)]) -> ComfyPresenter:
    settings = runtime.settings
    return ComfyPresenter(runtime.storage, settings.url_ttl_s, settings.job_ttl_s, urlsplit(base_url).path.rstrip("/"))


Runtime = Annotated[RuntimeState, Depends(_runtime)]
CurrentCaller = Annotated[Caller, Depends(_caller)]
Admin = Annotated[Caller, Depends(_admin)]
BaseUrl = Annotated[str, Depends(_base_url)]
Comfy = Annotated[ComfyPresenter, Depends(_comfy)]


async def load_own_job(runtime: RuntimeState, caller: Caller, job_id: str, kind: str = "generation") -> Job:
    """The caller's job. Somebody else's is as absent as one that never was."""
    job = await runtime.store.load(job_id)
    if job is None or job.spec.caller != caller.id or job.spec.kind != kind:
        raise NotFound(f"There is no {kind} {job_id!r}.", code="job_not_found", details={"parameter": "id", "value": job_id})
    return job


def encode_cursor(pair: tuple[int, str]) -> str:
    """(created_ms, id) of a page's last item, for the next page to begin behind."""
    return base64.urlsafe_b64encode(f"{pair[0]}:{pair[1]}".encode()).decode().rstrip("=")


def decode_cursor(cursor: str | None) -> tuple[int, str] | None:
    """The pair a cursor was made from. Raises BadRequest."""
    if cursor is None:
        return None
    try:
        created_ms, _, item_id = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii").partition(":")
        if abs(int(created_ms)) >= 1 << 53:
            raise ValueError("no time that Redis can compare")
        return int(created_ms), item_id
    except (ValueError, binascii.Error):
        raise BadRequest("The cursor is not one of ours.", details={"parameter": "cursor", "value": cursor[:100]}) from None


def parse_time(text: str | None) -> int | None:
    """Milliseconds since the epoch of `created_after`. Raises BadRequest."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise ValueError("no time zone")
        return int(moment.timestamp() * 1000)
    except (ValueError, OverflowError):
        raise BadRequest(
            "created_after is not an RFC 3339 time.",
            details={"parameter": "created_after", "value": text[:100], "allowed": "2026-01-31T12:00:00Z"},
        ) from None
