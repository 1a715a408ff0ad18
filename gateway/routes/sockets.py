"""A job's events over a WebSocket: the same as in the SSE stream, one JSON message each."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing

from fastapi import APIRouter, Depends
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from gateway.edge.guard import Guard
from gateway.jobs.events import Throttle, read_events
from gateway.jobs.model import TERMINAL, Event, EventKind, Job
from gateway.presentation import write_event, write_job
from gateway.routes.deps import BaseUrl, Place, Runtime, StreamPlace, TrainingWatcher, Watcher, is_gone, load_own_job
from gateway.runtime import Runtime as RuntimeState

router = APIRouter(prefix="/v1", tags=["events"])

# Close codes. 4000 and up are an application's own.
ENDED, GOING_AWAY, DELETED = 1000, 1001, 4404


async def _require_own_origin(websocket: WebSocket, runtime: Runtime) -> None:
    """Browsers send WebSockets of any page with the user's rights, and say whose page it is; other clients say nothing."""
    Guard(runtime.settings).refuse_other_origin(websocket.headers.get("origin", ""), websocket.headers.get("host", ""))


OwnOrigin = Depends(_require_own_origin)


class _Watcher:
    """One client. It reads what the client says only to learn that it has gone, or that it wants a sign of life."""

    def __init__(self, runtime: RuntimeState, websocket: WebSocket, base_url: str) -> None:
        self._runtime, self._socket, self._base_url = runtime, websocket, base_url
        self._sending = asyncio.Lock()

    async def serve(self, job: Job, place: StreamPlace) -> None:
        await self._socket.accept()
        self._runtime.metrics.streams.inc()
        listening, telling = asyncio.create_task(self._listen()), asyncio.create_task(self._tell(job, place))
        try:
            done, _ = await asyncio.wait((listening, telling), return_when=asyncio.FIRST_COMPLETED)
            if telling in done and self._socket.client_state is WebSocketState.CONNECTED:
                code, reason = telling.result()
                await self._socket.close(code, reason)
        except WebSocketDisconnect:
            return
        finally:
            self._runtime.metrics.streams.dec()
            for task in (listening, telling):
                task.cancel()
            await asyncio.gather(listening, telling, return_exceptions=True)

    async def _listen(self) -> None:
        while (message := await self._socket.receive())["type"] != "websocket.disconnect":
            if message.get("text") == "ping":
                await self._send('{"event": "pong"}')

    async def _send(self, text: str) -> None:
        async with self._sending:
            await self._socket.send_text(text)

    async def _send_event(self, kind: str, data: str, event_id: str | None) -> None:
        await self._send(f'{{"id": {json.dumps(event_id)}, "event": "{kind}", "data": {data}}}')

    async def _tell(self, job: Job, place: StreamPlace) -> tuple[int, str]:
        """The job as it stands, then its events; the close code and its reason when there is no more to tell."""
        await self._send_event(EventKind.STATUS, write_job(job, base_url=self._base_url, storage=self._runtime.storage), None)
        if job.is_terminal:
            return await self._tell_past(job, place.after)
        feed, idle_s = self._runtime.feed, self._runtime.settings.heartbeat_s
        batches = feed.follow_batches(job.id, place.after, previews=place.previews, idle_s=idle_s, throttle=Throttle())
        async with aclosing(batches):
            async for batch in batches:
                for event in batch:
                    await self._pass_on(event)
                    if event.kind == EventKind.STATUS and event.status in TERMINAL:
                        return ENDED, f"the job is {event.status}"
                if not batch and await is_gone(self._runtime, job.id):
                    return DELETED, "the job was deleted"
        await self._send_event(EventKind.RECONNECT, '{"reason": "this process stops; come back with after="}', None)
        return GOING_AWAY, "this process stops"

    async def _tell_past(self, job: Job, after: str) -> tuple[int, str]:
        while events := await read_events(self._runtime.redis, job.id, after):
            for event in events:
                await self._pass_on(event)
            after = events[-1].id
        return ENDED, f"the job is {job.status}"

    async def _pass_on(self, event: Event) -> None:
        data = write_event(event, base_url=self._base_url, storage=self._runtime.storage)
        await self._send_event(event.kind, data, None if event.kind == EventKind.PREVIEW else event.id)


@router.websocket("/generations/{job_id}/ws", dependencies=[OwnOrigin])
async def watch_generation(websocket: WebSocket, job_id: str, runtime: Runtime, caller: Watcher, base_url: BaseUrl, place: Place) -> None:
    """The events of a generation."""
    job = await load_own_job(runtime, caller, job_id)
    await _Watcher(runtime, websocket, base_url).serve(job, place)


@router.websocket("/trainings/{job_id}/ws", dependencies=[OwnOrigin])
async def watch_training(
    websocket: WebSocket, job_id: str, runtime: Runtime, caller: TrainingWatcher, base_url: BaseUrl, place: Place
) -> None:
    """The events of a training."""
    job = await load_own_job(runtime, caller, job_id, "training")
    await _Watcher(runtime, websocket, base_url).serve(job, place)
