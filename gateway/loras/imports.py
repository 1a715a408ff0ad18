"""LoRAs that come from elsewhere: accepted here, fetched, judged and published by the worker, through the door that trainings use.

An import is a job of the worker's; what stands in the record of a name is read from that job, so nothing can say two things.
"""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from comfy_workflows.catalog import Catalog
from comfy_workflows.errors import WorkflowError
from gateway.auth import Caller
from gateway.errors import NotFound, Unprocessable
from gateway.inputs.assets import AssetStore, absent
from gateway.jobs.model import Job, JobSpec, JobStatus, new_job_id, now_ms
from gateway.jobs.records import IdempotencyKey
from gateway.jobs.trainings import IMPORT, IMPORT_ID
from gateway.loras.registry import LoraRegistry, Source
from gateway.outside.addresses import show_url
from gateway.outside.urls import Outside
from gateway.settings import Settings
from gateway.trainings.requests import Trainings
from gateway.workflows.errors import translate_workflow_error

IMPORT_S = 3600.0
EXTENSION = ".safetensors"


class LoraImport(BaseModel):
    """A LoRA file from elsewhere, and what is known of it."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$", description="Name of the LoRA: lower case letters, digits, - and _.")
    upload: str | None = Field(None, description="Id of an upload.", min_length=1, max_length=100)
    url: str | None = Field(None, description="A public https URL.", min_length=8, max_length=4096)
    trigger_word: str | None = Field(None, min_length=1, max_length=64, description="The word that calls up what it learned.")
    base_model: str | None = Field(None, max_length=64, description="What it was made for; the file itself is asked as well.")
    sha256: str | None = Field(None, pattern=r"^[0-9a-fA-F]{64}$", description="Of the file, in hexadecimal; another one is refused.")

    @model_validator(mode="after")
    def _need_one_source(self) -> Self:
        if (self.upload is None) == (self.url is None):
            raise ValueError("name either an upload or a url")
        return self


class LoraImports:
    """Raises Unprocessable and NotFound; nothing is stored then."""

    def __init__(
        self, settings: Settings, catalog: Catalog, trainings: Trainings, assets: AssetStore, outside: Outside, loras: LoraRegistry
    ) -> None:
        self._settings, self._catalog, self._trainings = settings, catalog, trainings
        self._assets, self._outside, self._loras = assets, outside, loras

    async def admit(self, request: LoraImport, caller: Caller, key: IdempotencyKey | None = None) -> Job:
        """Check, store, queue. Where the file comes from is kept from those who read the record: a URL may hold a key."""
        if self._settings.trainer == "off":
            hint = "Set TRAINER and run a trainer worker."
            raise Unprocessable("This deployment has no worker that could look at the file.", code="training_off", hint=hint)
        family = self._family_of(request.base_model)
        source = await self._find(request, caller)
        job_id = new_job_id(IMPORT_ID)
        shown = {"url": show_url(request.url)} if request.url else {"upload": request.upload}
        given = request.model_dump(exclude={"url", "upload"})
        spec = JobSpec(
            id=job_id,
            kind="training",
            caller=caller.id,
            workflow=IMPORT,
            workflow_version="1",
            base_model=request.base_model or "",
            parameters={**given, **shown, "family": family},
            seed=0,
            timeout_s=IMPORT_S,
            created_ms=now_ms(),
        )
        job = await self._trainings.start(spec, key, source.model_dump_json())
        if job.id == job_id:
            # What is asked for again is no newer than it was.
            await self._loras.note_import(caller.id, request.name, job.id)
        return job

    def _family_of(self, base_model: str | None) -> str | None:
        """The family its LoRAs are of; None: the file says it."""
        if base_model is None:
            return None
        try:
            known = self._catalog.base_model(base_model)
        except WorkflowError as error:
            raise translate_workflow_error(error) from error
        return next(iter(known.lora_families), known.family)

    async def _find(self, request: LoraImport, caller: Caller) -> Source:
        """Where the worker gets it, once that is known to exist."""
        if request.url is not None:
            await self._outside.check(request.url, parameter="url")
            return Source(url=request.url)
        wanted = request.upload or ""
        try:
            asset = await self._assets.ready(caller.id, wanted)
        except NotFound as error:
            raise absent(wanted, parameter="upload") from error
        name = asset.name or f"upload{EXTENSION}"
        return Source(key=asset.key, name=name, size_bytes=asset.size_bytes)

    async def open(self, caller: Caller) -> dict[str, Job]:
        """The caller's newest import of each name, those left out that have become a LoRA. One whose record is gone is forgotten."""
        noted = await self._loras.imports(caller.id)
        jobs = {job.id: job for job in await self._trainings.load_many(noted.values())}
        for name, job_id in noted.items():
            if job_id not in jobs:
                await self._loras.forget_import(caller.id, name, job_id)
        found = {name: jobs[job_id] for name, job_id in noted.items() if job_id in jobs}
        return {name: job for name, job in found.items() if job.status is not JobStatus.SUCCEEDED}

    async def forget(self, caller: Caller, name: str) -> bool:
        """End an import that is not over, and forget it; False when there is none."""
        job = (await self.open(caller)).get(name)
        if job is None:
            return False
        await self._trainings.cancel(job.id)
        await self._loras.forget_import(caller.id, name, job.id)
        return True
