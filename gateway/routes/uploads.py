"""`/v1/uploads`: files to be used by later requests. They go straight to S3, or through here when they are small."""

from __future__ import annotations

from typing import IO as File
from typing import Any, Literal, cast

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from gateway.datasets.arrivals import MAX_NAME_LENGTH, clean_name
from gateway.datasets.intake import CONTENT_TYPES, sniff
from gateway.edge.bodies import check, read_json
from gateway.edge.multipart import Form, read_form
from gateway.edge.paging import present_page
from gateway.errors import PayloadTooLarge, Unprocessable
from gateway.inputs.asset_records import Asset
from gateway.inputs.assets import BYTES_TYPE
from gateway.presentation import rfc3339
from gateway.routes.deps import AnyCaller, BaseUrl, Once, OnceRoute, PageQuery, Runtime
from gateway.runtime import Runtime as RuntimeState

router = APIRouter(prefix="/v1", tags=["uploads"], route_class=OnceRoute)

MAX_FIELD_BYTES = 4096


class NewUpload(BaseModel):
    """What will be sent. All of it is part of the signature."""

    model_config = ConfigDict(extra="forbid")

    content_type: str = Field(description="Media type, such as `image/png`.", min_length=3, max_length=130)
    size_bytes: int = Field(description="Exact length.", ge=1, strict=True)
    sha256: str = Field(description="In hexadecimal.", pattern=r"^[0-9a-fA-F]{64}$")
    name: str | None = Field(None, description="For people.", min_length=1, max_length=MAX_NAME_LENGTH)


_JSON_BODY = NewUpload.model_json_schema()
_FORM_BODY = {"type": "object", "required": ["file"], "properties": {"file": {"type": "string", "format": "binary"}}}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": _JSON_BODY}, "multipart/form-data": {"schema": _FORM_BODY}},
    }
}


def present_upload(asset: Asset, runtime: RuntimeState, base_url: str) -> dict[str, Any]:
    return {
        "id": asset.id,
        "object": "upload",
        "status": asset.status,
        "name": asset.name,
        "content_type": asset.content_type,
        "size_bytes": asset.size_bytes,
        "sha256": asset.sha256,
        "width": asset.width,
        "height": asset.height,
        "created_at": rfc3339(asset.created_ms),
        "expires_at": rfc3339(asset.expires_ms),
        "content_url": runtime.storage.sign(asset.key) if asset.status == "ready" else None,
        "urls": {"self": f"{base_url}/v1/uploads/{asset.id}"},
    }


@router.post("/uploads", status_code=201, openapi_extra=_BODY, response_class=JSONResponse, dependencies=[Depends(Once("url", "headers"))])
async def create_upload(request: Request, runtime: Runtime, caller: AnyCaller, base_url: BaseUrl) -> JSONResponse:
    """Promise a file (JSON) and get a signed URL to PUT it to, or send it here (multipart): then it is ready at once."""
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        shown = present_upload(await _take_form(request, runtime, caller.id), runtime, base_url)
    else:
        shown = await _promise(await request.body(), runtime, caller.id, base_url)
    return JSONResponse(shown, 201, headers={"Location": shown["urls"]["self"]})


async def _promise(body: bytes, runtime: RuntimeState, caller: str, base_url: str) -> dict[str, Any]:
    wanted = check(TypeAdapter(NewUpload), read_json(body))
    allowed = runtime.settings.max_asset_bytes
    if wanted.size_bytes > allowed:
        details = {"parameter": "size_bytes", "value": wanted.size_bytes, "allowed": allowed}
        raise PayloadTooLarge(f"The file would have {wanted.size_bytes} bytes; at most {allowed} are allowed.", details=details)
    name = clean_name(wanted.name) if wanted.name else None
    promise = await runtime.assets.presign(caller, wanted.content_type, wanted.size_bytes, wanted.sha256, name)
    how = {"method": "PUT", "url": promise.url, "headers": promise.headers, "url_expires_at": rfc3339(promise.expires_ms)}
    return {**present_upload(promise.asset, runtime, base_url), **how}


async def _take_form(request: Request, runtime: RuntimeState, caller: str) -> Asset:
    kind = request.headers.get("content-type", "")
    form = await read_form(kind, request.stream(), max_files=1, max_field_bytes=MAX_FIELD_BYTES)
    try:
        return await _keep(form, runtime, caller)
    finally:
        form.close()


async def _keep(form: Form, runtime: RuntimeState, caller: str) -> Asset:
    if not form.files or not form.files[0].size_bytes or form.fields:
        details = {"parameter": next(iter(form.fields), "file"), "allowed": "one file that is not empty, as `file`"}
        raise Unprocessable("An upload is one file that is not empty.", code="invalid_parameter", details=details)
    part = form.files[0]
    file = form.open(part)
    content_type = CONTENT_TYPES.get(sniff(file.read(64)) or "", BYTES_TYPE)
    file.seek(0)
    return await runtime.assets.put_file(caller, cast(File[bytes], file), content_type, clean_name(part.filename))


@router.get("/uploads")
async def list_uploads(runtime: Runtime, caller: AnyCaller, base_url: BaseUrl, page: PageQuery) -> dict[str, Any]:
    """The caller's uploads, newest first. `next_cursor` is null on the last page."""
    found, pairs = await runtime.assets.page(caller.id, page.behind, page.limit)
    return present_page((present_upload(asset, runtime, base_url) for asset in found), page.last_of(pairs))


@router.get("/uploads/{upload_id}")
async def get_upload(upload_id: str, runtime: Runtime, caller: AnyCaller, base_url: BaseUrl) -> dict[str, Any]:
    """An upload. `content_url` reads it once it is ready; `pending` ones are looked at when they are first used."""
    return present_upload(await runtime.assets.load(caller.id, upload_id), runtime, base_url)


class Deleted(BaseModel):
    id: str
    object: Literal["upload.deleted"] = "upload.deleted"


@router.delete("/uploads/{upload_id}")
async def delete_upload(upload_id: str, runtime: Runtime, caller: AnyCaller) -> Deleted:
    """Forget an upload. Jobs that were made with it keep their own copy for as long as they are kept."""
    await runtime.assets.delete(caller.id, upload_id)
    return Deleted(id=upload_id)
