"""`/v1/models/load` and `/v1/models/unload`: which base model is warm where, without restarting anything. The list is in the catalogue."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from gateway.presentation import present_job
from gateway.routes.deps import Admin, BaseUrl, Once, OnceRoute, Runtime

router = APIRouter(prefix="/v1/models", tags=["catalog"], route_class=OnceRoute)


class LoadRequest(BaseModel):
    """Which base model, and where."""

    model_config = ConfigDict(extra="forbid")
    base_model: str = Field(max_length=200, description="An id of `GET /v1/models`.")
    instance: str | None = Field(None, max_length=300, description="An id of `GET /v1/instances`; the least busy one that can when absent.")


class UnloadRequest(BaseModel):
    """From where."""

    model_config = ConfigDict(extra="forbid")
    instance: str | None = Field(None, max_length=300, description="An id of `GET /v1/instances`; all of them when absent.")


@router.post(
    "/load",
    status_code=202,
    responses={200: {"description": "It is loaded there already"}},
    response_class=JSONResponse,
    dependencies=[Depends(Once())],
)
async def load_model(request: LoadRequest, runtime: Runtime, caller: Admin, base_url: BaseUrl) -> JSONResponse:
    """Load a base model on an instance, by the smallest picture that needs it. `job` is that picture's: its end says that it is warm."""
    instance, job = await runtime.warmth.load(request.base_model, request.instance, caller)
    shown = present_job(job, base_url=base_url, storage=runtime.storage) if job else None
    body = {"object": "model.load", "base_model": request.base_model, "instance": instance, "warm": job is None, "job": shown}
    return JSONResponse(body, 200 if job is None else 202)


@router.post("/unload", status_code=202, dependencies=[Depends(Once())])
async def unload_models(request: UnloadRequest, runtime: Runtime, caller: Admin) -> dict[str, Any]:
    """Have instances let go of all models. One that runs something does so when that has ended."""
    return {"object": "model.unload", "instances": await runtime.warmth.unload(request.instance)}
