"""`/v1/generations/{id}/reproduce`: the same graph once more, and a comparison of what came of it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from gateway.presentation import present_job
from gateway.routes.deps import BaseUrl, CurrentCaller, Runtime, load_own_job

router = APIRouter(prefix="/v1", tags=["generations"])


@router.post("/generations/{job_id}/reproduce", status_code=202, response_class=JSONResponse)
async def reproduce_generation(job_id: str, runtime: Runtime, caller: CurrentCaller, base_url: BaseUrl) -> JSONResponse:
    """Run the stored graph of a job that succeeded again, the cache left out. The new job's `reproduces` names the old one."""
    original = await load_own_job(runtime, caller, job_id)
    if original.spec.raw:
        runtime.raw.require_right(caller)
    body = present_job(await runtime.reproduction.run_again(original), base_url=base_url, storage=runtime.storage)
    return JSONResponse(body, 202, headers={"Location": body["urls"]["self"]})


@router.get("/generations/{job_id}/comparison")
async def compare_generation(job_id: str, runtime: Runtime, caller: CurrentCaller) -> dict[str, Any]:
    """Whether a reproduction has the pixels of the job it reproduces, how far it is from them if not, and what differed."""
    return await runtime.reproduction.compare(await load_own_job(runtime, caller, job_id))
