"""What every route may ask for: the runtime, the caller, the base URL of links."""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple
from urllib.parse import urlsplit

from fastapi import Depends, Header, Query
from starlette.requests import HTTPConnection

from gateway.auth import Caller
from gateway.dialects.comfy_v2 import ComfyPresenter
from gateway.edge.paging import Page
from gateway.errors import BadRequest, Forbidden, NotFound, RedisUnavailable, Unauthorized, Unavailable
from gateway.jobs.model import Job
from gateway.runtime import Runtime as RuntimeState


# Coroutines, although none waits: the framework would call plain functions in a thread, half a millisecond each time.
# They ask for the connection, which is a request or a WebSocket.
async def read_runtime(connection: HTTPConnection) -> RuntimeState:
    runtime: RuntimeState = connection.app.state.runtime
    return runtime


async def read_caller(connection: HTTPConnection) -> Caller:
    runtime: RuntimeState = connection.app.state.runtime
    caller = await runtime.doorkeeper.admit(connection.headers.get("authorization"))
    connection.state.caller = caller.id
    return caller


async def read_base_url(connection: HTTPConnection) -> str:
    runtime: RuntimeState = connection.app.state.runtime
    own = str(connection.base_url)
    # A WebSocket's begins with ws, a request's with http.
    return (runtime.settings.public_url or (own if own.startswith("http") else own.replace("ws", "http", 1))).rstrip("/")


async def _comfy(
    base_url: Annotated[str, Depends(read_base_url)], runtime: Annotated[RuntimeState, Depends(read_runtime)]
) -> ComfyPresenter:
    settings = runtime.settings
    return ComfyPresenter(runtime.storage, settings.url_ttl_s, settings.job_ttl_s, urlsplit(base_url).path.rstrip("/"))


class AnyKey:
    """Whoever has a key, whatever it may do."""

    async def __call__(self, caller: Annotated[Caller, Depends(read_caller)]) -> Caller:
        return caller


class ScopeOrTicket:
    """A caller whose key has the scope, or whoever has a ticket for the job in the path. Raises Unauthorized, Forbidden."""

    def __init__(self, scope: str) -> None:
        self.scope = scope

    async def __call__(
        self,
        connection: HTTPConnection,
        job_id: str,
        ticket: Annotated[str | None, Query(max_length=1000, description="Instead of a key: `POST .../ticket` gives one.")] = None,
    ) -> Caller:
        runtime: RuntimeState = connection.app.state.runtime
        if ticket is None:
            return await RequireScope(self.scope)(await read_caller(connection))
        given = await runtime.tickets.read(ticket, job_id)
        if given.key is not None and not runtime.doorkeeper.is_good(given.key):
            raise Unauthorized("The key that this ticket was got with is refused by now.")
        connection.state.caller = given.caller
        return Caller(given.caller, frozenset({self.scope}))


class RequireScope:
    """A caller whose key has the scope. Raises Forbidden."""

    def __init__(self, scope: str) -> None:
        self.scope = scope

    async def __call__(self, caller: Annotated[Caller, Depends(read_caller)]) -> Caller:
        if not caller.may(self.scope):
            details = {"allowed": self.scope, "value": sorted(caller.scopes)}
            raise Forbidden(f"This needs a key with the scope `{self.scope}`.", code="scope_missing", details=details)
        return caller


async def _full_report(
    connection: HTTPConnection, full: Annotated[bool, Query(description="Look at everything; for admins.")] = False
) -> bool:
    if full:
        await RequireScope("admin")(await read_caller(connection))
    return full


async def _is_operator(connection: HTTPConnection) -> bool:
    """Without counting: whoever watches a deployment asks often, mostly without a key, and may do so while Redis is away."""
    runtime: RuntimeState = connection.app.state.runtime
    if runtime.doorkeeper.is_open:
        return True
    try:
        return (await runtime.doorkeeper.identify(connection.headers.get("authorization"))).may("admin")
    except (Unauthorized, Unavailable):
        return False


Runtime = Annotated[RuntimeState, Depends(read_runtime)]
# Every route asks for one of these, or stands on the list of public ones in the house's tests.
AnyCaller = Annotated[Caller, Depends(AnyKey())]
CurrentCaller = Annotated[Caller, Depends(RequireScope("generate"))]
Trainer = Annotated[Caller, Depends(RequireScope("train"))]
Watcher = Annotated[Caller, Depends(ScopeOrTicket("generate"))]
TrainingWatcher = Annotated[Caller, Depends(ScopeOrTicket("train"))]
Admin = Annotated[Caller, Depends(RequireScope("admin"))]
# True only for an admin who asked for it; anybody may leave it out.
FullReport = Annotated[bool, Depends(_full_report)]
# Whether the answer may name what only operators know. For routes that anybody may ask.
IsOperator = Annotated[bool, Depends(_is_operator)]
BaseUrl = Annotated[str, Depends(read_base_url)]
Comfy = Annotated[ComfyPresenter, Depends(_comfy)]
IdempotencyHeader = Annotated[
    str | None, Header(alias="Idempotency-Key", description="The same key and body again run nothing and get the first answer.")
]


async def _page(limit: Annotated[int, Query(ge=1, le=100)] = 20, cursor: str | None = None) -> Page:
    return Page(limit, cursor)


PageQuery = Annotated[Page, Depends(_page)]


_EVENT_ID = re.compile(r"\d{1,15}(-\d{1,10})?", re.ASCII)


class StreamPlace(NamedTuple):
    """Where in a stream to go on, and what to leave out."""

    after: str
    previews: bool


async def _place(
    after: Annotated[str | None, Query(description="Event id to go on after; `Last-Event-ID` says the same.")] = None,
    previews: Annotated[bool, Query(description="Also send pictures of the work in progress.")] = False,
    last_event_id: Annotated[str | None, Header()] = None,
) -> StreamPlace:
    position = last_event_id or after or "0"
    if not _EVENT_ID.fullmatch(position):
        raise BadRequest(
            "That is no event id.", details={"parameter": "after", "value": position[:100], "allowed": "an id from this stream"}
        )
    return StreamPlace(position, previews)


Place = Annotated[StreamPlace, Depends(_place)]


async def load_own_job(runtime: RuntimeState, caller: Caller, job_id: str, kind: str = "generation") -> Job:
    """The caller's job. Somebody else's is as absent as one that never was."""
    job = await runtime.store.load(job_id)
    if job is None or job.spec.caller != caller.id or job.spec.kind != kind:
        raise NotFound(f"There is no {kind} {job_id!r}.", code="job_not_found", details={"parameter": "id", "value": job_id})
    return job


async def is_gone(runtime: RuntimeState, job_id: str) -> bool:
    """Whether a job was deleted under a listener's eyes: nothing more will come."""
    try:
        return await runtime.store.load(job_id) is None
    except RedisUnavailable:
        return False
