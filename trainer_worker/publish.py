"""From finished weights to a LoRA that works: checked, named by content, stored in S3, announced. Dispatchers bring it to instances."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

from gateway.jobs.model import Job, now_ms
from gateway.jobs.records import Claim
from gateway.loras.registry import Lora, LoraRegistry
from gateway.storage import Storage
from trainer_worker.lora import inspect_lora
from trainer_worker.lora_publish import publish_lora

SETTINGS = ("steps", "learning_rate", "rank", "resolution", "batch_size", "lr_scheduler", "optimizer", "seed")


@dataclass(frozen=True, slots=True)
class Origin:
    """What is said of a file by whoever made or sent it. `family` None: the file alone says it."""

    family: str | None
    base_model: str | None
    trigger_word: str | None
    training: str | None = None
    settings: str | None = None
    source: str | None = None

    def metadata(self) -> dict[str, str]:
        """What goes into the file."""
        said = {"base_model": self.base_model, "trigger_word": self.trigger_word, "training": self.training, "settings": self.settings}
        return {key: value for key, value in said.items() if value is not None}


def describe_training(job: Job, precision: str) -> Origin:
    """The origin of a training's weights; `precision` is the frozen base's."""
    parameters = job.spec.parameters
    return Origin(
        family=str(parameters["family"]),
        base_model=job.spec.base_model,
        trigger_word=str(parameters.get("trigger_word") or ""),
        training=job.id,
        settings=json.dumps({**{setting: parameters.get(setting) for setting in SETTINGS}, "precision": precision}),
    )


async def publish(
    weights: Path, storage: Storage, loras: LoraRegistry, folder: Path, claim: Claim, *, name: str, origin: Origin
) -> Lora | None:
    """Publish a file as the LoRA `name` of the job's caller; None when the job was canceled before that.

    Raises LoraRefused when ComfyUI could not apply it.
    """
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    report = await asyncio.to_thread(inspect_lora, weights, family=origin.family)
    published = await asyncio.to_thread(publish_lora, weights, folder, name, metadata=origin.metadata(), family=origin.family)
    lora = Lora(
        name=name,
        file=published.path.name,
        family=report.family,
        base_model=origin.base_model,
        trigger_word=origin.trigger_word or None,
        sha256=published.sha256,
        size_bytes=published.path.stat().st_size,
        rank=report.rank,
        format=report.naming,
        patched_layers=report.coverage.patched,
        training=origin.training,
        owner=claim.job.spec.caller,
        source=origin.source,
        created_ms=now_ms(),
    )
    await storage.put_file(lora.key, published.path)
    if await loras.announce(lora, claim):
        return lora
    if all(known.file != lora.file for known in await loras.published()):
        await storage.delete([lora.key])
    return None
