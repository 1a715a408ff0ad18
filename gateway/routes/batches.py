"""`/v1/batches`: many pictures under one id. Each item becomes an ordinary generation; here is what concerns all of them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from gateway.batches.request import BatchRequest
from gateway.edge.bodies import read_idempotency_key
from gateway.edge.paging import MOST_LOOKED_AT, present_page
from gateway.errors import BadRequest, Conflict
from gateway.jobs.batch_records import LIVE, PACKET, WAITING, Batch
from gateway.jobs.model import Job, JobStatus
from gateway.presentation import present_batch, present_item
from gateway.routes.deps import BaseUrl, CurrentCaller, IdempotencyHeader, Once, OnceRoute, PageQuery, Runtime
from gateway.runtime import Runtime as RuntimeState

router = APIRouter(prefix="/v1/batches", tags=["batches"], route_class=OnceRoute)


def _present(batch: Batch, runtime: RuntimeState, base_url: str) -> dict[str, Any]:
    return present_batch(batch, base_url=base_url, storage=runtime.storage)


def _accepted(body: dict[str, Any], *, replayed: bool = False) -> JSONResponse:
    headers = {"Location": body["urls"]["self"], **({"Idempotency-Replayed": "true"} if replayed else {})}
    return JSONResponse(body, 202, headers=headers)


@router.post("", status_code=202, response_class=JSONResponse)
async def create_batch(
    request: BatchRequest,
    runtime: Runtime,
    caller: CurrentCaller,
    base_url: BaseUrl,
    idempotency_key: IdempotencyHeader = None,
) -> JSONResponse:
    """Accept up to 10,000 items, all of them or none. What is wrong with an item is said with its index."""
    key = read_idempotency_key(caller, idempotency_key, "batch", request)
    if key is not None and (replay := await runtime.store.find_replay(key)) is not None:
        batch_id, recorded = replay
        known = json.loads(recorded) if recorded else _present(await runtime.batches.load(batch_id, caller), runtime, base_url)
        return _accepted(known, replayed=True)
    webhook = await runtime.webhooks.accept(request.webhook, base_url)
    body = _present(await runtime.batches.admit(request, webhook, caller, key), runtime, base_url)
    known = await runtime.store.record_answer(key, json.dumps(body).encode()) if key is not None else None
    return _accepted(body) if known is None else _accepted(json.loads(known), replayed=True)


@router.get("")
async def list_batches(runtime: Runtime, caller: CurrentCaller, base_url: BaseUrl, page: PageQuery) -> dict[str, Any]:
    """The caller's batches, newest first. `next_cursor` is null on the last page."""
    pairs = await runtime.batch_store.ids_before(caller.id, page.behind, page.limit)
    found = [await runtime.batch_store.load(batch_id) for _, batch_id in pairs]
    kept = [batch for batch in found if batch is not None and not batch.deleted]
    return present_page((_present(batch, runtime, base_url) for batch in kept), page.last_of(pairs))


@router.get("/{batch_id}")
async def get_batch(batch_id: str, runtime: Runtime, caller: CurrentCaller, base_url: BaseUrl) -> dict[str, Any]:
    """How many of its items are how, and its archive when there is one."""
    return _present(await runtime.batches.load(batch_id, caller), runtime, base_url)


