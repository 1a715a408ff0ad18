"""The gateway as an ASGI app. Reads like a contents page: lifespan, error handlers, middleware, routers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware

from gateway.edge.middleware import EdgeMiddleware, install_error_handlers
from gateway.edge.openapi import describe
from gateway.moderation.judges import open_judge
from gateway.routes import (
    batches,
    catalog,
    comfy_assets,
    comfy_jobs,
    datasets,
    events,
    generations,
    health,
    images,
    instances,
    keys,
    loras,
    models,
    reproductions,
    sockets,
    tickets,
    trainings,
    uploads,
    webhooks,
    workflows,
)
from gateway.runtime import load_catalog, open_runtime
from gateway.settings import Settings

# What pages of CORS_ORIGINS may send and see. No cookies: a key is the page's own to send.
CORS: dict[str, Any] = {
    "allow_methods": ["GET", "POST", "PUT", "PATCH", "DELETE"],
    "allow_headers": ["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", "Prefer", "X-Request-ID"],
    "expose_headers": ["Idempotency-Replayed", "Location", "Preference-Applied", "Retry-After", "X-Request-ID"],
}

# Newer FastAPIs look at each request whether somebody listens by OpenTelemetry; numbers and log lines are our own (`telemetry.py`).
NO_TELEMETRY: Any = {"tracing": False, "metrics": False, "logs": False}


def create_app(settings: Settings) -> FastAPI:
    """Build the app; connections are opened when it starts. Raises BrokenWorkflow for a folder that cannot be served, and JudgeBroken."""
    open_judge(settings, None)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_runtime(settings, dispatch=settings.dispatcher == "embedded") as runtime:
            app.state.runtime, app.state.loop = runtime, asyncio.get_running_loop()
            yield

    app = FastAPI(title="Fluxgate", version=version("fluxgate"), lifespan=lifespan, redoc_url=None, telemetry=NO_TELEMETRY)
    install_error_handlers(app)
    # What every job asks for comes first.
    app.include_router(generations.creation)
    app.include_router(events.streams)
    app.include_router(generations.router)
    app.include_router(_workflow_router(settings))
    app.include_router(generations.further)
    app.include_router(reproductions.router)
    app.include_router(events.router)
    app.include_router(tickets.router)
    app.include_router(sockets.router)
    app.include_router(batches.router)
    app.include_router(datasets.router)
    app.include_router(catalog.router)
    app.include_router(workflows.router)
    app.include_router(models.router)
    app.include_router(loras.router)
    app.include_router(trainings.router)
    app.include_router(uploads.router)
    app.include_router(webhooks.router)
    app.include_router(instances.router)
    app.include_router(images.router)
    app.include_router(comfy_jobs.router)
    app.include_router(comfy_assets.router)
    app.include_router(keys.router)
    app.include_router(health.router)
    app.add_middleware(EdgeMiddleware, settings=settings)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.cors_origins, **CORS)
    describe(app)
    return app


def _workflow_router(settings: Settings) -> APIRouter:
    """One typed route for every workflow."""
    router, workflows = APIRouter(route_class=generations.CreationRoute), load_catalog(settings)
    for name in workflows.names():
        generations.add_workflow_routes(router, workflows.get(name))
    return router
