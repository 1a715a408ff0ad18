"""What there is to choose from: workflows, base models, LoRAs, and which instances have them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from comfy_workflows.workflow import Workflow
from gateway.admission import needs_of
from gateway.dispatch.fleet import missing
from gateway.instances import Catalog
from gateway.routes.deps import AnyCaller, Runtime
from gateway.runtime import Runtime as RuntimeState

router = APIRouter(prefix="/v1", tags=["catalog"])


async def _catalogs(runtime: RuntimeState) -> dict[str, Catalog]:
    """Node catalogues of the instances that are up."""
    found = {}
    for facts in await runtime.registry.all():
        if facts.state == "up" and (catalog := await runtime.registry.catalog(facts)) is not None:
            found[facts.id] = catalog
    return found


def _summary(workflow: Workflow, catalogs: dict[str, Catalog]) -> dict[str, Any]:
    classes = needs_of(workflow.graph).model_copy(update={"choices": ()})
    return {
        "name": workflow.name,
        "title": workflow.title,
        "description": workflow.description,
        "version": workflow.version,
        "families": list(workflow.families),
        "base_models": workflow.fitting_base_models(),
        "instances": sorted(name for name, catalog in catalogs.items() if not missing(classes, catalog)),
    }


@router.get("/workflows")
async def list_workflows(runtime: Runtime, caller: AnyCaller) -> dict[str, Any]:
    """Every workflow, and the instances that have its nodes."""
    catalogs = await _catalogs(runtime)
    return {"data": [_summary(runtime.catalog.get(name), catalogs) for name in runtime.catalog.names()]}


@router.get("/workflows/{name}")
async def get_workflow(name: str, runtime: Runtime, caller: AnyCaller) -> dict[str, Any]:
    """A workflow with the JSON Schema of its parameters and an example request."""
    workflow = await runtime.admission.find_workflow(name)
    return {**_summary(workflow, await _catalogs(runtime)), "parameters": workflow.json_schema(), "example": workflow.example}


@router.get("/models")
async def list_models(runtime: Runtime, caller: AnyCaller) -> dict[str, Any]:
    """Base models of the catalogue, where their files are, and where one is warm."""
    instances = await runtime.registry.all()
    catalogs = await _catalogs(runtime)
    data = []
    for model in runtime.catalog.base_models.values():
        files = set(model.files.values())
        ready = [name for name, catalog in catalogs.items() if files <= _all_choices(catalog)]
        data.append(
            {
                "id": model.name,
                "object": "model",
                "created": 0,
                "owned_by": model.source,
                **model.model_dump(exclude={"name"}, mode="json"),
                "default": model.name == runtime.settings.default_base_model,
                "ready_on": sorted(ready),
                "warm_on": sorted(facts.id for facts in instances if facts.base_model == model.name and facts.state == "up"),
            }
        )
    return {"object": "list", "data": data}


def _all_choices(catalog: Catalog) -> set[str]:
    loaders = ("UNETLoader", "DualCLIPLoader", "CLIPLoader", "VAELoader", "CheckpointLoaderSimple")
    return {choice for name in loaders for choices in catalog.get(name, {}).values() for choice in choices}
