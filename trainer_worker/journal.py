"""What a training tells: its stages, steps, checkpoints and samples as events of its job, and its one ending."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from gateway.errors import Moderated, ModerationUnavailable, RedisUnavailable, StorageUnavailable
from gateway.instances import InstanceRegistry
from gateway.jobs.model import EventKind, Job, JobError, JobStatus, Progress, now_ms
from gateway.jobs.records import Claim, EventDraft, status_event
from gateway.jobs.trainings import TrainingStore
from gateway.loras.registry import Lora, LoraRegistry
from gateway.moderation.verdicts import Moderation
from gateway.storage import Storage
from trainer_worker.progress import Checkpoint, Notice, Sample, Stage, Step, TrainerEvent

T = TypeVar("T")

READY_WAIT_S = 60.0
# The newest steps tell how fast it goes now; caching and the first compile are behind them.
PACE_STEPS = 20


class Journal:
    """The only writer of a claimed training. Redis may be away for a while: every write is tried until it is back."""

    def __init__(self, claim: Claim, store: TrainingStore, storage: Storage, moderation: Moderation) -> None:
        self._claim, self._store, self._storage, self._moderation = claim, store, storage, moderation
        self._job: Job = claim.job
        self._steps: list[tuple[int, float]] = []
        self._samples = 0

    async def start(self, stage: str, message: str) -> None:
        """It is being worked on now."""
        started = self._job.started_ms or now_ms()
        metrics = self._job.metrics.model_copy(update={"queue_ms": started - self._job.spec.created_ms})
        self._job = self._job.model_copy(update={"status": JobStatus.RUNNING, "started_ms": started, "metrics": metrics})
        await self._write([status_event(self._job)])
        await self.stage(stage, message)

    async def stage(self, stage: str, message: str) -> None:
        progress = self._job.progress.model_copy(update={"current_node": stage, "message": message})
        if progress != self._job.progress:
            await self.show(progress)

    async def plan(self, plan: dict[str, Any], message: str) -> None:
        """What was chosen for this machine, into the record and its events."""
        self._job = self._job.model_copy(update={"plan": plan})
        await self._write([(EventKind.LOG, "", json.dumps({"message": message, "plan": plan}))], plan=plan)

    async def note(self, message: str) -> None:
        """A line for people."""
        await self._write([(EventKind.LOG, "", json.dumps({"message": message}))])

    async def tell_all(self, heard: asyncio.Queue[TrainerEvent | None]) -> None:
        """Tell events in their order until None comes."""
        while (event := await heard.get()) is not None:
            await self._tell(event)

    async def _tell(self, event: TrainerEvent) -> None:
        if isinstance(event, Step):
            await self.show(self._progress_of(event))
        elif isinstance(event, Stage):
            counted = f" {event.current}/{event.total}" if event.total else ""
            await self.stage(event.name, f"{event.label or event.name}{counted}")
        elif isinstance(event, Checkpoint):
            await self._write([(EventKind.CHECKPOINT, "", json.dumps({"step": event.step}))])
        elif isinstance(event, Sample):
            await self._tell_sample(event)
        elif isinstance(event, Notice):
            await self.note(event.message)

    def _progress_of(self, step: Step) -> Progress:
        self._steps = [*self._steps[-PACE_STEPS:], (step.step, time.monotonic())]
        (first, began), (last, now) = self._steps[0], self._steps[-1]
        pace_s = (now - began) / (last - first) if last > first else None
        return Progress(
            value=round(step.step / max(1, step.steps), 4),
            current_node="training",
            step=step.step,
            steps=step.steps,
            loss=step.loss,
            learning_rate=step.learning_rate,
            eta_s=round(pace_s * (step.steps - step.step), 1) if pace_s is not None else None,
        )

    async def _tell_sample(self, sample: Sample) -> None:
        """The picture goes to S3; one that cannot be stored, or may not be seen, is only not shown, the training goes on."""
        extension = sample.media_type.rpartition("/")[2]
        key = f"trainings/{self._claim.id}/samples/{sample.step}-{self._samples}.{extension}"
        self._samples += 1
        try:
            await self._moderation.require_picture(sample.image, sample.media_type, self._job.spec)
            await self._storage.put(key, sample.image, sample.media_type)
        except (StorageUnavailable, Moderated, ModerationUnavailable) as error:
            await self.note(f"A sample was not stored: {error.message}")
            return
        data = {
            "step": sample.step,
            "prompt": sample.prompt,
            "key": key,
            "content_type": sample.media_type,
            "size_bytes": len(sample.image),
        }
        await self._write([(EventKind.SAMPLE, "", json.dumps(data))])

    async def wait_until_ready(self, lora: Lora, loras: LoraRegistry, registry: InstanceRegistry) -> None:
        """Until each instance that is up lists the LoRA, for a minute at most: what is slower picks it up by itself. Nobody brings one that
        was taken back meanwhile."""
        deadline = time.monotonic() + READY_WAIT_S
        while time.monotonic() < deadline:
            up = {facts.id for facts in await registry.all() if facts.state != "down"}
            there = next((set(known.instances) for known in await loras.all() if known.file == lora.file), None)
            if there is None or up <= there:
                return
            await self.stage("publish", f"{len(up & there)} of {len(up)} instances have it.")
            await asyncio.sleep(0.5)

    async def finish(self, status: JobStatus, *, lora: str | None = None) -> None:
        ended = now_ms()
        metrics = self._job.metrics
        if self._job.started_ms is not None:
            metrics = metrics.model_copy(update={"execution_ms": ended - self._job.started_ms})
        progress = self._job.progress.model_copy(update={"value": 1.0, "message": None}) if lora else self._job.progress
        changes = {"status": status, "finished_ms": ended, "metrics": metrics, "progress": progress, "lora": lora}
        self._job = self._job.model_copy(update=changes)
        await self._persist(lambda: self._store.finish(self._claim, self._job))

    async def fail(self, error: JobError) -> None:
        self._job = self._job.model_copy(update={"status": JobStatus.FAILED, "error": error, "finished_ms": now_ms()})
        events = [(EventKind.ERROR, "", error.model_dump_json())]
        await self._persist(lambda: self._store.finish(self._claim, self._job, events))

    async def show(self, progress: Progress) -> None:
        """How far it is."""
        self._job = self._job.model_copy(update={"progress": progress})
        await self._write([(EventKind.PROGRESS, "", progress.model_dump_json())])

    async def _write(self, events: list[EventDraft], **changed: object) -> None:
        fields: dict[str, object] = {"progress": self._job.progress, **changed}
        if self._job.started_ms is not None:
            fields |= {"status": self._job.status.value, "started_ms": self._job.started_ms, "metrics": self._job.metrics}
        self._claim.writes += 1
        write = self._claim.writes
        await self._persist(lambda: self._store.update(self._claim, fields, events, write=write))

    async def _persist(self, call: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await call()
            except RedisUnavailable:
                await asyncio.sleep(0.5)
