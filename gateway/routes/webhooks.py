"""`POST .../webhook/replay`: tell a job's end once more."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends

from gateway.auth import Caller
from gateway.presentation import present_job
from gateway.routes.deps import BaseUrl, CurrentCaller, Once, OnceRoute, Runtime, Trainer, load_own_job
from gateway.runtime import Runtime as RuntimeState

router = APIRouter(prefix="/v1", tags=["webhooks"], route_class=OnceRoute)


@router.post("/generations/{job_id}/webhook/replay", status_code=202, dependencies=[Depends(Once())])
async def replay_generation_webhook(job_id: str, runtime: Runtime, caller: CurrentCaller, base_url: BaseUrl) -> dict[str, Any]:
    """Send the webhook of a job that has ended again, now and with all its tries."""
    return await _replay(runtime, caller, job_id, "generation", base_url)


@router.post("/trainings/{job_id}/webhook/replay", status_code=202, dependencies=[Depends(Once())])
async def replay_training_webhook(job_id: str, runtime: Runtime, caller: Trainer, base_url: BaseUrl) -> dict[str, Any]:
    """Send the webhook of a training that has ended again, now and with all its tries."""
    return await _replay(runtime, caller, job_id, "training", base_url)


async def _replay(runtime: RuntimeState, caller: Caller, job_id: str, kind: str, base_url: str) -> dict[str, Any]:
    await load_own_job(runtime, caller, job_id, kind)
    await runtime.deliveries.replay(job_id)
    return present_job(await load_own_job(runtime, caller, job_id, kind), base_url=base_url, storage=runtime.storage)
