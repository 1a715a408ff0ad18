"""`/api/v2/assets`: uploads, and outputs of jobs, as the Comfy API v2 knows them. The same assets as `/v1/uploads`."""

from __future__ import annotations

import re
from typing import IO as File
from typing import Any, cast

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from pydantic import BaseModel, ConfigDict, Field

from gateway.auth import Caller
from gateway.datasets.arrivals import clean_name
from gateway.dialects.comfy_v2 import parse_output_id
from gateway.edge.multipart import Form, read_form
from gateway.errors import Conflict, NotFound, Unprocessable
from gateway.inputs.asset_records import Asset
from gateway.inputs.assets import BYTES_TYPE, absent
from gateway.jobs.model import Job, Output
from gateway.routes.deps import Comfy, CurrentCaller, Once, OnceRoute, Runtime
from gateway.runtime import Runtime as RuntimeState

router = APIRouter(prefix="/api/v2", tags=["comfy api v2"], route_class=OnceRoute)

MAX_FIELD_BYTES = 4096
MIN_LIFE_S, MAX_LIFE_S = 60, 604_800
_HASH = re.compile(r"blake3:[0-9a-fA-F]{64}")
_UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "content_type": {"type": "string"},
                        "file_path": {"type": "string"},
                        "expected_hash": {"type": "string"},
                        "tags": {"description": "A text; may come several times."},
                        "expires_in": {"type": "integer", "minimum": MIN_LIFE_S, "maximum": MAX_LIFE_S},
                    },
                }
            }
        },
    }
}


class FromHash(BaseModel):
    model_config = ConfigDict(extra="forbid")

    hash: str = Field(description="`blake3:` and 64 hexadecimal digits.")
    file_path: str | None = Field(None, max_length=1024)
    tags: list[str] | None = Field(None, max_length=32)
    expires_in: int | None = Field(None, ge=MIN_LIFE_S, le=MAX_LIFE_S, description="Seconds to keep it.")


@router.post(
    "/assets",
    status_code=201,
    openapi_extra=_UPLOAD,
    response_class=JSONResponse,
    responses={200: {"description": "Known bytes"}},
    dependencies=[Depends(Once())],
)
async def upload_asset(request: Request, runtime: Runtime, caller: CurrentCaller, comfy: Comfy) -> Response:
    """Upload a file. Its hash is computed here; bytes the caller uploaded before are not stored twice."""
    kind = request.headers.get("content-type", "")
    form = await read_form(kind, request.stream(), max_files=1, max_field_bytes=MAX_FIELD_BYTES, lists=("tags",))
    try:
        asset, is_new = await _keep(form, runtime, caller)
    finally:
        form.close()
    return JSONResponse({**comfy.asset(asset), "created_new": is_new}, 201 if is_new else 200)


async def _keep(form: Form, runtime: RuntimeState, caller: Caller) -> tuple[Asset, bool]:
    if not form.files or not form.files[0].size_bytes:
        details = {"parameter": "file", "allowed": "one file that is not empty"}
        raise Unprocessable("An upload is one file that is not empty.", code="invalid_parameter", details=details)
    part, fields = form.files[0], form.fields
    wanted = fields.get("expected_hash")
    asset, is_new = await runtime.assets.put_checked(
        caller.id,
        cast(File[bytes], form.open(part)),
        fields.get("content_type") or BYTES_TYPE,
        clean_name(fields.get("file_path") or part.filename),
        blake3=_parse_hash(wanted) if wanted else None,
        tags=tuple(form.lists.get("tags", ())),
        ttl_s=_parse_life(fields.get("expires_in")),
    )
    return asset, is_new


def _parse_hash(text: str) -> str:
    """The digits of `blake3:...`. Raises Conflict: bytes with such a hash there are none."""
    if not _HASH.fullmatch(text):
        details = {"parameter": "expected_hash", "value": text[:100], "allowed": "blake3: and 64 hexadecimal digits"}
        raise Conflict(f"{text[:100]!r} is no blake3 hash.", code="hash_mismatch", details=details)
    return text.partition(":")[2].lower()


