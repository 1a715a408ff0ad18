"""The gateway's answers as types, and requests as plain dicts. Pure: it knows the fields, and nothing of connections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fluxgate.errors import ApiError

TERMINAL_STATUSES = frozenset({"succeeded", "failed", "canceled", "expired"})


class _Answer(BaseModel):
    # A newer gateway may say more than this client knows.
    model_config = ConfigDict(extra="ignore")


class Progress(_Answer):
    """How far a job is. `value` runs from 0 to 1 over the whole graph; `step` of `steps` is the node at work."""

    value: float = 0.0
    nodes_done: int = 0
    nodes_total: int = 0
    current_node: str | None = None
    current_node_class: str | None = None
    step: int | None = None
    steps: int | None = None
    message: str | None = None


class Output(_Answer):
    """One picture. `url` is signed and readable without a key for about an hour; read the job again for a new one."""

    index: int
    url: str
    content_type: str
    size_bytes: int
    width: int | None = None
    height: int | None = None
    sha256: str | None = None


class JobError(_Answer):
    """Why a job failed."""

    code: str
    message: str
    hint: str | None = None
    details: dict[str, Any] = Field(default_factory=dict)


class Lora(_Answer):
    """A LoRA by name, and how strongly it acts."""

    name: str
    weight: float = 1.0


class Job(_Answer):
    """A generation as it stood when the gateway answered. Times are RFC 3339."""

    id: str
    status: str
    workflow: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None
    loras: list[Lora] = Field(default_factory=list)
    progress: Progress = Progress()
    outputs: list[Output] = Field(default_factory=list)
    error: JobError | None = None
    metrics: dict[str, Any] = Field(default_factory=dict)
    queue_position: int | None = None
    created_at: str | None = None
    started_at: str | None = None
    finished_at: str | None = None

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL_STATUSES


class Page(_Answer):
    """Jobs, newest first. `next_cursor` is None on the last page."""

    data: list[Job]
    next_cursor: str | None = None


class Batch(_Answer):
    """Many generations under one id. `counts` has the number of items by status."""

    id: str
    status: str
    total: int
    counts: dict[str, int]
    metadata: dict[str, Any] = Field(default_factory=dict)
    archive: dict[str, Any] | None = None
    created_at: str | None = None
    finished_at: str | None = None

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL_STATUSES


class BatchItem(_Answer):
    """One item. `id` is that of the generation it becomes, or has become."""

    index: int
    id: str
    status: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None
    outputs: list[Output] = Field(default_factory=list)
    error: JobError | None = None


class Event(NamedTuple):
    """One message of a job's stream. `data` is the parsed JSON; `kind` is status, progress, preview, output, log or error."""

    id: str
    kind: str
    data: dict[str, Any]


def make_request(prompt: str | None, *, workflow: str | None, loras: Sequence[Lora], parameters: dict[str, Any]) -> dict[str, Any]:
    """The body of `POST /v1/generations`. What is None is left out, so that the workflow's defaults hold."""
    body: dict[str, Any] = {**parameters, "prompt": prompt, "workflow": workflow}
    if loras:
        body["loras"] = [lora.model_dump() for lora in loras]
    return {name: value for name, value in body.items() if value is not None}


def read_answer(answer: httpx.Response) -> Any:
    """The JSON of a good answer; ApiError for any other. The body must have been read."""
    try:
        content = answer.json()
    except ValueError:
        content = None
    if answer.is_success and content is not None:
        return content
    error = content.get("error") if isinstance(content, dict) else None
    if isinstance(error, dict):
        raise ApiError(
            answer.status_code, str(error.get("code")), str(error.get("message")), error.get("hint"), error.get("details") or None
        )
    said = " ".join(answer.text.split())[:200] or "nothing"
    raise ApiError(
        answer.status_code,
        "not_the_gateway",
        f"{answer.request.url} answers {answer.status_code} and no JSON of ours: {said}",
        "Something else listens there, or a proxy stands between.",
    )


def read_job(content: Any) -> Job:
    """The job in an answer or a `status` event."""
    try:
        return Job.model_validate(content)
    except ValidationError as error:
        raise ApiError(200, "not_the_gateway", f"The answer is no job: {error.errors()[0]['msg']}", "Is it a Fluxgate gateway?") from error


def read_batch(content: Any) -> Batch:
    """The batch in an answer."""
    try:
        return Batch.model_validate(content)
    except ValidationError as error:
        raise ApiError(
            200, "not_the_gateway", f"The answer is no batch: {error.errors()[0]['msg']}", "Is it a Fluxgate gateway?"
        ) from error
