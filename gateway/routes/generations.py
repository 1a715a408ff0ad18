"""`/v1/generations`: make, read, list, cancel, delete. Events have a file of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, get_type_hints

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field

from comfy_workflows.workflow import Workflow
from gateway.admission import Wish
from gateway.auth import Caller
from gateway.edge.bodies import Metadata, ShallowBody, read_idempotency_key, read_unless_wrong
from gateway.edge.paging import look_through, parse_time, present_page
from gateway.errors import BadRequest, Conflict, NotFound
from gateway.jobs.model import Job, JobStatus, Priority, Webhook
from gateway.obstacles import find_obstacle
from gateway.presentation import present_job, write_json
from gateway.routes.deps import (
    BaseUrl,
    CurrentCaller,
    IdempotencyHeader,
    Once,
    OnceRoute,
    PageQuery,
    RequireScope,
    Runtime,
    load_own_job,
    read_base_url,
    read_caller,
    read_runtime,
)
from gateway.runtime import Runtime as RuntimeState
from gateway.waiting import wait_until_ended
from gateway.webhooks import WebhookField

router = APIRouter(prefix="/v1", tags=["generations"], route_class=OnceRoute)
# Comes after the typed routes of the workflows that were there at the start.
further = APIRouter(prefix="/v1", tags=["generations"])

MAX_WAIT_S = 60


class GatewayFields(ShallowBody):
    """The part of a request that is the gateway's own; everything else is a parameter of the workflow."""

    model_config = ConfigDict(extra="allow")

    metadata: Metadata = Field(default_factory=dict)
    priority: Priority = Field("normal", description="Order among your own and others' waiting jobs.")
    cache: Literal["use", "refresh", "off"] = Field("use", description="Whether an identical earlier job may answer.")
    webhook: WebhookField = None
    timeout_s: float | None = Field(None, gt=0, allow_inf_nan=False, description="Seconds the job may take once an instance has it.")


class GenerationRequest(GatewayFields):
    """A request to any workflow. Its parameters stand beside these fields; `GET /v1/workflows/{name}` lists them."""

    workflow: str | None = Field(None, description="Name of a workflow; the deployment's default when absent.")


@dataclass(frozen=True, slots=True)
class _Door:
    """The headers that change how a creation is answered."""

    prefer: str | None
    idempotency_key: str | None


async def _door(
    prefer: Annotated[
        str | None, Header(alias="Prefer", description="`wait=N` holds the answer up to N (60) seconds until the job has ended.")
    ] = None,
    idempotency_key: IdempotencyHeader = None,
) -> _Door:
    return _Door(prefer, idempotency_key)


Door = Annotated[_Door, Depends(_door)]


def _read_wish(request: GatewayFields, workflow: str | None, webhook: Webhook | None) -> Wish:
    """The gateway's fields, and beside them the workflow's parameters."""
    return Wish(workflow, dict(request.model_extra or {}), request.priority, request.metadata, request.cache, request.timeout_s, webhook)


def _parse_wait(prefer: str | None) -> float:
    """Seconds of `Prefer: wait=N`, 0 when absent; other preferences are ignored, as RFC 7240 says."""
    for part in (prefer or "").replace(";", ",").split(","):
        name, _, value = part.strip().partition("=")
        if name.lower() == "wait":
            # isdigit() is true for "²" as well, and Python reads no more than 4300 digits.
            if not re.fullmatch(r"[0-9]{1,9}", value.strip()):
                raise BadRequest(
                    "Prefer: wait needs whole seconds.", details={"parameter": "Prefer", "value": part, "allowed": "wait=0 to 60"}
                )
            return min(int(value), MAX_WAIT_S)
    return 0


async def _create(
    request: GatewayFields, workflow: str | None, door: _Door, runtime: RuntimeState, caller: Caller, base_url: str
) -> Response:
    wait_s = _parse_wait(door.prefer)
    key = read_idempotency_key(caller, door.idempotency_key, workflow or "", request)
    if key is not None and (replay := await runtime.store.find_replay(key)) is not None:
        return await _replay(runtime, base_url, *replay)
    wish = _read_wish(request, workflow, await runtime.webhooks.accept(request.webhook, base_url))
    job, replayed = await runtime.admission.admit(wish, caller, key)
    if replayed and key is not None and (replay := await runtime.store.find_replay(key)) is not None:
        # A twin that came at the same time was first.
        return await _replay(runtime, base_url, *replay)
    if wait_s and not job.is_terminal:
        job = await wait_until_ended(runtime.store, runtime.feed, job, wait_s)
    answer = _job_answer(job, runtime, base_url, applied_wait_s=wait_s)
    if key is not None:
        await runtime.store.record_answer(key, bytes(answer.body))
    return answer


def _job_answer(job: Job, runtime: RuntimeState, base_url: str, *, applied_wait_s: float = 0) -> Response:
    """202 with the job, or 200 when it has ended."""
    body = present_job(job, base_url=base_url, storage=runtime.storage)
    headers = {"Location": body["urls"]["self"]}
    if applied_wait_s:
        headers["Preference-Applied"] = f"wait={applied_wait_s:g}"
    return Response(write_json(body), 200 if job.is_terminal else 202, headers=headers, media_type="application/json")