def _parse_life(text: str | None) -> int | None:
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,7}", text) or not MIN_LIFE_S <= int(text) <= MAX_LIFE_S:
        details = {"parameter": "expires_in", "value": text[:100], "allowed": f"{MIN_LIFE_S} to {MAX_LIFE_S} seconds"}
        raise Unprocessable(f"expires_in is {text[:100]!r}.", code="invalid_parameter", details=details)
    return int(text)


async def _find(runtime: RuntimeState, caller: Caller, text: str, name: str | None = None) -> Asset:
    """The caller's asset with these bytes; that of this name where he has several."""
    digits = text.partition(":")[2] if _HASH.fullmatch(text) else None
    found = await runtime.assets.find(caller.id, blake3=digits, name=name) if digits else None
    if found is None:
        # Bytes of others are as absent as bytes that never were.
        raise NotFound("You have no asset with this hash.", code="blob_not_found", details={"parameter": "hash", "value": text[:100]})
    return found


@router.post(
    "/assets/from-hash",
    status_code=201,
    response_class=JSONResponse,
    responses={200: {"description": "An equal asset stood already"}},
    dependencies=[Depends(Once())],
)
async def asset_from_hash(wanted: FromHash, runtime: Runtime, caller: CurrentCaller, comfy: Comfy) -> Response:
    """An asset of bytes that the caller uploaded before, without sending them again."""
    name = clean_name(wanted.file_path) if wanted.file_path else None
    found = await _find(runtime, caller, wanted.hash, name)
    if name is None or found.name == name:
        kept = await runtime.assets.ready(caller.id, found.id)
        return JSONResponse({**comfy.asset(kept), "created_new": False}, 200)
    made = await runtime.assets.again(found, name, tags=tuple(wanted.tags or ()), ttl_s=wanted.expires_in)
    return JSONResponse({**comfy.asset(made), "created_new": False}, 201)


@router.head("/assets/by-hash/{digest}")
async def head_asset_by_hash(digest: str, runtime: Runtime, caller: CurrentCaller) -> Response:
    """Whether the caller has these bytes here: 200 or 404."""
    await _find(runtime, caller, digest)
    return Response(status_code=200)


async def _load_output(runtime: RuntimeState, caller: Caller, asset_id: str) -> tuple[Job, Output] | None:
    """The job and its output, when the id is that of an output. Raises NotFound when there is none of the caller's."""
    place = parse_output_id(asset_id)
    if place is None:
        return None
    job = await runtime.store.load(place[0])
    if job is None or job.spec.caller != caller.id or place[1] >= len(job.outputs):
        raise absent(asset_id)
    return job, job.outputs[place[1]]


@router.get("/assets/{asset_id}")
async def get_asset(asset_id: str, runtime: Runtime, caller: CurrentCaller, comfy: Comfy) -> dict[str, Any]:
    """An upload or an output, with a URL that was signed now."""
    if (found := await _load_output(runtime, caller, asset_id)) is not None:
        return comfy.output_as_asset(found[1], found[0])
    return comfy.asset(await runtime.assets.ready(caller.id, asset_id))


@router.get("/assets/{asset_id}/content", status_code=302, response_class=RedirectResponse)
async def get_asset_content(asset_id: str, runtime: Runtime, caller: CurrentCaller) -> RedirectResponse:
    """To a signed URL of the bytes. S3 answers ranges."""
    found = await _load_output(runtime, caller, asset_id)
    key = found[1].key if found is not None else (await runtime.assets.ready(caller.id, asset_id)).key
    return RedirectResponse(runtime.storage.sign(key), 302, headers={"Cache-Control": "no-store"})


@router.delete("/assets/{asset_id}", status_code=204)
async def delete_asset(asset_id: str, runtime: Runtime, caller: CurrentCaller) -> Response:
    """Forget an upload. An output goes with its job."""
    if (found := await _load_output(runtime, caller, asset_id)) is not None:
        hint = f"DELETE /v1/generations/{found[0].id} forgets the job with its outputs."
        raise Conflict(f"{asset_id} is an output.", code="asset_in_use", hint=hint)
    await runtime.assets.delete(caller.id, asset_id)
    return Response(status_code=204)