@router.get("/{batch_id}/items")
async def list_items(
    batch_id: str,
    runtime: Runtime,
    caller: CurrentCaller,
    base_url: BaseUrl,
    page: PageQuery,
    status: JobStatus | None = None,
) -> dict[str, Any]:
    """The items in order, each with its parameters, status and pictures. `next_cursor` is null on the last page; one that is filtered
    may hold fewer than `limit`, or none."""
    batch = await runtime.batches.load(batch_id, caller)
    place, found = _read_place(page.cursor), list[dict[str, Any]]()
    most = place + MOST_LOOKED_AT
    while place < min(most, len(batch.states)) and len(found) < page.limit:
        number = place // PACKET
        stop = (number + 1) * PACKET
        specs = [item.spec for item in await runtime.batch_store.packet(batch_id, number)][place - number * PACKET :]
        wanted = [
            (index, spec) for index, spec in enumerate(specs, place) if status is None or batch.item_status(index, spec.id) is status
        ][: page.limit - len(found)]
        jobs = await _load_jobs(runtime, batch, wanted)
        found += [
            present_item(index, spec, batch.item_status(index, spec.id), jobs.get(spec.id), base_url=base_url, storage=runtime.storage)
            for index, spec in wanted
        ]
        place = wanted[-1][0] + 1 if len(found) == page.limit else stop
    return {"data": found, "next_cursor": str(place) if place < len(batch.states) else None}


async def _load_jobs(runtime: RuntimeState, batch: Batch, wanted: list[tuple[int, Any]]) -> dict[str, Job]:
    ids = [spec.id for index, spec in wanted if batch.states[index] != WAITING]
    return {job.id: job for job in await runtime.store.load_many(ids)} if ids else {}


def _read_place(cursor: str | None) -> int:
    if cursor is not None and not (cursor.isascii() and cursor.isdigit() and len(cursor) <= 6):
        raise BadRequest("The cursor is not one of ours.", details={"parameter": "cursor", "value": cursor[:100]})
    return int(cursor or 0)


@router.post("/{batch_id}/cancel", dependencies=[Depends(Once())])
async def cancel_batch(batch_id: str, runtime: Runtime, caller: CurrentCaller, base_url: BaseUrl) -> dict[str, Any]:
    """Stop all of it: what waits is gone at once, what runs is stopped, what has ended stays as it is."""
    await runtime.batches.load(batch_id, caller)
    await runtime.batches.cancel(batch_id)
    return _present(await runtime.batches.load(batch_id, caller), runtime, base_url)


@router.post("/{batch_id}/archive", status_code=202, response_class=JSONResponse, dependencies=[Depends(Once())])
async def make_archive(batch_id: str, runtime: Runtime, caller: CurrentCaller, base_url: BaseUrl) -> JSONResponse:
    """Have all pictures put into one zip; `archive` of the batch says how far it is, and its signed URL when it is ready."""
    batch = await runtime.batches.load(batch_id, caller)
    _require_end(batch)
    if batch.archive is None or batch.archive.status == "failed":
        await runtime.batch_store.want_archive(batch_id)
        batch = await runtime.batches.load(batch_id, caller)
    return _accepted(_present(batch, runtime, base_url))


@router.get("/{batch_id}/contact-sheet")
async def get_contact_sheet(
    batch_id: str, runtime: Runtime, caller: CurrentCaller, page: Annotated[int, Query(ge=1, le=100, description="Of 100 items each.")] = 1
) -> dict[str, Any]:
    """A picture of the items' first pictures in small, a hundred on a page, at a signed URL. Made when it is asked for."""
    batch = await runtime.batches.load(batch_id, caller)
    return await runtime.batch_pictures.contact_sheet(batch, page)


class DeletedBatch(BaseModel):
    id: str
    object: Literal["batch.deleted"] = "batch.deleted"


@router.delete("/{batch_id}")
async def delete_batch(batch_id: str, runtime: Runtime, caller: CurrentCaller) -> DeletedBatch:
    """Forget a batch that has ended, its jobs and all their pictures. It is out of sight at once; clearing away takes a while."""
    _require_end(await runtime.batches.load(batch_id, caller))
    await runtime.batch_store.delete(batch_id)
    return DeletedBatch(id=batch_id)


def _require_end(batch: Batch) -> None:
    if batch.ended_ms is None:
        waiting = sum(letter in (WAITING, LIVE) for letter in batch.states)
        details = {"status": batch.status, "unfinished": waiting}
        raise Conflict(f"{batch.id} is {batch.status}.", code="batch_not_ended", hint="Cancel it, or wait for its end.", details=details)
