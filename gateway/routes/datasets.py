"""`/v1/datasets`: pictures with captions, what a training would make of them, and what is wrong with them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator

from gateway.auth import Caller
from gateway.datasets.curation import Taken
from gateway.datasets.preflight import Report, report
from gateway.datasets.preflight_rules import Plan
from gateway.datasets.records import DEFAULT_TEMPLATE, MAX_FILES, TRIGGER_SLOT, Asset, Dataset, DatasetFile, DatasetHead
from gateway.datasets.store import absent
from gateway.datasets.upload_forms import UploadUse, gather
from gateway.edge.bodies import check, read_json
from gateway.edge.multipart import Form, read_form
from gateway.edge.paging import present_page
from gateway.errors import NotFound
from gateway.jobs.model import new_job_id, now_ms
from gateway.presentation import rfc3339
from gateway.routes.deps import BaseUrl, Once, OnceRoute, PageQuery, Runtime, Trainer
from gateway.runtime import Runtime as RuntimeState

router = APIRouter(prefix="/v1", tags=["datasets"], route_class=OnceRoute)

MAX_FIELD_BYTES = 4 << 20  # a thousand captions

PlainText = Annotated[str, Field(min_length=1, max_length=200)]


class _Fields(BaseModel):
    """The fields of the form beside its files."""

    model_config = ConfigDict(extra="forbid")

    captions: dict[str, str] = Field(default_factory=dict, description="File name -> caption, as JSON.")

    @field_validator("captions", mode="before")
    @classmethod
    def _parse(cls, value: object) -> object:
        try:
            return json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            raise ValueError('captions must be a JSON object such as {"a.png": "a red cup"}') from None

    @field_validator("*")
    @classmethod
    def _refuse_control(cls, value: object) -> object:
        if isinstance(value, str) and not value.isprintable():
            raise ValueError("must be one line of printable characters")
        return value


class NewDataset(_Fields):
    name: PlainText = Field("dataset", description="For people; need not be unique.")
    asset: Asset = Field("image", description="`image` takes PNG, JPEG and WebP; `video` takes MP4 and WebM.")
    trigger_word: PlainText | None = Field(None, description="The word that is to call up what is learned.")
    caption_template: PlainText = Field(
        DEFAULT_TEMPLATE, description=f"Caption of a file without one; `{TRIGGER_SLOT}` is the trigger word."
    )

    @field_validator("caption_template")
    @classmethod
    def _need_slot(cls, value: str) -> str:
        if TRIGGER_SLOT not in value:
            raise ValueError(f"must hold {TRIGGER_SLOT}, as in 'a photo of {TRIGGER_SLOT}'")
        return value


class AddedFiles(_Fields):
    pass


F = TypeVar("F", bound=_Fields)
Uploads = Annotated[list[UploadUse], Field(min_length=1, max_length=2 * MAX_FILES, description="Pictures, captions (.txt), or one zip.")]


def _describe_body(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI of a body: files in a form, or uploads by id."""
    fields = model.model_json_schema()["properties"]
    files = {"type": "array", "items": {"type": "string", "format": "binary"}, "description": "Pictures, captions (.txt), or one zip."}
    uploads = TypeAdapter(Uploads).json_schema()
    uploads["items"] = UploadUse.model_json_schema()
    uploads.pop("$defs", None)
    content = {
        "multipart/form-data": {"schema": {"type": "object", "properties": {"files": files, **fields}}},
        "application/json": {"schema": {"type": "object", "required": ["uploads"], "properties": {"uploads": uploads, **fields}}},
    }
    return {"requestBody": {"required": True, "content": content}}


@asynccontextmanager
async def _open_body(request: Request, model: type[F], runtime: RuntimeState, caller: Caller) -> AsyncIterator[tuple[Form, F]]:
    """The files and the fields of either kind of body."""
    kind = request.headers.get("content-type", "")
    if kind.startswith("application/json"):
        body = read_json(await request.body())
        uses = check(TypeAdapter(Uploads), body.pop("uploads", []), "uploads")
        fields = check(TypeAdapter(model), body)
        form, captions = await gather(uses, caller.id, runtime.assets)
        fields = fields.model_copy(update={"captions": {**captions, **fields.captions}})
    else:
        # A picture and its caption each.
        form = await read_form(kind, request.stream(), max_files=2 * MAX_FILES, max_field_bytes=MAX_FIELD_BYTES)
        fields = check(TypeAdapter(model), form.fields)
    try:
        yield form, fields
    finally:
        form.close()


async def load_own_dataset(runtime: RuntimeState, caller: Caller, dataset_id: str) -> Dataset:
    """The caller's dataset. Somebody else's is as absent as one that never was."""
    dataset = await runtime.datasets.load(dataset_id)
    if dataset is None or dataset.caller != caller.id:
        raise absent(dataset_id)
    return dataset


def _plan(
    resolution: Annotated[int, Query(ge=64, le=2048, description="Pixels of a square's side.")] = 1024,
    batch_size: Annotated[int, Query(ge=1, le=64)] = 1,
    repeats: Annotated[int, Query(ge=0, le=1000, description="Further looks at each file in an epoch.")] = 0,
    steps: Annotated[int | None, Query(ge=1, le=1_000_000)] = None,
    trigger_word: Annotated[str | None, Query(min_length=1, max_length=200)] = None,
    video_frames: Annotated[int, Query(ge=5, le=1025, description="Frames taken of each clip.")] = 49,
) -> Plan:
    return Plan(
        resolution=resolution, batch_size=batch_size, repeats=repeats, steps=steps, trigger_word=trigger_word, video_frames=video_frames
    )


PlanQuery = Annotated[Plan, Depends(_plan)]


