"""Uploads that were sent before, gathered as if they had come as files of a form: one spool, whatever their number.

It knows assets and forms, and nothing of datasets.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from typing import BinaryIO, cast

from pydantic import BaseModel, ConfigDict, Field

from gateway.datasets.arrivals import MAX_NAME_LENGTH, clean_name
from gateway.edge.multipart import Form, Part
from gateway.errors import NotFound, PayloadTooLarge
from gateway.inputs.asset_records import Asset
from gateway.inputs.assets import AssetStore, absent

MAX_BYTES = 1 << 30


class UploadUse(BaseModel):
    """One upload as a file of a dataset."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(description="Of an upload.", min_length=1, max_length=100)
    name: str | None = Field(None, description="Absent: the upload's own name.", min_length=1, max_length=MAX_NAME_LENGTH)
    caption: str | None = Field(None, description="What it shows.", max_length=16 << 10)


async def gather(uses: Sequence[UploadUse], caller: str, assets: AssetStore) -> tuple[Form, dict[str, str]]:
    """(form, caption by path). Every file has a folder of its own, so that equal names stay apart. Raises NotFound, PayloadTooLarge."""
    found = [await _find(use, number, caller, assets) for number, use in enumerate(uses)]
    if (total := sum(asset.size_bytes for asset in found)) > MAX_BYTES:
        details = {"parameter": "uploads", "value": total, "allowed": MAX_BYTES}
        raise PayloadTooLarge(f"The uploads have {total} bytes together; at most {MAX_BYTES} are taken at once.", details=details)
    # Unbuffered: readers go by the descriptor.
    form = Form(cast(BinaryIO, tempfile.TemporaryFile(buffering=0)))  # noqa: SIM115  closed by the form
    captions: dict[str, str] = {}
    try:
        for number, (use, asset) in enumerate(zip(uses, found, strict=True)):
            path = f"{number}/{clean_name(use.name or asset.name or asset.id)}"
            await _spool(form, path, asset, assets)
            if use.caption is not None:
                captions[path] = use.caption
    except BaseException:  # boundary: whatever ends the gathering, the file goes with it
        form.close()
        raise
    return form, captions


async def _find(use: UploadUse, number: int, caller: str, assets: AssetStore) -> Asset:
    try:
        return await assets.ready(caller, use.id)
    except NotFound as error:
        raise absent(use.id, parameter=f"uploads.{number}.id") from error


async def _spool(form: Form, path: str, asset: Asset, assets: AssetStore) -> None:
    start = await asyncio.to_thread(form.spool.tell)
    await assets.copy_to(form.spool, asset)
    form.files.append(Part(path, start, asset.size_bytes))
