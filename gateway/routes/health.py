"""Whether the process lives, whether it can serve, and its metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any, NamedTuple

from fastapi import APIRouter, Response
from fastapi.responses import RedirectResponse
from prometheus_client import CONTENT_TYPE_LATEST

from gateway.doctor.examine import examine
from gateway.edge.streams import EventStream
from gateway.errors import StorageUnavailable, Unavailable
from gateway.routes.deps import Admin, FullReport, IsOperator, Runtime
from gateway.runtime import Runtime as RuntimeState

BEATS, BEAT_S = 5, 0.25

router = APIRouter(tags=["health"])


@router.get("/", include_in_schema=False)
async def open_docs() -> RedirectResponse:
    """Who opens the bare address sees what can be asked here. Relative: a proxy may serve all of it below a path of its own."""
    return RedirectResponse("docs")


@router.get("/health")
async def get_health() -> dict[str, str]:
    """The process is alive."""
    return {"status": "ok"}


class Check(NamedTuple):
    """A part that cannot be used: its code for everybody, and words that name hosts and instances for admins."""

    code: str
    message: str


async def _check_redis(runtime: RuntimeState) -> Check | None:
    try:
        await runtime.store.depth()
    except Unavailable as error:
        return Check(error.code, error.message)
    return None


async def _check_storage(runtime: RuntimeState) -> Check | None:
    try:
        await runtime.storage.check()
    except StorageUnavailable as error:
        return Check(error.code, error.message)
    return None


async def _check_instances(runtime: RuntimeState) -> Check | None:
    try:
        facts = await runtime.registry.all()
    except Unavailable as error:
        return Check(error.code, error.message)
    if any(fact.state == "up" for fact in facts):
        return None
    said = "; ".join(f"{fact.id}: {fact.last_error or fact.state}" for fact in facts)
    return Check("no_instance", said or "no instance has been seen yet")


async def _beat() -> AsyncGenerator[bytes, None]:
    for _ in range(BEATS):
        yield b"data: %.3f\n\n" % time.monotonic()
        await asyncio.sleep(BEAT_S)


@router.post("/health/stream", response_class=EventStream, operation_id="try_stream_by_post")
@router.get("/health/stream", response_class=EventStream, operation_id="try_stream")
async def get_stream() -> EventStream:
    """A second of events, each the sender's clock: shows whether what stands between lets streams through as they are made."""
    return EventStream(_beat())


@router.get("/ready", responses={503: {"description": "Names the parts that are out of reach"}})
async def get_ready(runtime: Runtime, response: Response, full: FullReport, is_operator: IsOperator) -> dict[str, Any]:
    """Redis, S3 and at least one instance are usable; names what is not: by code, for admins in words. `full`: what the doctor finds."""
    if full:
        findings = await examine(runtime.settings)
        ready = not any(finding.state == "fault" for finding in findings)
        response.status_code = 200 if ready else 503
        return {"ready": ready, "findings": [finding.model_dump() for finding in findings]}
    faults = {
        "redis": await _check_redis(runtime),
        "storage": await _check_storage(runtime),
        "instances": await _check_instances(runtime),
    }
    ready = not any(faults.values())
    response.status_code = 200 if ready else 503
    told = {name: "ok" if fault is None else fault.message if is_operator else fault.code for name, fault in faults.items()}
    return {"ready": ready, "checks": told}


@router.get("/metrics", response_class=Response)
async def get_metrics(runtime: Runtime, caller: Admin) -> Response:
    """Prometheus text."""
    return Response(await runtime.gauges.render(), media_type=CONTENT_TYPE_LATEST)
