"""`/v1/generations/{id}/reproduce`: the same graph once more, and a comparison of what came of it."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from gateway.edge.bodies import read_idempotency_key
from gateway.presentation import present_job
from gateway.routes.deps import BaseUrl, CurrentCaller, IdempotencyHeader, Runtime, load_own_job

router = APIRouter(prefix="/v1", tags=["generations"])


@router.post("/generations/{job_id}/reproduce", status_code=202, response_class=JSONResponse)
async def reproduce_generation(
    job_id: str, runtime: Runtime, caller: CurrentCaller, base_url: BaseUrl, idempotency_key: IdempotencyHeader = None
) -> JSONResponse:
    """Run the stored graph of a job that succeeded again, the cache left out. The new job's `reproduces` names the old one."""
    key = read_idempotency_key(caller, idempotency_key, f"reproduce {job_id}", None)
    if key is not None and (replay := await runtime.store.find_replay(key)) is not None and replay[1] is not None:
        return _answer(json.loads(replay[1]), replayed=True)
    original = await load_own_job(runtime, caller, job_id)
    if original.spec.raw:
        runtime.raw.require_right(caller)
    job, replayed = await runtime.reproduction.run_again(original, key)
    body = present_job(job, base_url=base_url, storage=runtime.storage)
    if key is not None:
        await runtime.store.record_answer(key, json.dumps(body).encode())
    return _answer(body, replayed=replayed)


def _answer(body: dict[str, Any], *, replayed: bool) -> JSONResponse:
    headers = {"Location": body["urls"]["self"], **({"Idempotency-Replayed": "true"} if replayed else {})}
    return JSONResponse(body, 202, headers=headers)


@router.get("/generations/{job_id}/comparison")
async def compare_generation(job_id: str, runtime: Runtime, caller: CurrentCaller) -> dict[str, Any]:
    """Whether a reproduction has the pixels of the job it reproduces, how far it is from them if not, and what differed."""
    return await runtime.reproduction.compare(await load_own_job(runtime, caller, job_id))
