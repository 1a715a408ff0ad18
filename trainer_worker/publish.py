"""From finished weights to a LoRA that works: checked, named by content, stored in S3, announced. Dispatchers bring it to instances."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from gateway.jobs.model import Job, now_ms
from gateway.loras import Lora, LoraRegistry
from gateway.storage import Storage
from trainer_worker.lora import inspect_lora
from trainer_worker.lora_publish import publish_lora

SETTINGS = ("steps", "learning_rate", "rank", "resolution", "batch_size", "lr_scheduler", "optimizer", "seed")


async def publish(weights: Path, job: Job, storage: Storage, loras: LoraRegistry, folder: Path, precision: str) -> Lora:
    """Publish a training's weights; `precision` is the frozen base's. Raises LoraRefused when ComfyUI could not apply them."""
    parameters = job.spec.parameters
    family, name, trigger = str(parameters["family"]), str(parameters["name"]), str(parameters.get("trigger_word") or "")
    metadata = {
        "base_model": job.spec.base_model,
        "trigger_word": trigger,
        "training": job.id,
        "settings": json.dumps({**{setting: parameters.get(setting) for setting in SETTINGS}, "precision": precision}),
    }
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    report = await asyncio.to_thread(inspect_lora, weights, family=family)
    published = await asyncio.to_thread(publish_lora, weights, folder, name, metadata=metadata, family=family)
    lora = Lora(
        name=name,
        file=published.path.name,
        family=report.family,
        base_model=job.spec.base_model,
        trigger_word=trigger or None,
        sha256=published.sha256,
        size_bytes=published.path.stat().st_size,
        rank=report.rank,
        format=report.naming,
        patched_layers=report.coverage.patched,
        training=job.id,
        created_ms=now_ms(),
    )
    await storage.put_file(lora.key, published.path)
    await loras.announce(lora)
    return lora
