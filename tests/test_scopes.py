"""Every route says who may call it. Walks the app's routes, so that one that is added without saying so fails here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
from fastapi import APIRouter, Depends, FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute, APIWebSocketRoute
from starlette.routing import BaseRoute

from gateway.app import create_app
from gateway.routes import deps
from gateway.settings import Settings

PUBLIC = {"/health", "/health/stream", "/api/v2/health", "/ready", "/docs", "/docs/oauth2-redirect", "/openapi.json", "/"}
GUARDS = (deps.RequireScope, deps.ScopeOrTicket, deps.AnyKey)


def find_calls(dependant: Dependant) -> Iterator[object]:
    yield dependant.call
    for inner in dependant.dependencies:
        yield from find_calls(inner)


def walk(routes: Iterable[BaseRoute]) -> Iterator[BaseRoute]:
    """The routes, those of included routers too, which the framework keeps as they were."""
    for route in routes:
        router = getattr(route, "original_router", None)
        if router is None:
            yield route
        else:
            yield from walk(router.routes)


def find_open_routes(routes: Iterable[BaseRoute]) -> list[str]:
    """Paths of the routes that anybody may call, apart from those that are meant to be public."""
    found = set()
    for route in walk(routes):
        guarded = isinstance(route, APIRoute | APIWebSocketRoute) and any(isinstance(call, GUARDS) for call in find_calls(route.dependant))
        if not guarded:
            found.add(str(getattr(route, "path", route)))
    return sorted(found - PUBLIC)


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return create_app(Settings(workflows_dir=None))


def test_every_route_says_who_may_call_it(app: FastAPI) -> None:
    assert find_open_routes(app.routes) == []


def test_a_route_that_says_nothing_is_found() -> None:
    app = FastAPI(openapi_url=None)

    @app.get("/v1/forgotten")
    async def forgotten() -> None: ...

    @app.websocket("/v1/forgotten/ws")
    async def forgotten_socket() -> None: ...

    router = APIRouter(prefix="/v1/included")

    @router.get("/forgotten")
    async def included() -> None: ...

    app.include_router(router)

    @app.get("/v1/guarded", dependencies=[Depends(deps.RequireScope("admin"))])
    async def guarded() -> None: ...

    assert find_open_routes(app.routes) == ["/v1/forgotten", "/v1/forgotten/ws", "/v1/included/forgotten"]


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("/v1/generations", "generate"),
        ("/v1/datasets", "train"),
        ("/v1/trainings", "train"),
        ("/v1/trainings/{job_id}/events", "train"),
        ("/v1/trainings/{job_id}/ws", "train"),
        ("/v1/trainings/{job_id}/webhook/replay", "train"),
        ("/v1/trainings/{job_id}/ticket", "train"),
        ("/v1/instances", "admin"),
        ("/v1/keys", "admin"),
        ("/metrics", "admin"),
    ],
)
def test_a_route_asks_for_the_scope_of_its_noun(app: FastAPI, path: str, scope: str) -> None:
    routes = [route for route in walk(app.routes) if isinstance(route, APIRoute | APIWebSocketRoute) and route.path == path]
    assert routes
    for route in routes:
        scopes = {call.scope for call in find_calls(route.dependant) if isinstance(call, deps.RequireScope | deps.ScopeOrTicket)}
        assert scopes == {scope}, route.name
