"""`/v1/loras`: what can be named in a request, where it is ready, and LoRAs from elsewhere."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from gateway.auth import Caller
from gateway.edge.bodies import read_idempotency_key
from gateway.errors import Conflict, Forbidden
from gateway.jobs.model import Job, JobStatus
from gateway.loras.imports import LoraImport
from gateway.loras.registry import Lora
from gateway.presentation import rfc3339
from gateway.routes.deps import AnyCaller, BaseUrl, IdempotencyHeader, Runtime, Trainer
from gateway.runtime import Runtime as RuntimeState

router = APIRouter(prefix="/v1", tags=["catalog"])


@router.get("/loras")
async def list_loras(runtime: Runtime, caller: AnyCaller, base_url: BaseUrl) -> dict[str, Any]:
    """The caller's LoRAs, those that are shared or lie on an instance, and the caller's imports that are not yet, or have failed."""
    waiting, known = await runtime.lora_imports.open(caller), await runtime.loras.of(caller.id)
    shown = [await _present_lora(runtime, lora, waiting.pop(lora.name, None), base_url, caller) for lora in known]
    return {"data": [*shown, *[_present_import(name, job, base_url) for name, job in waiting.items()]]}


@router.post("/loras", status_code=202, response_class=JSONResponse)
async def import_lora(
    request: LoraImport,
    runtime: Runtime,
    caller: Trainer,
    base_url: BaseUrl,
    idempotency_key: IdempotencyHeader = None,
) -> JSONResponse:
    """Take a LoRA from an upload or a URL. It is judged, converted where ComfyUI needs that, and published: `status` tells."""
    key = read_idempotency_key(caller, idempotency_key, "import", request)
    headers = {"Location": f"{base_url}/v1/loras/{request.name}"}
    # What it was checked against may have changed since, so the first answer comes before every check.
    replay = await runtime.store.find_replay(key) if key is not None else None
    known = replay[1] if replay is not None else None
    if known is None:
        shown = _present_import(request.name, await runtime.lora_imports.admit(request, caller, key), base_url)
        known = await runtime.store.record_answer(key, json.dumps(shown).encode()) if key is not None else None
    if known is None:
        return JSONResponse(shown, 202, headers=headers)
    return JSONResponse(json.loads(known), 202, headers={**headers, "Idempotency-Replayed": "true"})


@router.get("/loras/{name:path}")
async def get_lora(name: str, runtime: Runtime, caller: AnyCaller, base_url: BaseUrl) -> dict[str, Any]:
    """One LoRA by name, with where it is ready, a download and its before and after pictures; or the import that is to become it."""
    waiting = (await runtime.lora_imports.open(caller)).get(name)
    if waiting is not None and not any(lora.name == name for lora in await runtime.loras.of(caller.id)):
        return _present_import(name, waiting, base_url)
    return await _present_lora(runtime, (await runtime.loras.resolve([name], caller.id))[0], waiting, base_url, caller)


async def _load_changeable(runtime: RuntimeState, caller: Caller, name: str) -> Lora:
    """A published LoRA: the caller's own, or for an admin any that it sees."""
    lora = (await runtime.loras.resolve([name], caller.id))[0]
    if lora.owner != caller.id and not caller.may("admin"):
        details = {"allowed": "admin", "value": sorted(caller.scopes)}
        raise Forbidden(f"{name!r} is not yours: that needs a key with the scope `admin`.", code="scope_missing", details=details)
    if lora.sha256 is None:
        raise Conflict(f"{name!r} was not published here; remove its file on the instances.", code="lora_not_published")
    return lora


class Sharing(BaseModel):
    """Who may use a LoRA."""

    model_config = ConfigDict(extra="forbid")
    shared: bool = Field(description="Whether every caller may use it, or its owner alone.")


@router.patch("/loras/{name:path}")
async def share_lora(name: str, request: Sharing, runtime: Runtime, caller: Trainer, base_url: BaseUrl) -> dict[str, Any]:
    """Let every caller use one's own LoRA, or none but oneself again."""
    changed = None
    while changed is None:  # it was taken back, or another one published, since it was looked up
        lora = await _load_changeable(runtime, caller, name)
        changed = await runtime.loras.change(lora.file, shared=request.shared)
    lora = changed.model_copy(update={"instances": lora.instances})
    return await _present_lora(runtime, lora, None, base_url, caller)


@router.delete("/loras/{name:path}")
async def delete_lora(name: str, runtime: Runtime, caller: Trainer) -> dict[str, Any]:
    """Take back one's own LoRA: nobody is offered it any more, and folders we keep lose it. Others' need the scope `admin`."""
    was_waiting = await runtime.lora_imports.forget(caller, name)
    if was_waiting and not any(lora.name == name for lora in await runtime.loras.of(caller.id)):
        return {"name": name, "file": None, "object": "lora.deleted"}
    lora = await _load_changeable(runtime, caller, name)
    await runtime.loras.withdraw(lora.file)
    await runtime.storage.delete([lora.key])
    return {"name": lora.name, "file": lora.file, "object": "lora.deleted"}


async def _present_lora(runtime: RuntimeState, lora: Lora, job: Job | None, base_url: str, caller: Caller) -> dict[str, Any]:
    """A LoRA, with an import under its name that has not become it. Until every instance was asked it is still `importing`."""
    record: dict[str, Any] = lora.model_dump(exclude={"instances", "created_ms", "before", "after", "owner"})
    record |= {"owned": lora.owner == caller.id, "shared": lora.shared or lora.owner is None}
    if not record["owned"]:
        record |= {"training": None, "source": None}
    record["status"] = "importing" if job is not None and not job.is_terminal else "ready"
    record["error"] = _describe_error(job) if job is not None else None
    record["import"] = _describe_import(job, base_url) if job is not None else None
    record["ready_on"] = sorted(lora.instances)
    record["created_at"] = rfc3339(lora.created_ms)
    record["url"] = runtime.storage.sign(lora.key) if lora.sha256 else None
    for side, job_id in (("before", lora.before), ("after", lora.after)):
        drawn = await runtime.store.load(job_id) if job_id else None
        record[side] = runtime.storage.sign(drawn.outputs[0].key) if drawn and drawn.outputs else None
    return record


def _present_import(name: str, job: Job, base_url: str) -> dict[str, Any]:
    """An import as the LoRA it is to become."""
    return {
        **Lora(name=name, file="").model_dump(exclude={"instances", "created_ms", "owner"}),
        "owned": True,
        "file": None,
        "base_model": job.spec.base_model or None,
        "trigger_word": job.spec.parameters.get("trigger_word"),
        "status": "failed" if job.is_terminal and job.status is not JobStatus.SUCCEEDED else "importing",
        "error": _describe_error(job),
        "import": _describe_import(job, base_url),
        "ready_on": [],
        "created_at": rfc3339(job.spec.created_ms),
        "url": None,
    }


def _describe_error(job: Job) -> dict[str, Any] | None:
    if job.error is not None:
        return job.error.model_dump()
    if job.status in (JobStatus.CANCELED, JobStatus.EXPIRED):
        return {"code": f"import_{job.status.value}", "message": f"The import is {job.status.value}.", "hint": None, "details": {}}
    return None


def _describe_import(job: Job, base_url: str) -> dict[str, Any]:
    home = f"{base_url}/v1/trainings/{job.id}"
    return {"id": job.id, "status": job.status.value, "urls": {"self": home, "events": f"{home}/events", "cancel": f"{home}/cancel"}}
