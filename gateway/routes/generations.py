"""`/v1/generations`: make, read, list, cancel, delete. Events have a file of their own."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import time
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Response
from pydantic import BaseModel, ConfigDict, Field, field_validator

from comfy_workflows.workflow import Workflow
from gateway.admission import Wish
from gateway.auth import Caller
from gateway.errors import BadRequest, Conflict, NotFound
from gateway.jobs.model import Job, JobStatus, Priority
from gateway.presentation import present_job
from gateway.routes.deps import BaseUrl, CurrentCaller, Runtime, load_own_job
from gateway.runtime import Runtime as RuntimeState

router = APIRouter(prefix="/v1", tags=["generations"])

MAX_WAIT_S = 60
MAX_METADATA_BYTES = 16_384


class GatewayFields(BaseModel):
    """The part of a request that is the gateway's own; everything else is a parameter of the workflow."""

    model_config = ConfigDict(extra="allow")

    metadata: dict[str, Any] = Field(default_factory=dict, description="Yours; returned as it is.")
    priority: Priority = Field("normal", description="Order among your own and others' waiting jobs.")

    @field_validator("metadata")
    @classmethod
    def _fit(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            size = len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
        except (UnicodeEncodeError, ValueError, RecursionError):
            raise ValueError("metadata must be plain JSON: no lone surrogates, NaN or infinity") from None
        if size > MAX_METADATA_BYTES:
            raise ValueError(f"metadata is {size} bytes; at most {MAX_METADATA_BYTES} are allowed")
        return value


class GenerationRequest(GatewayFields):
    """A request to any workflow. Its parameters stand beside these fields; `GET /v1/workflows/{name}` lists them."""

    workflow: str | None = Field(None, description="Name of a workflow; the deployment's default when absent.")


def _own_fields(request: GatewayFields) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the gateway's fields, the workflow's parameters)"""
    own = {name: getattr(request, name) for name in type(request).model_fields}
    return own, dict(request.model_extra or {})


def _parse_wait(prefer: str | None) -> float:
    """Seconds of `Prefer: wait=N`, 0 when absent; other preferences are ignored, as RFC 7240 says."""
    for part in (prefer or "").replace(";", ",").split(","):
        name, _, value = part.strip().partition("=")
        if name.lower() == "wait":
            if not value.strip().isdigit():
                raise BadRequest(
                    "Prefer: wait needs whole seconds.", details={"parameter": "Prefer", "value": part, "allowed": "wait=0 to 60"}
                )
            return min(int(value), MAX_WAIT_S)
    return 0


async def _create(
    runtime: RuntimeState, caller: Caller, base_url: str, wish: Wish, prefer: str | None, response: Response
) -> dict[str, Any]:
    wait_s = _parse_wait(prefer)
    job = await runtime.admission.admit(wish, caller)
    if wait_s:
        job = await _wait_until_ended(runtime, job, wait_s)
        response.headers["Preference-Applied"] = f"wait={wait_s}"
    response.status_code = 200 if job.is_terminal else 202
    body = present_job(job, base_url=base_url, storage=runtime.storage)
    response.headers["Location"] = body["urls"]["self"]
    return body


async def _wait_until_ended(runtime: RuntimeState, job: Job, wait_s: float) -> Job:
    """The job when it is terminal, or as it stands after `wait_s`."""
    deadline = time.monotonic() + wait_s
    try:
        async with asyncio.timeout(wait_s):
            async for event in runtime.feed.follow(job.id, idle_s=5.0):
                if event is None or event.kind == "status":
                    current = Job.model_validate_json(event.data) if event else await runtime.store.load(job.id)
                    if current is None or current.is_terminal:
                        return current or job
                if time.monotonic() > deadline:
                    break
    except TimeoutError:
        pass
    return await runtime.store.load(job.id) or job


@router.post("/generations", status_code=202, responses={200: {"description": "Finished within `Prefer: wait`"}})
async def create_generation(
    request: GenerationRequest,
    runtime: Runtime,
    caller: CurrentCaller,
    base_url: BaseUrl,
    response: Response,
    prefer: Annotated[str | None, Header(description="`wait=N` holds the answer up to N (60) seconds until the job has ended.")] = None,
) -> dict[str, Any]:
    """Queue a picture. Answers at once; `urls.events` shows it being made."""
    own, parameters = _own_fields(request)
    wish = Wish(own["workflow"], parameters, own["priority"], own["metadata"])
    return await _create(runtime, caller, base_url, wish, prefer, response)


def add_workflow_routes(target: APIRouter, workflow: Workflow) -> None:
    """`POST /v1/workflows/{name}/generations` with the workflow's own schema in OpenAPI."""
    schema = workflow.json_schema()
    properties = {**schema.get("properties", {}), **GatewayFields.model_json_schema()["properties"]}
    body = {**schema, "properties": properties, "example": workflow.example}

    @target.post(
        f"/v1/workflows/{workflow.name}/generations",
        status_code=202,
        tags=["generations"],
        summary=f"Queue: {workflow.title}",
        operation_id=f"create_generation_{workflow.name}",
        openapi_extra={"requestBody": {"content": {"application/json": {"schema": body}}, "required": True}},
        responses={200: {"description": "Finished within `Prefer: wait`"}},
    )
    async def create(
        request: GatewayFields,
        runtime: Runtime,
        caller: CurrentCaller,
        base_url: BaseUrl,
        response: Response,
        prefer: Annotated[str | None, Header()] = None,
    ) -> dict[str, Any]:
        own, parameters = _own_fields(request)
        wish = Wish(workflow.name, parameters, own["priority"], own["metadata"])
        return await _create(runtime, caller, base_url, wish, prefer, response)


