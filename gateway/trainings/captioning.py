"""Requests to fill missing captions: checked, stored as a job of the trainer's, put into its queue."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from gateway.auth import Caller
from gateway.datasets.records import Dataset
from gateway.errors import Conflict, Unprocessable
from gateway.jobs.model import Job, JobSpec, new_job_id, now_ms
from gateway.jobs.records import IdempotencyKey
from gateway.jobs.trainings import CAPTIONING
from gateway.settings import Settings
from gateway.trainings.requests import Trainings


class CaptionRequest(BaseModel):
    """Which provider shall caption, and what."""

    model_config = ConfigDict(extra="forbid")

    provider: str | None = Field(None, max_length=64, description="One of CAPTION_PROVIDERS; the deployment's default when absent.")
    model: str | None = Field(
        None, pattern=r"^[\w.-]{1,96}/[\w.-]{1,96}$", description="Hugging Face repository, of providers that take one."
    )
    overwrite: bool = Field(False, description="Also replace captions that are there.")


class Captionings:
    """Accepts captionings. Raises Unprocessable and Conflict; nothing is stored then."""

    def __init__(self, settings: Settings, trainings: Trainings) -> None:
        self._settings, self._trainings = settings, trainings

    async def admit(self, dataset: Dataset, request: CaptionRequest, caller: Caller, key: IdempotencyKey | None = None) -> Job:
        """Check, store, queue."""
        self._trainings.require_trainer()
        provider = request.provider or self._settings.caption_provider
        if provider not in self._settings.caption_providers:
            raise Unprocessable(
                f"There is no caption provider {provider!r}.",
                code="invalid_parameter",
                hint="CAPTION_PROVIDERS names those there are.",
                details={"parameter": "provider", "value": provider, "allowed": sorted(self._settings.caption_providers)},
            )
        if dataset.asset != "image":
            raise Unprocessable(
                f"{dataset.id} holds clips; only pictures are captioned.",
                code="invalid_parameter",
                hint="Upload a .txt for each clip.",
                details={"parameter": "dataset", "value": dataset.id, "allowed": "a data set with asset 'image'"},
            )
        count = sum(bool(file.key and (request.overwrite or not file.caption)) for file in dataset.files)
        if not count:
            raise Conflict(f"Each picture of {dataset.id} has a caption.", code="nothing_to_caption", hint="Say overwrite to replace them.")
        parameters = {**request.model_dump(), "provider": provider, "dataset": dataset.id, "pictures": count}
        spec = JobSpec(
            id=new_job_id("cap"),
            kind="training",
            caller=caller.id,
            workflow=CAPTIONING,
            workflow_version="1",
            base_model="",
            parameters=parameters,
            seed=0,
            timeout_s=self._settings.training_timeout_s,
            created_ms=now_ms(),
        )
        return await self._trainings.start(spec, key)
