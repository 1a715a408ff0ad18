"""What every route may ask for: the runtime, the caller, the base URL of links."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from functools import lru_cache
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

from fastapi import Depends, Header, Query, Request, Response
from fastapi.routing import APIRoute
from starlette.requests import HTTPConnection

from gateway.auth import Caller
from gateway.dialects.comfy_v2 import ComfyPresenter
from gateway.edge.once import HEADER, answer_once
from gateway.edge.paging import Page
from gateway.errors import BadRequest, Forbidden, NotFound, RedisUnavailable, Unauthorized, Unavailable
from gateway.jobs.model import Job
from gateway.runtime import Runtime as RuntimeState

_KNOWN_CALLER = "fluxgate.caller"


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


async def _read_caller_once(connection: HTTPConnection) -> Caller:
    """A request with an Idempotency-Key is asked who it is of before its body is read, and counts as one all the same."""
    known: Caller | None = connection.scope.get(_KNOWN_CALLER)
    return known if known is not None else await read_caller(connection)


async def read_base_url(connection: HTTPConnection) -> str:
    runtime: RuntimeState = connection.app.state.runtime
    if runtime.settings.public_url:
        return runtime.settings.public_url.rstrip("/")
    scope = connection.scope
    return _write_base_url(scope["scheme"], connection.headers.get("host"), scope.get("server"), scope.get("root_path", ""))


@lru_cache(maxsize=256)
def _write_base_url(scheme: str, host: str | None, server: tuple[str, int | None] | None, root_path: str) -> str:
    """What the framework makes of a request's own address, in a tenth of its time."""
    headers = [] if host is None else [(b"host", host.encode("latin-1"))]
    scope = {
        "type": "http",
        "scheme": scheme,
        "headers": headers,
        "server": server,
        "root_path": root_path,
        "path": "/",
        "query_string": b"",
    }
    own = str(HTTPConnection(scope).base_url)
    # A WebSocket's begins with ws, a request's with http.
    return (own if own.startswith("http") else own.replace("ws", "http", 1)).rstrip("/")


async def _comfy(
    base_url: Annotated[str, Depends(read_base_url)], runtime: Annotated[RuntimeState, Depends(read_runtime)]
) -> ComfyPresenter:
    settings = runtime.settings
    return ComfyPresenter(runtime.storage, settings.url_ttl_s, settings.job_ttl_s, urlsplit(base_url).path.rstrip("/"))


class AnyKey:
    """Whoever has a key, whatever it may do."""

    async def __call__(self, caller: Annotated[Caller, Depends(_read_caller_once)]) -> Caller:
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

    async def __call__(self, caller: Annotated[Caller, Depends(_read_caller_once)]) -> Caller:
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


class Once:
    """On a POST that makes no job, in a router of `OnceRoute`s. `secrets` are fields of its answer that are kept nowhere."""

    def __init__(self, *secrets: str) -> None:
        self.secrets = secrets

    async def __call__(self, idempotency_key: IdempotencyHeader = None) -> None:
        """Says in the API's description that it takes one."""


class OnceRoute(APIRoute):
    """Heeds `Once`. POSTs that make jobs keep their keys with the job instead, in one step."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        usual, asked = super().get_route_handler(), [part.call for part in self.dependant.dependencies]
        once = next((call for call in asked if isinstance(call, Once)), None)
        judge = next((call for call in asked if isinstance(call, AnyKey | RequireScope)), None)
        if once is None or judge is None:
            return usual

        async def handle(request: Request) -> Response:
            if HEADER not in request.headers:
                return await usual(request)
            caller = request.scope[_KNOWN_CALLER] = await judge(await read_caller(request))
            answers = (await read_runtime(request)).answers
            return await answer_once(request, caller, answers, once.secrets, usual)

        return handle


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
    last_event_id: Annotated[str | None, Header(alias="Last-Event-ID")] = None,
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
