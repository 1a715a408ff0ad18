"""`/v1/trainings`: LoRA trainings as jobs. Their events are in the events file, their data sets have routes of their own."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query
from fastapi.responses import JSONResponse

from gateway.errors import Conflict
from gateway.jobs.model import Job, JobStatus
from gateway.jobs.records import IdempotencyKey
from gateway.jobs.trainings import TRAINING
from gateway.presentation import present_training
from gateway.routes.deps import BaseUrl, Runtime, Trainer, decode_cursor, encode_cursor, load_own_job, parse_time
from gateway.training import TrainingFilter, TrainingRequest

router = APIRouter(prefix="/v1/trainings", tags=["trainings"])


@router.post("", status_code=202, response_class=JSONResponse)
async def create_training(
    request: TrainingRequest,
    runtime: Runtime,
    caller: Trainer,
    base_url: BaseUrl,
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
) -> JSONResponse:
    """Train a LoRA. What would fail late is refused now; `urls.events` shows stages, loss and samples."""
    key = None
    if idempotency_key:
        body_hash = hashlib.sha256(b"training" + request.model_dump_json().encode()).hexdigest()
        key = IdempotencyKey(caller.id, idempotency_key, body_hash)
    webhook = await runtime.webhooks.accept(request.webhook, base_url)
    return _accepted(await runtime.trainings.admit(request, caller, key, webhook), base_url)


def _accepted(job: Job, base_url: str) -> JSONResponse:
    body = present_training(job, base_url=base_url)
    return JSONResponse(body, 202, headers={"Location": body["urls"]["self"]})


@router.get("")
async def list_trainings(
    runtime: Runtime,
    caller: Trainer,
    base_url: BaseUrl,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: str | None = None,
    object_: Annotated[Literal["training", "captioning"], Query(alias="object")] = "training",
    status: JobStatus | None = None,
    base: str | None = None,
    lora: Annotated[str | None, Query(description="Name of the LoRA that was asked for.")] = None,
    dataset: str | None = None,
    created_after: Annotated[str | None, Query(description="RFC 3339 time")] = None,
) -> dict[str, Any]:
    """The caller's trainings, newest first. `next_cursor` is null on the last page."""
    wanted = TrainingFilter(object_, status, base, lora, dataset, parse_time(created_after))
    jobs, position = await runtime.trainings.page(caller, wanted, decode_cursor(cursor), limit)
    return {
        "data": [present_training(job, base_url=base_url) for job in jobs],
        "next_cursor": encode_cursor(position) if position else None,
    }


@router.get("/{job_id}")
async def get_training(job_id: str, runtime: Runtime, caller: Trainer, base_url: BaseUrl) -> dict[str, Any]:
    """The training as it stands."""
    return present_training(await load_own_job(runtime, caller, job_id, "training"), base_url=base_url)


@router.post("/{job_id}/cancel")
async def cancel_training(job_id: str, runtime: Runtime, caller: Trainer, base_url: BaseUrl) -> dict[str, Any]:
    """Stop it within seconds; its last checkpoint stays, to go on from."""
    await load_own_job(runtime, caller, job_id, "training")
    await runtime.store.cancel(job_id)
    return present_training(await load_own_job(runtime, caller, job_id, "training"), base_url=base_url)


@router.post("/{job_id}/resume", status_code=202, response_class=JSONResponse)
async def resume_training(job_id: str, runtime: Runtime, caller: Trainer, base_url: BaseUrl) -> JSONResponse:
    """Go on from the newest checkpoint of a training that has ended, as a new job with the same settings and webhook."""
    earlier = await load_own_job(runtime, caller, job_id, "training")
    if earlier.spec.workflow != TRAINING:
        hint = "Ask for it again: what has a caption is left alone."
        raise Conflict(f"{job_id} is no training.", code="not_resumable", hint=hint, details={"object": earlier.spec.workflow})
    if not earlier.is_terminal:
        raise Conflict(f"{job_id} is {earlier.status}.", code="job_not_ended", hint="Cancel it first.", details={"status": earlier.status})
    asked = {name: value for name, value in earlier.spec.parameters.items() if name in TrainingRequest.model_fields}
    request = TrainingRequest.model_validate({**asked, "base": earlier.spec.base_model, "resume_from": job_id})
    webhook = await runtime.deliveries.webhook_of(earlier)
    return _accepted(await runtime.trainings.admit(request, caller, webhook=webhook), base_url)


@router.delete("/{job_id}")
async def delete_training(job_id: str, runtime: Runtime, caller: Trainer) -> dict[str, Any]:
    """Forget a training that has ended: its record and events. The LoRA it published stays."""
    job = await load_own_job(runtime, caller, job_id, "training")
    if not job.is_terminal:
        raise Conflict(f"{job.id} is {job.status}.", code="job_not_ended", hint="Cancel it first.", details={"status": job.status})
    await runtime.store.delete(job_id)
    return {"id": job_id, "object": "training.deleted"}
