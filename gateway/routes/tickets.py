"""`POST .../ticket`: a right to watch one job, to put where a key must never stand: into an address."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field

from gateway.auth import Caller
from gateway.callers.tickets import Ticket
from gateway.jobs.model import now_ms
from gateway.presentation import rfc3339
from gateway.routes.deps import BaseUrl, CurrentCaller, Once, OnceRoute, Runtime, Trainer, load_own_job
from gateway.runtime import Runtime as RuntimeState

router = APIRouter(prefix="/v1", tags=["events"], route_class=OnceRoute)


class TicketRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    ttl_s: int = Field(600, ge=10, le=3600, description="Seconds in which a stream may be opened with it; one that is open goes on.")


@router.post("/generations/{job_id}/ticket", status_code=201, dependencies=[Depends(Once("ticket", "urls"))])
async def create_ticket(
    job_id: str, runtime: Runtime, caller: CurrentCaller, base_url: BaseUrl, request: TicketRequest | None = None
) -> dict[str, Any]:
    """A ticket for the events of a generation: `?ticket=` opens its stream or WebSocket, and nothing else."""
    return await _write(runtime, caller, job_id, "generation", base_url, request or TicketRequest())


@router.post("/trainings/{job_id}/ticket", status_code=201, dependencies=[Depends(Once("ticket", "urls"))])
async def create_training_ticket(
    job_id: str, runtime: Runtime, caller: Trainer, base_url: BaseUrl, request: TicketRequest | None = None
) -> dict[str, Any]:
    """A ticket for the events of a training."""
    return await _write(runtime, caller, job_id, "training", base_url, request or TicketRequest())


async def _write(runtime: RuntimeState, caller: Caller, job_id: str, kind: str, base_url: str, request: TicketRequest) -> dict[str, Any]:
    job = await load_own_job(runtime, caller, job_id, kind)
    expires_ms = now_ms() + request.ttl_s * 1000
    text = await runtime.tickets.write(Ticket(job.id, caller.id, caller.key, expires_ms))
    home = f"{base_url}/v1/{kind}s/{job.id}"
    return {
        "ticket": text,
        "object": "ticket",
        "expires_at": rfc3339(expires_ms),
        "urls": {"events": f"{home}/events?ticket={text}", "ws": f"{home.replace('http', 'ws', 1)}/ws?ticket={text}"},
    }
