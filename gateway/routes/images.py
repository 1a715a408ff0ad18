"""`/v1/images`: OpenAI's image routes, for its clients. The jobs behind them are generations like any other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import IO as File
from typing import Any, cast

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from gateway.admission import Wish
from gateway.auth import Caller
from gateway.dialects.errors import describe_openai
from gateway.dialects.openai_images import (
    ImageEvents,
    ImageRequest,
    frame_error,
    present_images,
    read_form_request,
    read_metadata,
    read_model,
    read_parameters,
    require_success,
)
from gateway.edge.bodies import read_idempotency_key
from gateway.edge.multipart import Form, read_form
from gateway.edge.streams import EventStream
from gateway.errors import FluxgateError, Unprocessable
from gateway.inputs.asset_records import Asset
from gateway.inputs.assets import BYTES_TYPE
from gateway.jobs.model import TERMINAL, Event, EventKind, Job, Progress
from gateway.routes.deps import CurrentCaller, IdempotencyHeader, Runtime
from gateway.runtime import Runtime as RuntimeState
from gateway.waiting import wait_until_ended

router = APIRouter(prefix="/v1/images", tags=["openai images"])

# What the clients themselves wait for.
HOLD_S = 600.0
# The workflows of edits that name none.
EDIT, EDIT_WITH_MASK = "flux-img2img", "flux-fill"
MAX_FILES, MAX_FIELD_BYTES = 17, 131_072
_PICTURE = {"type": "string", "format": "binary"}
_EDIT_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image", "prompt"],
                    "properties": {"image": _PICTURE, "mask": _PICTURE, **ImageRequest.model_json_schema()["properties"]},
                }
            }
        },
    }
}

_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


@router.post("/generations", response_class=JSONResponse, responses=_STREAMED)
async def create_images(
    request: ImageRequest, runtime: Runtime, caller: CurrentCaller, idempotency_key: IdempotencyHeader = None
) -> Response:
    """Pictures from a text, when they are done. The job goes on when the client does not wait: `GET /v1/generations` lists it."""
    job, replayed = await _admit(request, runtime, caller, idempotency_key, {})
    return _mark(await _answer("image_generation", request, runtime, job), replayed)


@router.post("/edits", response_class=JSONResponse, responses=_STREAMED, openapi_extra=_EDIT_BODY)
async def edit_image(request: Request, runtime: Runtime, caller: CurrentCaller, idempotency_key: IdempotencyHeader = None) -> Response:
    """A picture made anew from another, as a whole or where a mask is transparent."""
    form = await read_form(
        request.headers.get("content-type", ""),
        request.stream(),
        max_files=MAX_FILES,
        max_field_bytes=MAX_FIELD_BYTES,
        file_fields=("image", "image[]", "mask"),
    )
    try:
        wanted = read_form_request(form.fields, runtime.catalog)
        pictures = await _keep(form, runtime, caller)
    finally:
        form.close()
    async with runtime.assets.unless_refused(caller.id, pictures.values()):
        job, replayed = await _admit(wanted, runtime, caller, idempotency_key, pictures)
    return _mark(await _answer("image_edit", wanted, runtime, job), replayed)


async def _keep(form: Form, runtime: RuntimeState, caller: Caller) -> dict[str, Asset]:
    """The pictures of an edit as uploads, by parameter."""
    parts = {part.field.removesuffix("[]"): part for part in form.files}
    if "image" not in parts or len(parts) < len(form.files):
        details = {"parameter": "image", "value": len(form.files), "allowed": "one picture, and one mask"}
        raise Unprocessable("An edit is of one picture.", code="invalid_parameter", details=details)
    return {
        name: await runtime.assets.put_file(caller.id, cast(File[bytes], form.open(part)), BYTES_TYPE, is_listed=False)
        for name, part in parts.items()
    }


async def _admit(
    request: ImageRequest, runtime: RuntimeState, caller: Caller, idempotency_key: str | None, pictures: dict[str, Asset]
) -> tuple[Job, bool]:
    """The job, and whether it is that of an earlier request with the same key."""
    default = None if not pictures else EDIT_WITH_MASK if "mask" in pictures else EDIT
    await runtime.workflow_edits.learn_of((request.model or "").split("+")[0])
    model = read_model(request.model, runtime.catalog, runtime.admission.workflow(default))
    parameters = read_parameters(request, model, runtime.settings) | {name: asset.id for name, asset in pictures.items()}
    wish = Wish(model.workflow.name, parameters, metadata=read_metadata(request))
    body = [request, sorted((name, asset.sha256) for name, asset in pictures.items())]
    key = read_idempotency_key(caller, idempotency_key, "openai-images", body)
    return await runtime.admission.admit(wish, caller, key)


def _mark(answer: Response, replayed: bool) -> Response:
    if replayed:
        answer.headers["Idempotency-Replayed"] = "true"
    return answer


async def _answer(family: str, request: ImageRequest, runtime: RuntimeState, job: Job) -> Response:
    if request.stream:
        return EventStream(_stream(ImageEvents(family, request), runtime, job))
    ended = require_success(await wait_until_ended(runtime.store, runtime.feed, job, HOLD_S))
    bodies = {} if request.response_format == "url" else await _read_pictures(runtime, ended)
    return JSONResponse(present_images(request, ended, bodies, runtime.storage), headers={"X-Generation-Id": job.id})


async def _read_pictures(runtime: RuntimeState, job: Job) -> dict[int, bytes]:
    bodies = await asyncio.gather(*(runtime.storage.get(output.key) for output in job.outputs))
    return {output.index: body for output, body in zip(job.outputs, bodies, strict=True)}


async def _stream(events: ImageEvents, runtime: RuntimeState, job: Job) -> AsyncGenerator[bytes, None]:
    runtime.metrics.streams.inc()
    try:
        ended = job if job.is_terminal else None
        batches = runtime.feed.follow_batches(job.id, previews=True, idle_s=runtime.settings.heartbeat_s)
        async with aclosing(batches):
            # Without a further batch this process goes away; the job does not.
            while ended is None and (batch := await anext(batches, None)) is not None:
                ended = next((_read_job(event) for event in batch if _is_end(event)), None)
                if not batch:
                    yield b": still here\n\n"
                    if await runtime.store.load(job.id) is None:
                        break
                elif told := b"".join(_translate(events, job, event) for event in batch):
                    yield told
        yield await _conclude(events, runtime, ended or job)
    finally:
        runtime.metrics.streams.dec()


def _is_end(event: Event) -> bool:
    return event.kind == EventKind.STATUS and event.status in TERMINAL


def _read_job(event: Event) -> Job:
    return Job.model_validate_json(event.data)


def _translate(events: ImageEvents, job: Job, event: Event) -> bytes:
    if event.kind == EventKind.PROGRESS:
        events.note_progress(Progress.model_validate_json(event.data).value)
    if event.kind != EventKind.PREVIEW:
        return b""
    parameters = job.spec.parameters
    return events.partial(event.data, job.spec.created_ms, f"{parameters.get('width')}x{parameters.get('height')}")


async def _conclude(events: ImageEvents, runtime: RuntimeState, job: Job) -> bytes:
    """The pictures, or why there are none."""
    try:
        bodies = await _read_pictures(runtime, require_success(job))
    except FluxgateError as error:
        return frame_error(describe_openai(error))
    ended_ms = job.finished_ms or job.spec.created_ms
    return b"".join(events.completed(output, bodies[output.index], ended_ms) for output in job.outputs)
