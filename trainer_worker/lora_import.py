"""One attempt at an import: the file is fetched, must be what was promised, and goes through the door of a training's weights."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from gateway.errors import NotFound, Unprocessable
from gateway.jobs.model import JobStatus
from gateway.loras.registry import Lora, Source
from gateway.outside.urls import Outside
from trainer_worker.held import Held
from trainer_worker.lora import check_file_name
from trainer_worker.publish import Origin, publish

FETCH_S = 1800.0
LOOK_S = 0.2


async def import_lora(held: Held) -> None:
    """From the claim to a published LoRA. Raises FluxgateError and OSError for what keeps it from being one."""
    folder = held.settings.training_dir.absolute() / held.claim.id
    await held.journal.start("fetch", "The file is fetched.")
    try:
        await asyncio.to_thread(_make_empty, folder)
        lora = await _unless_stopped(held, _take_in(held, folder))
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, True)
    held.require_lease()
    if lora is None:
        await held.journal.finish(JobStatus.CANCELED)
        return
    await held.journal.wait_until_ready(lora, held.loras, held.registry)
    await held.journal.finish(JobStatus.SUCCEEDED, lora=lora.name)


def _make_empty(folder: Path) -> None:
    """What an attempt before this one left is half a file."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


async def _unless_stopped(held: Held, work: Coroutine[Any, Any, Lora | None]) -> Lora | None:
    """None: it was to stop, and did."""
    task = asyncio.create_task(work)
    try:
        while not (await asyncio.wait({task}, timeout=LOOK_S))[0]:
            if held.stop.is_set():
                return None
        return await task
    finally:
        task.cancel()


async def _take_in(held: Held, folder: Path) -> Lora | None:
    asked = held.claim.job.spec.parameters
    given = await held.store.source_of(held.claim.id)
    if given is None:
        raise NotFound("Where the file is to come from is not known any more.", code="lora_source_gone", hint="Ask for the import again.")
    path = folder / "source.safetensors"
    await _fetch(held, Source.model_validate_json(given), path)
    await _require_hash(path, asked.get("sha256"))
    await held.journal.stage("publish", "The LoRA is checked and stored.")
    return await publish(
        path,
        held.storage,
        held.loras,
        folder / "published",
        held.claim,
        name=str(asked["name"]),
        origin=Origin(
            family=asked.get("family"),
            base_model=held.claim.job.spec.base_model or None,
            trigger_word=asked.get("trigger_word"),
            source=str(asked.get("url") or "upload"),
            # Files are named by their bytes: the same one imported by two callers is two files, so that neither has the other's.
            settings=json.dumps({"for": hashlib.sha256(held.claim.job.spec.caller.encode()).hexdigest()[:16]}),
        ),
    )


async def _fetch(held: Held, source: Source, path: Path) -> None:
    most = held.settings.max_asset_bytes
    if source.key is not None:
        check_file_name(source.name)
        if source.size_bytes > most:
            raise Unprocessable(f"The file has {source.size_bytes} bytes; at most {most} are taken.", code="lora_too_large")
        await held.storage.get_file(source.key, path)
        return
    outside = Outside(held.settings.allow_private_urls)
    try:
        await outside.fetch_to(path, source.url or "", parameter="url", max_bytes=most, timeout_s=FETCH_S)
    finally:
        outside.close()


async def _require_hash(path: Path, wanted: str | None) -> None:
    if wanted is None:
        return
    found = await asyncio.to_thread(_hash, path)
    if found != wanted.lower():
        details = {"parameter": "sha256", "value": found, "allowed": wanted.lower()}
        raise Unprocessable("The file has another sha256 than was promised.", code="lora_mismatch", details=details)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
