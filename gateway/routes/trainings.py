"""`/v1/trainings`: LoRA trainings as jobs. Their events are in the events file, their data sets have routes of their own."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from fastapi.responses import JSONResponse

from gateway.datasets.store import absent
from gateway.edge.bodies import read_idempotency_key
from gateway.edge.paging import parse_time, present_page
from gateway.errors import Conflict
from gateway.jobs.events import read_events
from gateway.jobs.model import EventKind, Job, JobStatus
from gateway.jobs.records import IdempotencyKey
from gateway.jobs.trainings import TRAINING
from gateway.presentation import present_training
from gateway.routes.deps import BaseUrl, IdempotencyHeader, Once, OnceRoute, PageQuery, Runtime, Trainer, load_own_job
from gateway.runtime import Runtime as RuntimeState
from gateway.trainings.captioning import CaptionRequest
from gateway.trainings.requests import TrainingFilter, TrainingRequest

router = APIRouter(prefix="/v1", tags=["trainings"], route_class=OnceRoute)


@router.post("/trainings", status_code=202, response_class=JSONResponse)
async def create_training(
    request: TrainingRequest, runtime: Runtime, caller: Trainer, base_url: BaseUrl, idempotency_key: IdempotencyHeader = None
) -> JSONResponse:
    """Train a LoRA. What would fail late is refused now; `urls.events` shows stages, loss and samples."""
    key = read_idempotency_key(caller, idempotency_key, "training", request)
    if (replay := await _find_replay(runtime, key)) is not None:
        return replay
    webhook = await runtime.webhooks.accept(request.webhook, base_url)
    return await _accept(runtime, await runtime.trainings.admit(request, caller, key, webhook), base_url, key)


@router.post("/datasets/{dataset_id}/captions", status_code=202, response_class=JSONResponse)
async def caption_dataset(
    dataset_id: str,
    runtime: Runtime,
    caller: Trainer,
    base_url: BaseUrl,
    request: CaptionRequest | None = None,
    idempotency_key: IdempotencyHeader = None,
) -> JSONResponse:
    """Caption the pictures that have no caption of their own, as a job. `urls.events` shows each as it is written."""
    asked = request or CaptionRequest.model_validate({})
    key = read_idempotency_key(caller, idempotency_key, f"captioning {dataset_id}", asked)
    if (replay := await _find_replay(runtime, key)) is not None:
        return replay
    dataset = await runtime.datasets.load(dataset_id)
    if dataset is None or dataset.caller != caller.id:
        raise absent(dataset_id)
    return await _accept(runtime, await runtime.captionings.admit(dataset, asked, caller, key), base_url, key)


async def _find_replay(runtime: RuntimeState, key: IdempotencyKey | None) -> JSONResponse | None:
    """The first request's answer. What it was checked against may have changed since, so this comes before every check."""
    known = await runtime.store.find_replay(key) if key is not None else None
    if known is None or known[1] is None:
        # One that died before it answered is answered for by the job it made.
        return None
    return _answer(json.loads(known[1]), replayed=True)


async def _accept(runtime: RuntimeState, job: Job, base_url: str, key: IdempotencyKey | None = None) -> JSONResponse:
    body = present_training(job, base_url=base_url)
    known = await runtime.store.record_answer(key, json.dumps(body).encode()) if key is not None else None
    return _answer(body) if known is None else _answer(json.loads(known), replayed=True)


def _answer(body: dict[str, Any], *, replayed: bool = False) -> JSONResponse:
    headers = {"Location": body["urls"]["self"], **({"Idempotency-Replayed": "true"} if replayed else {})}
    return JSONResponse(body, 202, headers=headers)


