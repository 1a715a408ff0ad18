"""`POST /v1/datasets/{id}/captions`: missing captions, filled by a provider as a job. It is watched and canceled like a training."""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import APIRouter, Header
from fastapi.responses import JSONResponse

from gateway.captioning import CaptionRequest
from gateway.datasets import absent
from gateway.jobs.records import IdempotencyKey
from gateway.presentation import present_training
from gateway.routes.deps import BaseUrl, Runtime, Trainer

router = APIRouter(prefix="/v1", tags=["datasets"])


@router.post("/datasets/{dataset_id}/captions", status_code=202, response_class=JSONResponse)
async def caption_dataset(
    dataset_id: str,
    runtime: Runtime,
    caller: Trainer,
    base_url: BaseUrl,
    request: CaptionRequest | None = None,
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
) -> JSONResponse:
    """Caption the pictures that have no caption of their own. `urls.events` shows each as it is written."""
    asked, dataset = request or CaptionRequest.model_validate({}), await runtime.datasets.load(dataset_id)
    if dataset is None or dataset.caller != caller.id:
        raise absent(dataset_id)
    key = None
    if idempotency_key:
        body_hash = hashlib.sha256(f"captioning {dataset_id} {asked.model_dump_json()}".encode()).hexdigest()
        key = IdempotencyKey(caller.id, idempotency_key, body_hash)
    body = present_training(await runtime.captionings.admit(dataset, asked, caller, key), base_url=base_url)
    return JSONResponse(body, 202, headers={"Location": body["urls"]["self"]})
