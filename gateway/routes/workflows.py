"""`PUT` and `DELETE /v1/workflows/{name}`: workflows put in place while everything runs. Reading them is in the catalogue."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from gateway.edge.bodies import PlainJson, ShallowBody
from gateway.errors import NotFound
from gateway.presentation import rfc3339
from gateway.routes.deps import Admin, Runtime
from gateway.workflows.records import WorkflowSource

router = APIRouter(prefix="/v1/workflows", tags=["catalog"])


class WorkflowBody(ShallowBody):
    """The three files of a workflow folder."""

    model_config = ConfigDict(extra="forbid")
    graph: PlainJson = Field(description="What ComfyUI's editor exports with Export (API), untouched.")
    bindings: str = Field(max_length=100_000, description="bindings.toml as text: the parameters, and which node input each lands on.")
    example: PlainJson = Field(description="A request: the parameters of a picture that can be made.")


@router.put("/{name}")
async def put_workflow(name: str, request: WorkflowBody, runtime: Runtime, caller: Admin) -> dict[str, Any]:
    """Put a workflow in place, or a new version of it, after it was checked against the instances' nodes."""
    source = WorkflowSource(graph=request.graph, bindings=request.bindings, example=request.example, by=caller.id)
    workflow, notes = await runtime.workflow_edits.put(name, source)
    return {"name": name, "object": "workflow", "version": workflow.version, "title": workflow.title, "notes": list(notes)}


@router.get("/{name}/versions")
async def list_workflow_versions(name: str, runtime: Runtime, caller: Admin) -> dict[str, Any]:
    """Every version that was ever put in place under this name, oldest first."""
    current = (await runtime.workflow_records.current()).get(name)
    return {"data": [{"version": one, "current": one == current} for one in await runtime.workflow_records.versions(name)]}


@router.get("/{name}/versions/{version}")
async def get_workflow_version(name: str, version: str, runtime: Runtime, caller: Admin) -> dict[str, Any]:
    """A version's three files, to be put in place again or to be worked on."""
    source = await runtime.workflow_records.source(name, version)
    if source is None:
        details = {"parameter": "version", "value": version[:100]}
        raise NotFound(f"There is no version {version[:100]!r} of {name!r}.", code="workflow_not_found", details=details)
    record = source.model_dump(exclude={"created_ms"})
    return {"name": name, "version": version, **record, "created_at": rfc3339(source.created_ms)}


class DeletedWorkflow(BaseModel):
    name: str
    object: Literal["workflow.deleted"] = "workflow.deleted"


@router.delete("/{name}")
async def delete_workflow(name: str, runtime: Runtime, caller: Admin) -> DeletedWorkflow:
    """Offer it to nobody any more. Jobs keep their graphs, and its versions stay."""
    await runtime.workflow_edits.remove(name)
    return DeletedWorkflow(name=name)
