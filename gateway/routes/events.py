"""A job's events as SSE: replayed from any point, then live, until the job has ended."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, NamedTuple

from fastapi import APIRouter, Depends, Header, Query

from gateway.errors import BadRequest, RedisUnavailable
from gateway.jobs.events import Throttle, read_events
from gateway.jobs.model import TERMINAL, Event, EventKind, Job, Output
from gateway.presentation import present_job, present_output
from gateway.routes.deps import BaseUrl, CurrentCaller, Runtime, load_own_job
from gateway.runtime import Runtime as RuntimeState
from gateway.streams import EventStream

router = APIRouter(prefix="/v1", tags=["events"])

_EVENT_ID = re.compile(r"\d{1,15}(-\d{1,10})?")


def _frame(kind: str, data: str, event_id: str | None = None) -> bytes:
    head = f"id: {event_id}\n" if event_id else ""
    return f"{head}event: {kind}\ndata: {data}\n\n".encode()


class EventPresenter:
    """Events as callers see them: whole jobs and outputs get their signed URLs at the time of delivery."""

    def __init__(self, runtime: RuntimeState, base_url: str) -> None:
        self._runtime, self._base_url = runtime, base_url
        self.ended = False

    def job(self, job: Job) -> str:
        return json.dumps(present_job(job, base_url=self._base_url, storage=self._runtime.storage), ensure_ascii=False)

    def frame(self, event: Event) -> bytes:
        """Made once for all who listen now and see the gateway at the same address."""
        self.ended |= event.kind == EventKind.STATUS and event.status in TERMINAL
        if event.frame is None or event.frame[0] != self._base_url:
            event.frame = (self._base_url, self._write(event))
        return event.frame[1]

    def _write(self, event: Event) -> bytes:
        event_id = None if event.kind == EventKind.PREVIEW else event.id
        if event.kind == EventKind.STATUS:
            return _frame(event.kind, self.job(Job.model_validate_json(event.data)), event_id)
        if event.kind == EventKind.OUTPUT:
            output = present_output(Output.model_validate_json(event.data), self._runtime.storage)
            return _frame(event.kind, json.dumps(output), event_id)
        if event.kind == EventKind.SAMPLE:
            sample = json.loads(event.data)
            sample["url"] = self._runtime.storage.sign(sample.pop("key"))
            return _frame(event.kind, json.dumps(sample), event_id)
        return _frame(event.kind, event.data.decode(), event_id)


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
                if presenter.ended or (not batch and await _is_gone(runtime, job_id)):
                    return
        yield _frame(EventKind.RECONNECT, '{"reason": "this process stops; come back with Last-Event-ID"}')
    finally:
        runtime.metrics.streams.dec()


async def _is_gone(runtime: RuntimeState, job_id: str) -> bool:
    """Deleted under our eyes: nothing more will come."""
    try:
        return await runtime.store.load(job_id) is None
    except RedisUnavailable:
        return False


class _Place(NamedTuple):
    """Where in a stream to go on, and what to leave out."""

    after: str
    previews: bool


async def _place(
    after: Annotated[str | None, Query(description="Event id to go on after; `Last-Event-ID` says the same.")] = None,
    previews: Annotated[bool, Query(description="Also send pictures of the work in progress.")] = False,
    last_event_id: Annotated[str | None, Header()] = None,
) -> _Place:
    position = last_event_id or after or "0"
    if not _EVENT_ID.fullmatch(position):
        raise BadRequest(
            "That is no event id.", details={"parameter": "after", "value": position[:100], "allowed": "an id from this stream"}
        )
    return _Place(position, previews)


Place = Annotated[_Place, Depends(_place)]


def _answer(runtime: RuntimeState, job: Job, base_url: str, place: _Place) -> EventStream:
    return EventStream(_stream(runtime, job, base_url, place.after, place.previews))


# POST as well: some tunnels hold back the body of a GET until it is whole.
@router.post("/generations/{job_id}/events", response_class=EventStream, operation_id="stream_events_by_post")
@router.get("/generations/{job_id}/events", response_class=EventStream, operation_id="stream_events")
async def stream_events(job_id: str, runtime: Runtime, caller: CurrentCaller, base_url: BaseUrl, place: Place) -> EventStream:
    """The job now, then every event with its id, then the live ones; the stream ends after the terminal status."""
    return _answer(runtime, await load_own_job(runtime, caller, job_id), base_url, place)


@router.post("/trainings/{job_id}/events", response_class=EventStream, operation_id="stream_training_events_by_post")
@router.get("/trainings/{job_id}/events", response_class=EventStream, operation_id="stream_training_events")
async def stream_training_events(job_id: str, runtime: Runtime, caller: CurrentCaller, base_url: BaseUrl, place: Place) -> EventStream:
    """The training now, then its events: stages, steps with loss, checkpoints, samples."""
    return _answer(runtime, await load_own_job(runtime, caller, job_id, "training"), base_url, place)