def inspect_dataset(dataset: Dataset, plan: Plan) -> Report:
    """The report on a dataset; its own trigger word stands where the plan has none."""
    words = {"trigger_word": plan.trigger_word or dataset.trigger_word, "caption_template": dataset.caption_template}
    return report(dataset.files, plan.model_copy(update=words), dataset.asset)


def _present_summary(dataset: Dataset, base_url: str) -> dict[str, Any]:
    return {
        "id": dataset.id,
        "object": "dataset",
        "name": dataset.name,
        "asset": dataset.asset,
        "trigger_word": dataset.trigger_word,
        "caption_template": dataset.caption_template,
        "file_count": len(dataset.files),
        "size_bytes": sum(file.size_bytes for file in dataset.files if file.key),
        "created_at": rfc3339(dataset.created_ms),
        "updated_at": rfc3339(dataset.updated_ms),
        "urls": {"self": f"{base_url}/v1/datasets/{dataset.id}", "files": f"{base_url}/v1/datasets/{dataset.id}/files"},
    }


def _present_file(file: DatasetFile, dataset: Dataset, runtime: RuntimeState) -> dict[str, Any]:
    record = file.model_dump(mode="json", exclude={"key", "phash"})
    return {
        **record,
        "caption_used": dataset.caption_of(file),
        "url": runtime.storage.sign(file.key) if file.key else None,
    }


def _present(dataset: Dataset, plan: Plan, runtime: RuntimeState, base_url: str, taken: Taken | None = None) -> dict[str, Any]:
    shown = {
        **_present_summary(dataset, base_url),
        "files": [_present_file(file, dataset, runtime) for file in dataset.files],
        "preflight": inspect_dataset(dataset, plan).model_dump(mode="json"),
    }
    if taken is not None:
        notices = [notice.model_dump(mode="json") for notice in taken.notices]
        shown["upload"] = {"stored": taken.stored, "refused": taken.refused, "captions": taken.captions, "notices": notices}
    return shown


@router.post(
    "/datasets", status_code=201, openapi_extra=_describe_body(NewDataset), response_class=JSONResponse, dependencies=[Depends(Once())]
)
async def create_dataset(request: Request, plan: PlanQuery, runtime: Runtime, caller: Trainer, base_url: BaseUrl) -> Response:
    """Make a dataset of pictures and captions, or of one zip of them; the answer says what a training would make of it."""
    async with _open_body(request, NewDataset, runtime, caller) as (form, fields):
        head = DatasetHead(
            id=new_job_id("ds"),
            caller=caller.id,
            created_ms=now_ms(),
            **fields.model_dump(include=set(NewDataset.model_fields) - {"captions"}),
        )
        dataset, taken = await runtime.curation.create(head, form, fields.captions)
    body = await asyncio.to_thread(_present, dataset, plan, runtime, base_url, taken)
    return JSONResponse(body, 201, headers={"Location": body["urls"]["self"]})


@router.get("/datasets")
async def list_datasets(runtime: Runtime, caller: Trainer, base_url: BaseUrl, page: PageQuery) -> dict[str, Any]:
    """The caller's datasets, newest first. `next_cursor` is null on the last page."""
    pairs = await runtime.datasets.ids_before(caller.id, page.behind, page.limit)
    found = [dataset for _, dataset_id in pairs if (dataset := await runtime.datasets.load(dataset_id)) is not None]
    return present_page((_present_summary(dataset, base_url) for dataset in found), page.last_of(pairs))


@router.get("/datasets/{dataset_id}")
async def get_dataset(dataset_id: str, plan: PlanQuery, runtime: Runtime, caller: Trainer, base_url: BaseUrl) -> dict[str, Any]:
    """The dataset, its files and the preflight report under these settings. Picture URLs are signed anew at each read."""
    return await asyncio.to_thread(_present, await load_own_dataset(runtime, caller, dataset_id), plan, runtime, base_url)


@router.put("/datasets/{dataset_id}/files", openapi_extra=_describe_body(AddedFiles))
async def add_dataset_files(
    dataset_id: str, request: Request, plan: PlanQuery, runtime: Runtime, caller: Trainer, base_url: BaseUrl
) -> dict[str, Any]:
    """Add pictures and captions, or replace those of the same names."""
    # First whether it may be, then the body.
    dataset = await load_own_dataset(runtime, caller, dataset_id)
    async with _open_body(request, AddedFiles, runtime, caller) as (form, fields):
        dataset, taken = await runtime.curation.add(dataset, form, fields.captions)
    return await asyncio.to_thread(_present, dataset, plan, runtime, base_url, taken)


@router.delete("/datasets/{dataset_id}/files/{name:path}")
async def remove_dataset_file(
    dataset_id: str, name: str, plan: PlanQuery, runtime: Runtime, caller: Trainer, base_url: BaseUrl
) -> dict[str, Any]:
    """Take one picture out, with its caption."""
    dataset = await load_own_dataset(runtime, caller, dataset_id)
    if not await runtime.curation.remove(dataset, name):
        details = {"parameter": "name", "value": name[:200]}
        raise NotFound(f"There is no file {name[:200]!r} in {dataset_id}.", code="dataset_file_not_found", details=details)
    return await asyncio.to_thread(_present, await load_own_dataset(runtime, caller, dataset_id), plan, runtime, base_url)


class Deleted(BaseModel):
    id: str
    object: Literal["dataset.deleted"] = "dataset.deleted"


@router.delete("/datasets/{dataset_id}")
async def delete_dataset(dataset_id: str, runtime: Runtime, caller: Trainer) -> Deleted:
    """Forget a dataset and its pictures."""
    await runtime.curation.delete(await load_own_dataset(runtime, caller, dataset_id))
    return Deleted(id=dataset_id)