@router.get("/trainings")
async def list_trainings(
    runtime: Runtime,
    caller: Trainer,
    base_url: BaseUrl,
    page: PageQuery,
    object_: Annotated[Literal["training", "captioning", "lora_import"], Query(alias="object")] = "training",
    status: JobStatus | None = None,
    base: str | None = None,
    lora: Annotated[str | None, Query(description="Name of the LoRA that was asked for.")] = None,
    dataset: str | None = None,
    created_after: Annotated[str | None, Query(description="RFC 3339 time")] = None,
) -> dict[str, Any]:
    """The caller's trainings, newest first. `next_cursor` is null on the last page; one that is filtered may hold fewer, or none."""
    wanted = TrainingFilter(object_, status, base, lora, dataset, parse_time(created_after))
    jobs, position = await runtime.trainings.page(caller, wanted, page)
    return present_page((present_training(job, base_url=base_url) for job in jobs), position)


@router.get("/trainings/{job_id}")
async def get_training(job_id: str, runtime: Runtime, caller: Trainer, base_url: BaseUrl) -> dict[str, Any]:
    """The training as it stands."""
    return present_training(await load_own_job(runtime, caller, job_id, "training"), base_url=base_url)


@router.post("/trainings/{job_id}/cancel", dependencies=[Depends(Once())])
async def cancel_training(job_id: str, runtime: Runtime, caller: Trainer, base_url: BaseUrl) -> dict[str, Any]:
    """Stop it within seconds; its last checkpoint stays, to go on from."""
    await load_own_job(runtime, caller, job_id, "training")
    await runtime.store.cancel(job_id)
    return present_training(await load_own_job(runtime, caller, job_id, "training"), base_url=base_url)


@router.post("/trainings/{job_id}/resume", status_code=202, response_class=JSONResponse)
async def resume_training(
    job_id: str, runtime: Runtime, caller: Trainer, base_url: BaseUrl, idempotency_key: IdempotencyHeader = None
) -> JSONResponse:
    """Go on from the newest checkpoint of a training that has ended, as a new job with the same settings and webhook."""
    key = read_idempotency_key(caller, idempotency_key, f"resume {job_id}", None)
    if (replay := await _find_replay(runtime, key)) is not None:
        return replay
    earlier = await load_own_job(runtime, caller, job_id, "training")
    if earlier.spec.workflow != TRAINING:
        hint = "Ask for it again: what has a caption is left alone."
        raise Conflict(f"{job_id} is no training.", code="not_resumable", hint=hint, details={"object": earlier.spec.workflow})
    if not earlier.is_terminal:
        raise Conflict(f"{job_id} is {earlier.status}.", code="job_not_ended", hint="Cancel it first.", details={"status": earlier.status})
    asked = {name: value for name, value in earlier.spec.parameters.items() if name in TrainingRequest.model_fields}
    request = TrainingRequest.model_validate({**asked, "base": earlier.spec.base_model, "resume_from": job_id})
    webhook = await runtime.deliveries.webhook_of(earlier)
    return await _accept(runtime, await runtime.trainings.admit(request, caller, key, webhook), base_url, key)


@router.delete("/trainings/{job_id}")
async def delete_training(job_id: str, runtime: Runtime, caller: Trainer) -> dict[str, Any]:
    """Forget a training that has ended: its record, events and samples. The LoRA it published stays."""
    job = await load_own_job(runtime, caller, job_id, "training")
    if not job.is_terminal:
        raise Conflict(f"{job.id} is {job.status}.", code="job_not_ended", hint="Cancel it first.", details={"status": job.status})
    samples = await _list_samples(runtime, job_id)
    await runtime.store.delete(job_id)
    await runtime.storage.delete(samples)
    return {"id": job_id, "object": "training.deleted"}


async def _list_samples(runtime: RuntimeState, job_id: str) -> list[str]:
    """Where its sample pictures lie in the bucket, as its events say."""
    keys, after = list[str](), "0"
    while events := await read_events(runtime.redis, job_id, after):
        keys += [str(json.loads(event.data)["key"]) for event in events if event.kind == EventKind.SAMPLE]
        after = events[-1].id
    return keys
