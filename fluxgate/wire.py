"""The gateway's answers as types, and requests as plain dicts. Pure: it knows the fields, and nothing of connections."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fluxgate.errors import ApiError

TERMINAL_STATUSES = frozenset({"succeeded", "failed", "canceled", "expired"})
STRANGER = "not_the_gateway"


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
    loss: float | None = None  # trainings only, like the next two
    learning_rate: float | None = None
    eta_s: float | None = None


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


class _Work(_Answer):
    """What every kind of job says of itself. Times are RFC 3339."""

    id: str
    status: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    progress: Progress = Progress()
    error: JobError | None = None
    metrics: dict[str, Any] = Field(default_factory=dict)
    created_at: str | None = None
    started_at: str | None = None
    finished_at: str | None = None

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL_STATUSES


class Job(_Work):
    """A generation as it stood when the gateway answered."""

    workflow: str
    base_model: str | None = None
    loras: list[Lora] = Field(default_factory=list)
    outputs: list[Output] = Field(default_factory=list)
    queue_position: int | None = None
    eta_s: float | None = None
    cached: bool = False


class Training(_Work):
    """A training as it stood when the gateway answered. `lora` is what it published, `plan` what it ran with on its machine."""

    object: str
    dataset: str
    name: str | None = None
    base: str | None = None
    lora: str | None = None
    plan: dict[str, Any] | None = None


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


class Sample(_Answer):
    """A picture drawn by a training in progress: the data of a `sample` event. `url` is signed like an output's."""

    step: int
    prompt: str
    url: str
    content_type: str


class Upload(_Answer):
    """A file that later requests name by its id."""

    id: str
    status: str
    content_type: str
    size_bytes: int
    name: str | None = None
    sha256: str | None = None
    width: int | None = None
    height: int | None = None
    content_url: str | None = None
    expires_at: str | None = None


class Problem(_Answer):
    """One thing wrong with a data set. An `error` keeps a training from starting."""

    code: str
    severity: str
    message: str
    remedy: str
    files: list[str] = Field(default_factory=list)


class Preflight(_Answer):
    """What a training would make of a data set."""

    ok: bool
    problems: list[Problem] = Field(default_factory=list)


class DatasetFile(_Answer):
    """One picture or clip, and the caption a training would use."""

    name: str
    url: str | None = None
    width: int | None = None
    height: int | None = None
    caption_used: str | None = None


class Dataset(_Answer):
    """Pictures with captions. Lists leave out `files` and `preflight`."""

    id: str
    name: str
    file_count: int
    trigger_word: str | None = None
    size_bytes: int = 0
    files: list[DatasetFile] = Field(default_factory=list)
    preflight: Preflight | None = None


class Workflow(_Answer):
    """What can be asked for, and the instances that can run it."""

    name: str
    title: str = ""
    description: str = ""
    base_models: list[str] = Field(default_factory=list)
    instances: list[str] = Field(default_factory=list)
    parameters: dict[str, Any] = Field(default_factory=dict)  # JSON Schema, of one workflow read by name


class BaseModelInfo(_Answer):
    """A base model of the deployment's catalogue: the instances that have its files, and those where it is loaded."""

    id: str
    family: str | None = None
    default: bool = False
    ready_on: list[str] = Field(default_factory=list)
    warm_on: list[str] = Field(default_factory=list)


class LoraInfo(_Answer):
    """A LoRA that can be used. `before` and `after` are signed picture URLs, of the same prompt without and with it."""

    name: str
    file: str | None = None
    status: str | None = None  # importing, ready or failed
    error: JobError | None = None
    owned: bool = False
    shared: bool = False
    base_model: str | None = None
    family: str | None = None
    rank: int | None = None
    trigger_word: str | None = None
    sha256: str | None = None
    training: str | None = None
    ready_on: list[str] = Field(default_factory=list)
    url: str | None = None
    before: str | None = None
    after: str | None = None


class Key(_Answer):
    """An API key as admins see it. `key` is its text, only in the answer that made it. None as a limit: as the settings have it."""

    id: str
    name: str
    prefix: str
    caller: str
    scopes: list[str]
    limits: dict[str, int | None] = Field(default_factory=dict)
    is_good: bool = True
    created_at: str | None = None
    last_used_at: str | None = None
    expires_at: str | None = None
    revoked_at: str | None = None
    usage_today: dict[str, Any] | None = None
    key: str | None = Field(None, repr=False)


Item = TypeVar("Item")
Answer = TypeVar("Answer", bound=BaseModel)


class Page(_Answer, Generic[Item]):
    """Newest first. `next_cursor` is None on the last page."""

    data: list[Item]
    next_cursor: str | None = None


class Event(NamedTuple):
    """One message of a job's stream. `data` is the parsed JSON; `kind` is status, progress, preview, output, log or error,
    for trainings also sample and checkpoint."""

    id: str
    kind: str
    data: dict[str, Any]

    @property
    def is_end(self) -> bool:
        return self.kind == "status" and self.data.get("status") in TERMINAL_STATUSES


def make_request(prompt: str | None, *, workflow: str | None, loras: Sequence[Lora | str], parameters: dict[str, Any]) -> dict[str, Any]:
    """The body of `POST /v1/generations`. What is None is left out, so that the workflow's defaults hold."""
    body: dict[str, Any] = {**parameters, "prompt": prompt, "workflow": workflow}
    if loras:
        body["loras"] = [(Lora(name=lora) if isinstance(lora, str) else lora).model_dump() for lora in loras]
    return drop_none(body)


def drop_none(fields: dict[str, Any]) -> dict[str, Any]:
    """What was said; None is unsaid."""
    return {name: value for name, value in fields.items() if value is not None}


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
        STRANGER,
        f"{answer.request.url} answers {answer.status_code} and no JSON of ours: {said}",
        "Something else listens there, or a proxy stands between.",
    )


def read_as(model: type[Answer], content: Any) -> Answer:
    """The thing in an answer."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ApiError(
            200, STRANGER, f"The answer is no {model.__name__.lower()}: {error.errors()[0]['msg']}", "Is it a Fluxgate gateway?"
        ) from error


def reads(model: type[Answer]) -> Callable[[httpx.Response], Answer]:
    """How an answer of that kind is read."""
    return lambda answer: read_as(model, read_answer(answer))


def read_job(content: Any) -> Job:
    """The job in an answer or a `status` event."""
    return read_as(Job, content)


def read_event(event_id: str, kind: str, text: str) -> Event:
    """One message of a stream."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ApiError(200, STRANGER, f"An event {kind!r} carries no JSON: {text[:100]!r}") from error
    return Event(event_id, kind, data if isinstance(data, dict) else {"data": data})


class _PageEvent(_Answer):
    id: str
    event: str
    data: dict[str, Any]


class _EventPage(_Answer):
    data: list[_PageEvent]
    ended: bool


def read_event_page(answer: httpx.Response) -> Iterator[Event]:
    """The events of a long-poll's answer, and a last one that says whether there will be more: `ended` or `reconnect`."""
    page = read_as(_EventPage, read_answer(answer))
    yield from (Event(event.id, event.event, event.data) for event in page.data)
    yield Event("", "ended" if page.ended else "reconnect", {})