async def _replay(runtime: RuntimeState, base_url: str, job_id: str, recorded: bytes | None) -> Response:
    """The first request's answer. One that died before it could answer is answered for, with the job as it stands."""
    if recorded is not None:
        body = json.loads(recorded)
        answer: Response = JSONResponse(body, 200 if body["finished_at"] else 202, headers={"Location": body["urls"]["self"]})
    else:
        job = await runtime.store.load(job_id)
        if job is None:
            raise NotFound(f"There is no generation {job_id!r} any more.", code="job_not_found")
        answer = _job_answer(job, runtime, base_url)
    answer.headers["Idempotency-Replayed"] = "true"
    return answer


class CreationRoute(APIRoute):
    """Reads the request that every job begins with itself, while nothing about it is unusual; what is, the framework reads and refuses.

    Its solver of dependencies takes a tenth of all that a job costs this process.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        usual, endpoint = super().get_route_handler(), self.endpoint
        shape: type[GatewayFields] = get_type_hints(endpoint)["request"]

        async def handle(request: Request) -> Response:
            asked = await read_unless_wrong(shape, request)
            if asked is None:
                return await usual(request)
            runtime, caller = await read_runtime(request), await _GENERATE(await read_caller(request))
            door = _Door(request.headers.get("prefer"), request.headers.get("idempotency-key"))
            answer: Response = await endpoint(asked, door, runtime, caller, await read_base_url(request))
            return answer

        return handle


_GENERATE = RequireScope("generate")


_CREATED: dict[int | str, dict[str, Any]] = {200: {"description": "Finished within `Prefer: wait`, or answered from the cache"}}


creation = APIRouter(prefix="/v1", tags=["generations"], route_class=CreationRoute)


@creation.post("/generations", status_code=202, responses=_CREATED, response_class=JSONResponse)
async def create_generation(request: GenerationRequest, door: Door, runtime: Runtime, caller: CurrentCaller, base_url: BaseUrl) -> Response:
    """Queue a picture. Answers at once; `urls.events` shows it being made."""
    return await _create(request, request.workflow, door, runtime, caller, base_url)


@router.post("/generations/preview", response_class=JSONResponse)
async def preview_generation(request: GenerationRequest, runtime: Runtime, caller: CurrentCaller) -> JSONResponse:
    """What the same request would do as a generation: parameters, graph, cache, instance, place in line, seconds, cost. Runs nothing."""
    return JSONResponse(await runtime.foresight.preview(_read_wish(request, request.workflow, None), caller))


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
        responses=_CREATED,
        response_class=JSONResponse,
    )
    async def create(request: GatewayFields, door: Door, runtime: Runtime, caller: CurrentCaller, base_url: BaseUrl) -> Response:
        return await _create(request, workflow.name, door, runtime, caller, base_url)


@further.post("/workflows/{name}/generations", status_code=202, responses=_CREATED, response_class=JSONResponse)
async def create_generation_of_workflow(
    name: str, request: GatewayFields, door: Door, runtime: Runtime, caller: CurrentCaller, base_url: BaseUrl
) -> Response:
    """The same for a workflow that was put in place meanwhile; `GET /v1/workflows/{name}` has the schema."""
    return await _create(request, name, door, runtime, caller, base_url)


@router.get("/generations")
async def list_generations(
    runtime: Runtime,
    caller: CurrentCaller,
    base_url: BaseUrl,
    page: PageQuery,
    status: JobStatus | None = None,
    workflow: str | None = None,
    lora: str | None = None,
    batch: str | None = None,
    created_after: Annotated[str | None, Query(description="RFC 3339 time")] = None,
) -> dict[str, Any]:
    """The caller's jobs, newest first. `next_cursor` is null on the last page; one that is filtered may hold few jobs, or none."""
    found, last = await look_through(
        page,
        partial(runtime.store.ids_before, caller.id),
        runtime.store.load_many,
        lambda job: _matches(job, status, workflow, lora, batch),
        parse_time(created_after),
    )
    return present_page((present_job(job, base_url=base_url, storage=runtime.storage) for job in found), last)


def _matches(job: Job, status: JobStatus | None, workflow: str | None, lora: str | None, batch: str | None) -> bool:
    return (
        (status is None or job.status is status)
        and (workflow is None or job.spec.workflow == workflow)
        and (batch is None or job.spec.batch == batch)
        and (lora is None or any(use.name == lora for use in job.spec.loras))
    )


@router.get("/generations/{job_id}")
async def get_generation(job_id: str, runtime: Runtime, caller: CurrentCaller, base_url: BaseUrl) -> dict[str, Any]:
    """The job as it stands. Picture URLs are signed anew at each read."""
    job = await load_own_job(runtime, caller, job_id)
    position = await runtime.store.position(job_id) if job.status is JobStatus.QUEUED else None
    obstacle = await find_obstacle(job, runtime.registry) if job.status is JobStatus.QUEUED else None
    eta_s = None if job.is_terminal or obstacle else await runtime.foresight.eta_s(job, position)
    waiting = obstacle._asdict() if obstacle else None
    return present_job(job, base_url=base_url, storage=runtime.storage, queue_position=position, eta_s=eta_s, waiting_for=waiting)


@router.get("/generations/{job_id}/workflow")
async def get_generation_workflow(job_id: str, runtime: Runtime, caller: CurrentCaller) -> Response:
    """The exact graph that was submitted; drop it on ComfyUI's editor to open it."""
    job = await load_own_job(runtime, caller, job_id)
    graph = await runtime.store.graph(job_id)
    if graph is None:
        raise NotFound(f"The graph of {job_id!r} is no longer kept.", code="job_not_found")
    headers = {"Content-Disposition": f'inline; filename="{job.id}.json"'}
    return Response(graph, media_type="application/json", headers=headers)


@router.post("/generations/{job_id}/cancel", dependencies=[Depends(Once())])
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
