"""Training requests: checked against the data set, stored as a job, put into the worker's queue by dotted name. No torch here."""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from comfy_workflows.catalog import Catalog
from comfy_workflows.errors import WorkflowError
from gateway.auth import Caller
from gateway.datasets import DatasetStore
from gateway.errors import NotFound, RedisUnavailable, Unprocessable
from gateway.jobs.model import Job, JobSpec, Webhook, new_job_id, now_ms
from gateway.jobs.records import IdempotencyKey
from gateway.jobs.trainings import TrainingStore
from gateway.preflight import inspect
from gateway.redis_client import TRAINING_QUEUE, enqueue_task
from gateway.settings import Settings
from gateway.webhooks import WebhookField

log = logging.getLogger(__name__)

TASK = "trainer_worker.tasks.run_training"
WATCH_S = 2.0
LOST_PAUSE_S = 30.0
TRAINABLE = ("flux1", "tinyflux", "wan", "hunyuanvideo")


class TrainingRequest(BaseModel):
    """What to train. Defaults are SimpleTuner's own guidance for Flux."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$", description="Name of the LoRA: lower case letters, digits, - and _.")
    dataset: str = Field(description="Id of a data set.", max_length=64)
    base: str | None = Field(None, description="Base model; the deployment's default when absent.")
    trigger_word: str = Field("", max_length=64, description="The word that calls the new thing; should be in every caption.")
    steps: int = Field(1000, ge=1, le=100_000)
    learning_rate: float = Field(1e-4, gt=0, le=1, allow_inf_nan=False)
    rank: int = Field(16, ge=1, le=256)
    alpha: int | None = Field(None, description="Must equal rank: the files carry no alpha, so ComfyUI scales by 1.")
    resolution: int = Field(1024, ge=64, le=2048, multiple_of=64)
    batch_size: int = Field(1, ge=1, le=64)
    repeats: int = Field(0, ge=0, le=1000, description="0: each picture is seen once per epoch.")
    lr_scheduler: str = Field("constant", pattern=r"^[a-z_]{1,40}$")
    warmup: int = Field(0, ge=0, le=10_000, description="Steps in which the learning rate rises.")
    optimizer: str = Field("adamw_bf16", pattern=r"^[a-z0-9_-]{1,40}$")
    precision: str = Field("bf16", pattern=r"^(bf16|int8|int4|nf4|no_change)$", description="Of the frozen base: bf16, int8, int4, nf4.")
    gradient_checkpointing: bool = True
    checkpoint_every: int = Field(250, ge=1, le=100_000)
    sample_prompts: list[str] = Field(default_factory=list, max_length=8)
    sample_every: int = Field(250, ge=1, le=100_000)
    seed: int = Field(-1, ge=-1, lt=2**31)
    resume_from: str | None = Field(None, max_length=64, description="Id of an ended training whose newest checkpoint to go on from.")
    webhook: WebhookField = None
    metadata: dict[str, Any] = Field(default_factory=dict)

    @field_validator("sample_prompts")
    @classmethod
    def _fit(cls, prompts: list[str]) -> list[str]:
        for prompt in prompts:
            if not 1 <= len(prompt) <= 2000 or "\0" in prompt or any("\ud800" <= letter <= "\udfff" for letter in prompt):
                raise ValueError("each sample prompt is text of 1 to 2000 characters without NUL or unpaired surrogates")
        return prompts


class Trainings:
    """Accepts trainings. Raises Unprocessable and NotFound for what would fail late; nothing is stored then."""

    def __init__(self, settings: Settings, catalog: Catalog, store: TrainingStore, datasets: DatasetStore) -> None:
        self._settings, self._catalog, self._store, self._datasets = settings, catalog, store, datasets

    async def admit(
        self, request: TrainingRequest, caller: Caller, key: IdempotencyKey | None = None, webhook: Webhook | None = None
    ) -> Job:
        """Check, store, queue. With a `key` seen before, the job is that of the first request."""
        self._check_trainer()
        base, family, source = self._base(request.base or self._settings.default_base_model)
        if request.alpha not in (None, request.rank):
            raise _refuse("alpha", request.alpha, f"{request.rank} (= rank)", "Leave alpha out: the weights are saved without it.")
        await self._check_dataset(request, caller)
        if request.resume_from is not None:
            await self._check_resumed(request.resume_from, caller)
        parameters = {
            **request.model_dump(exclude={"metadata", "base", "webhook"}),
            "alpha": request.rank,
            "family": family,
            "source": source,
        }
        seed = request.seed if request.seed >= 0 else secrets.randbelow(2**31)
        job_id = new_job_id("trn")
        # One that goes on from another works in that one's folder, where the checkpoints are.
        parameters["run"] = await self._run_of(request.resume_from) or job_id
        spec = JobSpec(
            id=job_id,
            kind="training",
            caller=caller.id,
            workflow="training",
            workflow_version="1",
            base_model=base,
            parameters={**parameters, "seed": seed},
            seed=seed,
            metadata=request.metadata,
            webhook=webhook,
            timeout_s=self._settings.training_timeout_s,
            created_ms=now_ms(),
        )
        admitted = await self._store.create_training(spec, key=key)
        if admitted.outcome == "created":
            await self.enqueue(spec.id)
        return await self._store.load(admitted.job_id) or Job(spec=spec)

    async def newest(self, caller: Caller, limit: int) -> list[Job]:
        """The caller's newest trainings."""
        pairs = await self._store.training_ids_before(caller.id, None, limit)
        return await self._store.load_many(job_id for _, job_id in pairs)

    async def watch(self) -> None:
        """For ever: put trainings that nobody works on back into the worker's queue."""
        while True:
            try:
                for job_id in await self._store.lost(pause_s=LOST_PAUSE_S):
                    log.warning("training queued again", extra={"job_id": job_id})
                    await self.enqueue(job_id)
            except RedisUnavailable as error:
                log.warning("lost trainings not looked for", extra={"error": error.message})
            await asyncio.sleep(WATCH_S)

    async def enqueue(self, job_id: str) -> None:
        """Put it into the worker's queue. A training that is there twice is worked on once: the worker's claim decides."""

        timeout_s = int(self._settings.training_timeout_s) + 3600
        await asyncio.to_thread(enqueue_task, self._settings.redis_url, TRAINING_QUEUE, TASK, job_id, timeout_s)

    async def _check_resumed(self, earlier_id: str, caller: Caller) -> None:
        """Only one's own training that has ended can be gone on from: its checkpoints are nobody else's."""
        earlier = await self._store.load(earlier_id)
        if earlier is None or earlier.spec.caller != caller.id or earlier.spec.kind != "training":
            raise NotFound(f"There is no training {earlier_id!r}.", code="job_not_found", details={"parameter": "resume_from"})
        if not earlier.is_terminal:
            raise _refuse("resume_from", earlier_id, "a training that has ended", "Cancel it first.")

    async def _run_of(self, earlier_id: str | None) -> str | None:
        earlier = await self._store.load(earlier_id) if earlier_id else None
        return str(earlier.spec.parameters["run"]) if earlier else None

    def _check_trainer(self) -> None:
        if self._settings.trainer == "off":
            hint = "Set TRAINER=simpletuner and run a trainer worker."
            raise Unprocessable("This deployment does not train.", code="training_off", hint=hint)

    def _base(self, name: str) -> tuple[str, str, str]:
        try:
            model = self._catalog.base_model(name)
        except WorkflowError as error:
            raise Unprocessable(error.message, code=error.code, hint=error.hint, details=error.details) from error
        if model.family not in TRAINABLE:
            raise _refuse("base", name, f"a base model of family {', '.join(TRAINABLE)}", None)
        if self._settings.trainer == "tiny" and model.family != "tinyflux":
            raise _refuse("base", name, "tinyflux", "The small trainer knows only the small model; set SIMPLETUNER_PYTHON for others.")
        return model.name, model.family, model.source

    async def _check_dataset(self, request: TrainingRequest, caller: Caller) -> None:
        dataset = await self._datasets.load(request.dataset)
        if dataset is None or dataset.caller != caller.id:
            raise NotFound(f"There is no data set {request.dataset!r}.", code="dataset_not_found", details={"parameter": "dataset"})
        report = inspect(
            dataset.files,
            resolution=request.resolution,
            batch_size=request.batch_size,
            repeats=request.repeats,
            steps=request.steps,
            trigger_word=request.trigger_word or dataset.trigger_word,
            caption_template=dataset.caption_template,
            asset=dataset.asset,
        )
        if not report.ok:
            first = report.errors[0]
            raise Unprocessable(
                f"The data set cannot be trained on: {first.message}",
                code="dataset_not_ready",
                hint=first.remedy,
                details={"parameter": "dataset", "value": request.dataset, "report": report.model_dump(mode="json")},
            )


def _refuse(parameter: str, value: object, allowed: str, hint: str | None) -> Unprocessable:
    details = {"parameter": parameter, "value": value, "allowed": allowed}
    return Unprocessable(f"{parameter} is {value!r}; allowed is {allowed}.", code="invalid_parameter", hint=hint, details=details)
