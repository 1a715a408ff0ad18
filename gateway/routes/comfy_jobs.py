"""`/api/v2/jobs`: the Comfy API v2, for its official clients. The same jobs as `/v1/generations`, in its words."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from gateway.dialects.comfy_v2 import ComfyStream, require_label_filters, require_labels
from gateway.edge.bodies import ShallowBody, read_idempotency_key
from gateway.edge.paging import Page, encode_cursor, look_through
from gateway.edge.streams import EventStream
from gateway.errors import NotFound, RedisUnavailable
from gateway.jobs.events import Throttle, newest_event_id
from gateway.jobs.model import Job, JobStatus
from gateway.raw_admission import RawWish
from gateway.routes.deps import Comfy, CurrentCaller, IdempotencyHeader, Once, OnceRoute, Runtime, load_own_job
from gateway.runtime import Runtime as RuntimeState

router = APIRouter(prefix="/api/v2", tags=["comfy api v2"], route_class=OnceRoute)


class ExtraData(BaseModel):
    """A key for paid nodes. None of them may be in a graph here, so it is neither kept nor passed on."""

    model_config = ConfigDict(extra="forbid")

    api_key_comfy_org: SecretStr | None = None


class JobSubmission(ShallowBody):
    model_config = ConfigDict(extra="forbid")

    workflow: Any = Field(None, description="The graph in API format.", json_schema_extra={"type": "object"})
    extra_data: ExtraData | None = None
    metadata: Any = Field(None, description="Labels: at most 16 texts by name.", json_schema_extra={"type": "object"})


@router.get("/health")
async def comfy_health() -> dict[str, str]:
    """The process answers."""
    return {"status": "healthy"}


@router.post("/jobs", status_code=201, response_class=JSONResponse)
async def submit_job(
    submission: JobSubmission, runtime: Runtime, caller: CurrentCaller, comfy: Comfy, idempotency_key: IdempotencyHeader = None
) -> Response:
    """Queue a graph of one's own: checked against the node classes that are allowed here, its files choices or assets."""
    labels = require_labels(submission.metadata)
    key = read_idempotency_key(caller, idempotency_key, "comfy-v2", [submission.workflow, labels])
    if key is not None and (replay := await runtime.store.find_replay(key)) is not None:
        return await _replay(runtime, comfy, *replay)
    job, replayed = await runtime.raw.admit(RawWish(submission.workflow, labels), caller, key)
    if replayed and key is not None and (replay := await runtime.store.find_replay(key)) is not None:
        # A twin that came at the same time was first.
        return await _replay(runtime, comfy, *replay)
    answer = JSONResponse(comfy.job(job), 201)
    if key is not None:
        await runtime.store.record_answer(key, bytes(answer.body))
    return answer


async def _replay(runtime: RuntimeState, comfy: Comfy, job_id: str, recorded: bytes | None) -> Response:
    """The first request's answer. One that died before it could answer is answered for, with the job as it stands."""
    headers = {"Idempotency-Replayed": "true"}
    if recorded is not None:
        return JSONResponse(json.loads(recorded), 201, headers=headers)
    job = await runtime.store.load(job_id)
    if job is None:
        raise NotFound(f"There is no job {job_id!r} any more.", code="job_not_found")
    return JSONResponse(comfy.job(job), 201, headers=headers)


async def _read_filters(request: Request) -> dict[str, str]:
    return require_label_filters(request.query_params.multi_items())


@router.get("/jobs")
async def list_jobs(
    runtime: Runtime,
    caller: CurrentCaller,
    comfy: Comfy,
    labels: Annotated[dict[str, str], Depends(_read_filters)],
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
    cursor: str | None = None,
) -> dict[str, Any]:
    """The caller's jobs, newest first; `metadata[name]=value` keeps those with that label. No `next_cursor`: the last page."""
    found, last = await look_through(
        Page(limit, cursor),
        partial(runtime.store.ids_before, caller.id),
        runtime.store.load_many,
        lambda job: job.spec.kind == "generation" and labels.items() <= job.spec.metadata.items(),
    )
    return {"jobs": [comfy.list_item(job) for job in found], **({"next_cursor": encode_cursor(last)} if last else {})}


@router.get("/jobs/{job_id}")
async def get_job(job_id: str, runtime: Runtime, caller: CurrentCaller, comfy: Comfy) -> dict[str, Any]:
    """The job as it stands. URLs are signed anew at each read."""
    job = await load_own_job(runtime, caller, job_id)
    return comfy.job(job, await _position(runtime, job))


async def _position(runtime: RuntimeState, job: Job) -> int | None:
    return await runtime.store.position(job.id) if job.status is JobStatus.QUEUED else None


@router.get("/jobs/{job_id}/workflow")
async def get_job_workflow(job_id: str, runtime: Runtime, caller: CurrentCaller) -> dict[str, Any]:
    """The graph that ran, in API format."""
    await load_own_job(runtime, caller, job_id)
    graph = await runtime.store.graph(job_id)
    if graph is None:
        raise NotFound(f"The graph of {job_id!r} is no longer kept.", code="job_not_found")
    return {"workflow": json.loads(graph), "format": "api"}


@router.post("/jobs/{job_id}/cancel", dependencies=[Depends(Once())])
async def cancel_job(job_id: str, runtime: Runtime, caller: CurrentCaller, comfy: Comfy) -> dict[str, Any]:
    """Stop it: gone at once while it waits, `canceling` while it runs, unchanged when it has ended."""
    await load_own_job(runtime, caller, job_id)
    await runtime.store.cancel(job_id)
    return comfy.job(await load_own_job(runtime, caller, job_id))


@router.get("/jobs/{job_id}/events", response_class=EventStream)
async def stream_job_events(job_id: str, runtime: Runtime, caller: CurrentCaller, comfy: Comfy) -> EventStream:
    """The job as it stands, then what happens to it, with previews; ends after the terminal status. No ids: come back and read anew."""
    # What is written between the two reads is told twice, and nothing is told never.
    after = await newest_event_id(runtime.redis, job_id)
    job = await load_own_job(runtime, caller, job_id)
    stream = ComfyStream(comfy, job)
    return EventStream(_stream(runtime, job_id, stream, stream.open(job, await _position(runtime, job)), after))


async def _stream(runtime: RuntimeState, job_id: str, stream: ComfyStream, snapshot: bytes, after: str) -> AsyncGenerator[bytes, None]:
    runtime.metrics.streams.inc()
    try:
        yield snapshot
        if stream.has_ended():
            return
        idle_s = runtime.settings.heartbeat_s
        batches = runtime.feed.follow_batches(job_id, after, previews=True, idle_s=idle_s, throttle=Throttle())
        async with aclosing(batches):
            async for batch in batches:
                if not batch:
                    is_there, news = await _look(runtime, job_id, stream)
                    yield news or b": still here\n\n"
                    if not is_there:
                        return
                elif told := b"".join(map(stream.translate, batch)):
                    yield told
                if stream.has_ended():
                    return
    finally:
        runtime.metrics.streams.dec()


async def _look(runtime: RuntimeState, job_id: str, stream: ComfyStream) -> tuple[bool, bytes]:
    """Whether the job is still there, and its place in line when that is news. While Redis is away it is as it was."""
    try:
        job = await runtime.store.load(job_id)
        is_waiting = job is not None and job.status is JobStatus.QUEUED
        return job is not None, stream.status(JobStatus.QUEUED, await runtime.store.position(job_id)) if is_waiting else b""
    except RedisUnavailable:
        return True, b""
