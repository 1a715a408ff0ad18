"""What every route may ask for: the runtime, the caller, the base URL of links."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from gateway.auth import LOCAL, Caller
from gateway.errors import Forbidden, NotFound
from gateway.jobs.model import Job
from gateway.runtime import Runtime as RuntimeState


def _runtime(request: Request) -> RuntimeState:
    runtime: RuntimeState = request.app.state.runtime
    return runtime


def _caller(request: Request) -> Caller:
    return LOCAL


def _base_url(request: Request) -> str:
    runtime: RuntimeState = request.app.state.runtime
    return (runtime.settings.public_url or str(request.base_url)).rstrip("/")


def _admin(caller: Annotated[Caller, Depends(_caller)]) -> Caller:
    if "admin" not in caller.scopes:
        raise Forbidden("This needs a key with the scope `admin`.", details={"allowed": "admin", "value": sorted(caller.scopes)})
    return caller


Runtime = Annotated[RuntimeState, Depends(_runtime)]
CurrentCaller = Annotated[Caller, Depends(_caller)]
Admin = Annotated[Caller, Depends(_admin)]
BaseUrl = Annotated[str, Depends(_base_url)]


async def load_own_job(runtime: RuntimeState, caller: Caller, job_id: str) -> Job:
    """The caller's job. Somebody else's is as absent as one that never was."""
    job = await runtime.store.load(job_id)
    if job is None or job.spec.caller != caller.id:
        raise NotFound(f"There is no generation {job_id!r}.", code="job_not_found", details={"parameter": "id", "value": job_id})
    return job
