"""Training requests: checked against the data set, stored as a job, put into the worker's queue by dotted name. No torch here."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from comfy_workflows.catalog import BaseModelInfo, Catalog
from comfy_workflows.errors import WorkflowError
from gateway.auth import Caller
from gateway.datasets.preflight import inspect
from gateway.datasets.records import DEFAULT_VIDEO_FRAMES, Dataset
from gateway.datasets.store import DatasetStore
from gateway.edge.bodies import MAX_DEPTH, is_deeper
from gateway.edge.paging import Page, Position, look_through
from gateway.errors import NotFound, RedisUnavailable, Unprocessable
from gateway.jobs.model import Job, JobSpec, JobStatus, Webhook, new_job_id, now_ms
from gateway.jobs.records import IdempotencyKey
from gateway.jobs.trainings import IMPORT_ID, TRAINING, TrainingStore
from gateway.moderation.verdicts import Moderation
from gateway.outside.hub import HubAccess
from gateway.redis_client import IMPORT_QUEUE, TRAINING_QUEUE, enqueue_task
from gateway.settings import Settings
from gateway.trainings.machines import TrainerMachines
from gateway.trainings.presets import choose_preset, estimate_disk, require_disk
from gateway.webhooks import WebhookField
from gateway.workflows.errors import translate_workflow_error

log = logging.getLogger(__name__)

TASK = "trainer_worker.tasks.run_training"
WATCH_S = 2.0
LOST_PAUSE_S = 30.0
TRAINABLE = ("flux1", "tinyflux", "wan", "hunyuanvideo")
VIDEO_FAMILIES = ("wan", "hunyuanvideo")
# Their files name layers as diffusers does. ComfyUI 0.3.64 knows other names there and ignores each key; Flux's it knows in both.
UNPUBLISHABLE = ("wan", "hunyuanvideo")
MAX_METADATA_BYTES = 16_384
# All that SimpleTuner 3.1.6 has.
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "sine"]
PERIODIC = ("cosine", "cosine_with_restarts", "sine")
TINY_SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")
OPTIMIZERS = (
    "adamw_bf16", "adamw_schedulefree", "adamw_schedulefree+aggressive", "adamw_schedulefree+no_kahan", "ao-adamfp8", "ao-adamw4bit",
    "ao-adamw8bit", "ao-adamwfp8", "bnb-adagrad", "bnb-adagrad8bit", "bnb-adam", "bnb-adam8bit", "bnb-adamw", "bnb-adamw-paged",
    "bnb-adamw8bit", "bnb-adamw8bit-paged", "bnb-ademamix", "bnb-ademamix-paged", "bnb-ademamix8bit", "bnb-ademamix8bit-paged", "bnb-lion",
    "bnb-lion-paged", "bnb-lion8bit", "bnb-lion8bit-paged", "optimi-adam", "optimi-adamw", "optimi-adan", "optimi-lion", "optimi-radam",
    "optimi-ranger", "optimi-sgd", "optimi-stableadamw", "prodigy", "soap", "torch-adadelta", "torch-adafactor", "torch-adagrad",
    "torch-adam", "torch-adamax", "torch-adamw", "torch-asgd", "torch-nadam", "torch-radam", "torch-rmsprop", "torch-sgd",
)  # fmt: skip


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
    lr_scheduler: Schedule = "constant"
    warmup: int = Field(0, ge=0, le=10_000, description="Steps in which the learning rate rises; of cosine and sine the period.")
    optimizer: str = Field("adamw_bf16", description="A name of SimpleTuner's; those that begin with bnb- need bitsandbytes.")
    precision: Literal["bf16", "int8", "int4", "nf4"] | None = Field(
        None, description="Of the frozen base. Absent: the best that fits the GPU's free memory."
    )
    gradient_checkpointing: bool = True
    checkpoint_every: int = Field(250, ge=1, le=100_000)
    sample_prompts: list[str] = Field(default_factory=list, max_length=8)
    sample_every: int = Field(250, ge=1, le=100_000)
    seed: int = Field(-1, ge=-1, lt=2**31)
    resume_from: str | None = Field(None, max_length=64, description="Id of an ended training whose newest checkpoint to go on from.")
    webhook: WebhookField = None
    video_frames: int | None = Field(None, ge=5, le=1025, description="Frames taken of each clip; of video bases only. Default 49.")
    metadata: dict[str, Any] = Field(default_factory=dict, description="Yours; returned as it is.")

    @field_validator("optimizer")
    @classmethod
    def _know_optimizer(cls, name: str) -> str:
        if name not in OPTIMIZERS:
            raise ValueError(f"allowed is {', '.join(OPTIMIZERS)}")
        return name

    @field_validator("metadata")
    @classmethod
    def _bound(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        if is_deeper(metadata, MAX_DEPTH) or len(json.dumps(metadata)) > MAX_METADATA_BYTES:
            raise ValueError(f"allowed are {MAX_METADATA_BYTES} bytes of JSON and {MAX_DEPTH} levels")
        return metadata

    @model_validator(mode="after")
    def _warm_up_in_time(self) -> TrainingRequest:
        if self.warmup > self.steps:
            raise ValueError(f"warmup is {self.warmup}; allowed is at most steps, which is {self.steps}")
        return self

    @field_validator("sample_prompts")
    @classmethod
    def _fit(cls, prompts: list[str]) -> list[str]:
        for prompt in prompts:
            if not 1 <= len(prompt) <= 2000 or "\0" in prompt or any("\ud800" <= letter <= "\udfff" for letter in prompt):
                raise ValueError("each sample prompt is text of 1 to 2000 characters without NUL or unpaired surrogates")
        return prompts


class TrainingFilter(NamedTuple):
    """What a list shall hold; None asks for nothing."""

    workflow: str
    status: JobStatus | None = None
    base: str | None = None
    lora: str | None = None
    dataset: str | None = None
    created_after_ms: int | None = None

    def takes(self, job: Job) -> bool:
        asked = job.spec.parameters
        return (
            job.spec.workflow == self.workflow
            and (self.status is None or job.status is self.status)
            and (self.base is None or job.spec.base_model == self.base)
            and (self.lora is None or asked.get("name") == self.lora)
            and (self.dataset is None or asked.get("dataset") == self.dataset)
        )


class Trainings:
    """Accepts trainings. Raises Unprocessable and NotFound for what would fail late; nothing is stored then."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        store: TrainingStore,
        datasets: DatasetStore,
        machines: TrainerMachines,
        hub: HubAccess,
        moderation: Moderation,
    ) -> None:
        self._settings, self._catalog, self._store, self._datasets = settings, catalog, store, datasets
        self._machines, self._hub, self._moderation = machines, hub, moderation

    async def admit(
        self, request: TrainingRequest, caller: Caller, key: IdempotencyKey | None = None, webhook: Webhook | None = None
    ) -> Job:
        """Check, store, queue. With a `key` seen before, the job is that of the first request."""
        self.require_trainer()
        model = self._base(request.base or self._settings.default_base_model)
        self._check_settings(request, model.family)
        dataset = await self._check_dataset(request, model.family, caller)
        await self._check_texts(request, dataset, caller)
        if request.resume_from is not None:
            await self._check_resumed(request.resume_from, caller)
        await self._check_machines(request, model.family, dataset)
        source = model.trains_on or model.source
        access = await self._check_access(self._settings.base_model_paths.get(model.name, source))
        seed = request.seed if request.seed >= 0 else secrets.randbelow(2**31)
        parameters = {**describe_parameters(request, model, seed), "access": access}
        job_id = new_job_id("trn")
        # One that goes on from another works in that one's folder, where the checkpoints are.
        parameters["run"] = await self._run_of(request.resume_from) or job_id
        spec = JobSpec(
            id=job_id,
            kind="training",
            caller=caller.id,
            workflow=TRAINING,
            workflow_version="1",
            base_model=model.name,
            parameters=parameters,
            seed=seed,
            metadata=request.metadata,
            webhook=webhook,
            timeout_s=self._settings.training_timeout_s,
            created_ms=now_ms(),
        )
        return await self.start(spec, key)

    async def start(self, spec: JobSpec, key: IdempotencyKey | None, source: str = "") -> Job:
        """Store and queue a job of the worker's; with a `key` seen before, the job is that of the first request."""
        admitted = await self._store.create_training(spec, key=key, source=source)
        if admitted.outcome == "created":
            await self.enqueue(spec.id)
        return await self._store.load(admitted.job_id) or Job(spec=spec)

    async def load_many(self, ids: Iterable[str]) -> list[Job]:
        """Those of these jobs that are still kept."""
        return await self._store.load_many(ids)

    async def cancel(self, job_id: str) -> None:
        """Stop it, if it has not ended."""
        await self._store.cancel(job_id)

    async def page(self, caller: Caller, wanted: TrainingFilter, page: Page) -> tuple[list[Job], Position | None]:
        """The caller's newest that are wanted, and where to go on; None at the end."""
        read = partial(self._store.training_ids_before, caller.id)
        return await look_through(page, read, self._store.load_many, wanted.takes, wanted.created_after_ms)

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
        queue = IMPORT_QUEUE if job_id.startswith(IMPORT_ID) else TRAINING_QUEUE
        await asyncio.to_thread(enqueue_task, self._settings.redis_url, queue, TASK, job_id, timeout_s)

    async def _check_resumed(self, earlier_id: str, caller: Caller) -> None:
        """Only one's own training that has ended can be gone on from: its checkpoints are nobody else's."""
        earlier = await self._store.load(earlier_id)
        if earlier is None or earlier.spec.caller != caller.id or earlier.spec.workflow != TRAINING:
            raise NotFound(f"There is no training {earlier_id!r}.", code="job_not_found", details={"parameter": "resume_from"})
        if not earlier.is_terminal:
            raise _refuse("resume_from", earlier_id, "a training that has ended", "Cancel it first.")

    async def _run_of(self, earlier_id: str | None) -> str | None:
        earlier = await self._store.load(earlier_id) if earlier_id else None
        return str(earlier.spec.parameters["run"]) if earlier else None

    def require_trainer(self) -> None:
        """Raises Unprocessable where nothing trains."""
        if self._settings.trainer == "off":
            hint = "Set TRAINER=simpletuner and run a trainer worker."
            raise Unprocessable("This deployment does not train.", code="training_off", hint=hint)

    def _base(self, name: str) -> BaseModelInfo:
        try:
            model = self._catalog.base_model(name)
        except WorkflowError as error:
            raise translate_workflow_error(error) from error
        if model.family not in TRAINABLE:
            raise _refuse("base", name, f"a base model of family {', '.join(TRAINABLE)}", None)
        if self._settings.trainer == "tiny" and model.family != "tinyflux":
            raise _refuse("base", name, "tinyflux", "The small trainer knows only the small model; set SIMPLETUNER_PYTHON for others.")
        return model

    def _check_settings(self, request: TrainingRequest, family: str) -> None:
        """What each setting allows beside the others, for this trainer and this family."""
        if request.alpha not in (None, request.rank):
            raise _refuse("alpha", request.alpha, f"{request.rank} (= rank)", "Leave alpha out: the weights are saved without it.")
        if self._settings.trainer == "tiny" and request.lr_scheduler not in TINY_SCHEDULES:
            raise _refuse("lr_scheduler", request.lr_scheduler, f"{', '.join(TINY_SCHEDULES)} with the small trainer", None)
        if self._settings.trainer == "simpletuner" and request.lr_scheduler in PERIODIC and request.warmup < 1:
            hint = f"SimpleTuner takes warmup for the period of {request.lr_scheduler}; give the steps of one."
            raise _refuse("warmup", request.warmup, f"1 or more with {request.lr_scheduler}", hint)
        if family in UNPUBLISHABLE and not self._settings.train_unpublishable:
            raise Unprocessable(
                f"ComfyUI would ignore a LoRA for {family}: it does not know the names that SimpleTuner gives its layers.",
                code="family_not_publishable",
                hint="TRAIN_UNPUBLISHABLE=true trains it all the same; its checkpoints stay on the trainer's machine.",
                details={"parameter": "base", "value": request.base, "allowed": "a base model of family flux1, tinyflux"},
            )
        if family == "wan" and request.precision in ("int4", "nf4"):
            raise _refuse("precision", request.precision, "bf16, int8 for wan", None)
        if family not in VIDEO_FAMILIES and request.video_frames is not None:
            raise _refuse("video_frames", request.video_frames, "absent for a base of still pictures", None)
        if family == "hunyuanvideo" and (request.video_frames or DEFAULT_VIDEO_FRAMES) % 4 != 1:
            raise _refuse("video_frames", request.video_frames, "one more than a multiple of 4 for hunyuanvideo", None)

    async def _check_machines(self, request: TrainingRequest, family: str, dataset: Dataset) -> None:
        """Refuse what fits none of the machines that trainers report of now. While none reports, the worker will see."""
        faults: list[Unprocessable] = []
        size_bytes = sum(file.size_bytes for file in dataset.files if file.key)
        needed = estimate_disk(family, rank=request.rank, resolution=request.resolution, files=len(dataset.files), dataset_bytes=size_bytes)
        for machine in (await self._machines.all()).values():
            try:
                choose_preset(family, request.precision, machine, whole=True)
                require_disk(needed, machine)
                return
            except Unprocessable as fault:
                faults.append(fault)
        if faults:
            raise faults[0]

    async def _check_texts(self, request: TrainingRequest, dataset: Dataset, caller: Caller) -> None:
        """What shall be learned and drawn. Raises Moderated."""
        captions = [file.caption for file in dataset.files if file.caption]
        asked = {"sample_prompts": request.sample_prompts, "trigger_word": [request.trigger_word], "dataset": captions}
        for parameter, texts in asked.items():
            await self._moderation.require_texts(texts, caller=caller.id, workflow=TRAINING, parameter=parameter)

    async def _check_access(self, base_path: str) -> str:
        if self._settings.trainer == "tiny" or not self._settings.hf_access_check:
            return "not asked"
        return await self._hub.require(base_path)

    async def _check_dataset(self, request: TrainingRequest, family: str, caller: Caller) -> Dataset:
        dataset = await self._datasets.load(request.dataset)
        if dataset is None or dataset.caller != caller.id:
            raise NotFound(f"There is no data set {request.dataset!r}.", code="dataset_not_found", details={"parameter": "dataset"})
        wanted = "video" if family in VIDEO_FAMILIES else "image"
        if dataset.asset != wanted:
            raise _refuse("dataset", request.dataset, f"a data set with asset {wanted!r}; this one's is {dataset.asset!r}", None)
        report = inspect(
            dataset.files,
            resolution=request.resolution,
            batch_size=request.batch_size,
            repeats=request.repeats,
            steps=request.steps,
            trigger_word=request.trigger_word or dataset.trigger_word,
            caption_template=dataset.caption_template,
            video_frames=request.video_frames or DEFAULT_VIDEO_FRAMES,
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
        return dataset


def describe_parameters(request: TrainingRequest, model: BaseModelInfo, seed: int) -> dict[str, Any]:
    """What the worker is told of a request."""
    asked = request.model_dump(exclude={"metadata", "base", "webhook"})
    source = model.trains_on or model.source
    return {**asked, "alpha": request.rank, "seed": seed, "family": model.family, "flavour": model.flavour, "source": source}


def _refuse(parameter: str, value: object, allowed: str, hint: str | None) -> Unprocessable:
    details = {"parameter": parameter, "value": value, "allowed": allowed}
    return Unprocessable(f"{parameter} is {value!r}; allowed is {allowed}.", code="invalid_parameter", hint=hint, details=details)