def _encode_cursor(pair: tuple[int, str]) -> str:
    return base64.urlsafe_b64encode(f"{pair[0]}:{pair[1]}".encode()).decode().rstrip("=")


def _decode_cursor(cursor: str | None) -> tuple[int, str] | None:
    if cursor is None:
        return None
    try:
        created_ms, _, job_id = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii").partition(":")
        return int(created_ms), job_id
    except (ValueError, binascii.Error):
        raise BadRequest("The cursor is not one of ours.", details={"parameter": "cursor", "value": cursor[:100]}) from None


@router.get("/generations")
async def list_generations(
    runtime: Runtime,
    caller: CurrentCaller,
    base_url: BaseUrl,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: str | None = None,
    status: JobStatus | None = None,
    workflow: str | None = None,
    lora: str | None = None,
    created_after: Annotated[str | None, Query(description="RFC 3339 time")] = None,
) -> dict[str, Any]:
    """The caller's jobs, newest first. `next_cursor` is null on the last page."""
    after_ms = _parse_time(created_after)
    position, found = _decode_cursor(cursor), list[Job]()
    while len(found) < limit:
        pairs = await runtime.store.ids_before(caller.id, position, 100)
        if not pairs:
            position = None
            break
        jobs = {job.id: job for job in await runtime.store.load_many(job_id for _, job_id in pairs)}
        for position in pairs:
            job = jobs.get(position[1])
            if after_ms is not None and position[0] <= after_ms:
                return _page(found, None, runtime, base_url)
            if job is not None and _matches(job, status, workflow, lora):
                found.append(job)
                if len(found) == limit:
                    break
    return _page(found, position, runtime, base_url)


def _matches(job: Job, status: JobStatus | None, workflow: str | None, lora: str | None) -> bool:
    return (
        (status is None or job.status is status)
        and (workflow is None or job.spec.workflow == workflow)
        and (lora is None or any(use.name == lora for use in job.spec.loras))
    )


def _page(jobs: list[Job], position: tuple[int, str] | None, runtime: RuntimeState, base_url: str) -> dict[str, Any]:
    return {
        "data": [present_job(job, base_url=base_url, storage=runtime.storage) for job in jobs],
        "next_cursor": _encode_cursor(position) if position else None,
    }


def _parse_time(text: str | None) -> int | None:
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


@router.get("/generations/{job_id}")
async def get_generation(job_id: str, runtime: Runtime, caller: CurrentCaller, base_url: BaseUrl) -> dict[str, Any]:
    """The job as it stands. Picture URLs are signed anew at each read."""
    job = await load_own_job(runtime, caller, job_id)
    position = await runtime.store.position(job_id) if job.status is JobStatus.QUEUED else None
    return present_job(job, base_url=base_url, storage=runtime.storage, queue_position=position)


@router.get("/generations/{job_id}/workflow")
async def get_generation_workflow(job_id: str, runtime: Runtime, caller: CurrentCaller) -> Response:
    """The exact graph that was submitted; drop it on ComfyUI's editor to open it."""
    job = await load_own_job(runtime, caller, job_id)
    graph = await runtime.store.graph(job_id)
    if graph is None:
        raise NotFound(f"The graph of {job_id!r} is no longer kept.", code="job_not_found")
    headers = {"Content-Disposition": f'inline; filename="{job.id}.json"'}
    return Response(graph, media_type="application/json", headers=headers)


@router.post("/generations/{job_id}/cancel")
async def cancel_generation(job_id: str, runtime: Runtime, caller: CurrentCaller, base_url: BaseUrl) -> dict[str, Any]:
    """Stop it: gone at once while it waits, `canceling` while it runs, unchanged when it has ended."""
    await load_own_job(runtime, caller, job_id)
    await runtime.store.cancel(job_id)
    return present_job(await load_own_job(runtime, caller, job_id), base_url=base_url, storage=runtime.storage)


class Deleted(BaseModel):
    id: str
    object: Literal["generation.deleted"] = "generation.deleted"


@router.delete("/generations/{job_id}")
async def delete_generation(job_id: str, runtime: Runtime, caller: CurrentCaller) -> Deleted:
    """Forget a job that has ended: its record, its events and its pictures."""
    job = await load_own_job(runtime, caller, job_id)
    if not job.is_terminal:
        raise Conflict(f"{job_id} is {job.status}.", code="job_not_ended", hint="Cancel it first.", details={"status": job.status})
    await runtime.storage.delete([output.key for output in job.outputs])
    await runtime.store.delete(job_id)
    return Deleted(id=job_id)
