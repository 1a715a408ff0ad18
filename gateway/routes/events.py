"""A job's events as SSE, or page by page: replayed from any point, then live, until the job has ended."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from gateway.edge.streams import EventStream
from gateway.jobs.events import Throttle, next_events, read_events
from gateway.jobs.model import TERMINAL, Event, EventKind, Job
from gateway.presentation import write_event, write_job
from gateway.routes.deps import (
    BaseUrl,
    Place,
    RequireScope,
    Runtime,
    StreamPlace,
    TrainingWatcher,
    Watcher,
    is_gone,
    load_own_job,
    read_base_url,
    read_caller,
    read_runtime,
)
from gateway.runtime import Runtime as RuntimeState

router = APIRouter(prefix="/v1", tags=["events"])

FROM_START = StreamPlace("0", previews=False)


def _frame(kind: str, data: str, event_id: str | None = None) -> bytes:
    head = f"id: {event_id}\n" if event_id else ""
    return f"{head}event: {kind}\ndata: {data}\n\n".encode()


class EventPresenter:
    """Events as frames. `ended` once the terminal status was among them."""

    def __init__(self, runtime: RuntimeState, base_url: str) -> None:
        self._runtime, self._base_url = runtime, base_url
        self.ended = False

    def job(self, job: Job) -> str:
        return write_job(job, base_url=self._base_url, storage=self._runtime.storage)

    def frame(self, event: Event) -> bytes:
        """Made once for all who listen now and see the gateway at the same address."""
        self.ended |= event.kind == EventKind.STATUS and event.status in TERMINAL
        if event.frame is None or event.frame[0] != self._base_url:
            data = write_event(event, base_url=self._base_url, storage=self._runtime.storage)
            event.frame = (self._base_url, _frame(event.kind, data, None if event.kind == EventKind.PREVIEW else event.id))
        return event.frame[1]


async def _stream(runtime: RuntimeState, job: Job, base_url: str, after: str, previews: bool) -> AsyncGenerator[bytes, None]:
    """The job as it stands (without an id: it is no part of the history), then its events after `after`."""
    presenter = EventPresenter(runtime, base_url)
    runtime.metrics.streams.inc()
    try:
        yield _frame(EventKind.STATUS, presenter.job(job))
        if job.is_terminal:
            while events := await read_events(runtime.redis, job.id, after):
                yield b"".join(map(presenter.frame, events))
                after = events[-1].id
            return
        idle_s, throttle, job_id = runtime.settings.heartbeat_s, Throttle(), job.id
        # Its record is of no more use, and the stream may stay open for long.
        del job
        batches = runtime.feed.follow_batches(job_id, after, previews=previews, idle_s=idle_s, throttle=throttle)
        async with aclosing(batches):
            async for batch in batches:
                yield b"".join(map(presenter.frame, batch)) if batch else b": still here\n\n"
                if presenter.ended or (not batch and await is_gone(runtime, job_id)):
                    return
        yield _frame(EventKind.RECONNECT, '{"reason": "this process stops; come back with Last-Event-ID"}')
    finally:
        runtime.metrics.streams.dec()


Wait = Annotated[
    int | None,
    Query(ge=0, le=60, description="Long-poll instead: answer with JSON, at once when there are events, after N seconds if not."),
]


_PAGE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {"schema": {"type": "object"}}}, "description": "The stream, or with `wait` a page of events"}
}


async def _answer(runtime: RuntimeState, job: Job, base_url: str, place: StreamPlace, wait_s: int | None) -> Response:
    if wait_s is None:
        return EventStream(_stream(runtime, job, base_url, place.after, place.previews))
    return JSONResponse(await _poll(runtime, job, base_url, place.after, wait_s), headers={"Cache-Control": "no-store"})


async def _poll(runtime: RuntimeState, job: Job, base_url: str, after: str, wait_s: int) -> dict[str, Any]:
    """The next page of events, and whether any can come after it."""
    events = await next_events(runtime.redis, runtime.feed, job.id, after, 0 if job.is_terminal else wait_s)
    return {
        "data": [
            {"id": event.id, "event": event.kind, "data": json.loads(write_event(event, base_url=base_url, storage=runtime.storage))}
            for event in events
        ],
        "last_event_id": events[-1].id if events else after,
        "ended": any(event.status in TERMINAL for event in events) or (not events and job.is_terminal),
    }


class StreamRoute(APIRoute):
    """A stream from its beginning, asked for with a key, is opened without the framework's solver of dependencies: most are."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        usual = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if request.scope["query_string"] or "last-event-id" in request.headers:
                return await usual(request)
            runtime, caller = await read_runtime(request), await RequireScope("generate")(await read_caller(request))
            return await stream_events(request.path_params["job_id"], runtime, caller, await read_base_url(request), FROM_START)

        return handle


streams = APIRouter(prefix="/v1", tags=["events"], route_class=StreamRoute)


# POST as well: some tunnels hold back the body of a GET until it is whole.
@streams.post("/generations/{job_id}/events", response_class=EventStream, responses=_PAGE, operation_id="stream_events_by_post")
@streams.get("/generations/{job_id}/events", response_class=EventStream, responses=_PAGE, operation_id="stream_events")
async def stream_events(job_id: str, runtime: Runtime, caller: Watcher, base_url: BaseUrl, place: Place, wait: Wait = None) -> Response:
    """The job now, then every event with its id, then the live ones; the stream ends after the terminal status."""
    return await _answer(runtime, await load_own_job(runtime, caller, job_id), base_url, place, wait)


@router.post("/trainings/{job_id}/events", response_class=EventStream, responses=_PAGE, operation_id="stream_training_events_by_post")
@router.get("/trainings/{job_id}/events", response_class=EventStream, responses=_PAGE, operation_id="stream_training_events")
async def stream_training_events(
    job_id: str, runtime: Runtime, caller: TrainingWatcher, base_url: BaseUrl, place: Place, wait: Wait = None
) -> Response:
    """The training now, then its events: stages, steps with loss, checkpoints, samples."""
    return await _answer(runtime, await load_own_job(runtime, caller, job_id, "training"), base_url, place, wait)
