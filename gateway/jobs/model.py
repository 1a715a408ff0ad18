"""What a job is: its record, its statuses, and the events its stream carries. Pure; it knows neither Redis nor HTTP."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_serializer

from gateway.redaction import hide_secrets


class JobStatus(StrEnum):
    """The Comfy API v2's words."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    CANCELING = "canceling"
    CANCELED = "canceled"
    FAILED = "failed"
    EXPIRED = "expired"


TERMINAL = frozenset({JobStatus.SUCCEEDED, JobStatus.CANCELED, JobStatus.FAILED, JobStatus.EXPIRED})

Priority = Literal["low", "normal", "high"]


class EventKind(StrEnum):
    """What an event stream can say. All but `preview` and `reconnect` are kept and replayed."""

    STATUS = "status"  # the whole job, as it is now
    PROGRESS = "progress"
    PREVIEW = "preview"  # newest picture of a running step; only for streams that ask
    OUTPUT = "output"
    SAMPLE = "sample"  # a picture drawn by a training in progress
    CHECKPOINT = "checkpoint"  # weights a training can go on from
    LOG = "log"
    ERROR = "error"
    RECONNECT = "reconnect"  # this process goes away; come back with Last-Event-ID


@dataclass(slots=True)
class Event:
    """One entry of a job's stream. `id` is its Redis stream id and its SSE id; `data` is JSON."""

    id: str
    kind: str
    data: bytes
    status: str = ""  # of a status event, so that it need not be parsed to know
    # As it was last written, and for which base URL: all who listen to a job share one event and its one frame.
    frame: tuple[str, bytes] | None = field(default=None, compare=False, repr=False)

    def is_after(self, other: str) -> bool:
        return stream_position(self.id) > stream_position(other)


def stream_position(event_id: str) -> tuple[int, int]:
    """A Redis stream id `ms-seq` in a form that sorts."""
    milliseconds, _, sequence = event_id.partition("-")
    return int(milliseconds), int(sequence or 0)


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class Progress(_Part):
    """How far a job is. `value` runs from 0 to 1 over the whole graph; `step` of `steps` is the node at work."""

    value: float = 0.0
    nodes_done: int = 0
    nodes_total: int = 0
    current_node: str | None = None
    current_node_id: str | None = None
    current_node_class: str | None = None
    step: int | None = None
    steps: int | None = None
    message: str | None = None
    loss: float | None = None  # trainings only, like the next two
    learning_rate: float | None = None
    eta_s: float | None = None


class Output(_Part):
    """One stored picture. `key` is its place in the bucket; signed URLs are made from it at each read."""

    index: int
    key: str
    content_type: str
    size_bytes: int
    sha256: str
    width: int | None = None
    height: int | None = None
    node_id: str | None = None  # of the graph, and what ComfyUI called the file
    name: str | None = None


class JobError(_Part):
    """Why a job ended badly, in the shape of every other error."""

    code: str
    message: str
    hint: str | None = None
    details: dict[str, Any] = Field(default_factory=dict)


class Metrics(_Part):
    """Where the time went, in milliseconds."""

    queue_ms: int | None = None
    load_ms: int | None = None
    execution_ms: int | None = None
    upload_ms: int | None = None


class Webhook(_Part):
    """Whom a job's end is told. The record has the URL without its query, in which receivers carry their keys; the whole of it and the rest
    are kept beside it, and no event or answer carries them."""

    url: str
    secret: SecretStr | None = Field(None, exclude=True)  # None: the deployment's own
    base_url: str = Field("", exclude=True)  # of the links in what is told

    def with_private(self, kept: str) -> Webhook:
        """The whole of it again, from what was kept beside the record."""
        private = json.loads(kept)
        secret = private["secret"]
        return Webhook(url=private.get("url", self.url), secret=SecretStr(secret) if secret else None, base_url=private["base_url"])

    def private_json(self) -> str:
        """What is kept beside the record."""
        secret = self.secret.get_secret_value() if self.secret else None
        return json.dumps({"url": self.url, "secret": secret, "base_url": self.base_url})

    @field_serializer("url")
    def _hide(self, url: str) -> str:
        return hide_secrets(url)


class Delivery(_Part):
    """One try to tell a job's end. `status` is what the receiver answered, None when it did not; `error` says why it does not count."""

    at_ms: int
    attempt: int
    status: int | None
    ms: int
    error: str | None


class LoraUse(_Part):
    """A LoRA as a job uses it: the public name, the file ComfyUI loads, the weight."""

    name: str
    file: str
    weight: float
    sha256: str | None = None  # None: not published here


class JobInput(_Part):
    """A file that ComfyUI gets before the graph. `file` is its name there and in the graph: random, of this job alone."""

    parameter: str
    asset: str
    file: str
    key: str
    sha256: str
    size_bytes: int
    width: int | None = None
    height: int | None = None


class Needs(_Part):
    """What an instance must have to run a graph: node classes, and the choice each combo input takes."""

    classes: tuple[str, ...] = ()
    choices: tuple[tuple[str, str, str], ...] = ()  # (class, input, value)


class Machine(_Part):
    """What a job ran on, as far as it said so. Pictures of one seed may differ between two of them."""

    instance: str
    kind: str = "comfyui"
    device: str | None = None
    comfyui_version: str | None = None
    torch_version: str | None = None
    models: dict[str, str] = Field(default_factory=dict)  # SHA-256 of its files of models, as far as they are known


class JobSpec(_Part):
    """What was accepted. Never changes after admission."""

    id: str
    kind: Literal["generation", "training"] = "generation"
    caller: str
    workflow: str
    workflow_version: str
    raw: bool = False  # a graph of the caller's own: everything it shows is kept, as it is
    base_model: str
    parameters: dict[str, Any]
    seed: int
    loras: tuple[LoraUse, ...] = ()
    inputs: tuple[JobInput, ...] = ()
    needs: Needs = Field(default_factory=Needs)
    priority: Priority = "normal"
    metadata: dict[str, Any] = Field(default_factory=dict)
    webhook: Webhook | None = None
    batch: str | None = None
    batch_index: int | None = None  # which of the batch's items it is
    pinned: str | None = None  # the only instance it may run on
    reproduces: str | None = None  # the job whose graph this one runs again
    graph_sha256: str | None = None  # of the graph without what differs between identical jobs
    price_per_gpu_hour: float | None = None
    cache_key: str | None = None  # None: neither answered from the cache nor remembered in it
    timeout_s: float = 3600.0  # claimed until ended, over all attempts
    queue_timeout_s: float = 3600.0  # accepted until claimed
    created_ms: int


class Job(_Part):
    """One record: the spec and how it stands. Times are milliseconds since the epoch."""

    spec: JobSpec
    status: JobStatus = JobStatus.QUEUED
    revision: int = 0
    progress: Progress = Field(default_factory=Progress)  # pydantic copies a default value, for 12 us
    outputs: tuple[Output, ...] = ()
    error: JobError | None = None
    metrics: Metrics = Field(default_factory=Metrics)
    instance: str | None = None
    made_on: Machine | None = None
    prompt_id: str | None = None
    warm: bool | None = None
    cached: bool = False
    lora: str | None = None  # what a training published
    plan: dict[str, Any] | None = None  # what a training's worker chose for its machine
    attempts: int = 0
    takeovers: int = 0  # times a dispatcher died over it
    avoid: tuple[str, ...] = ()  # instances that ran out of memory with it
    claimed_ms: int | None = None  # by its first attempt
    started_ms: int | None = None
    finished_ms: int | None = None
    deliveries: tuple[Delivery, ...] = Field((), exclude=True)  # written beside the record after its end; in no event

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL


def now_ms() -> int:
    """Milliseconds since the epoch."""
    return time.time_ns() // 1_000_000


def new_job_id(kind: str = "gen") -> str:
    """An id that sorts by time of making and cannot be guessed (64 random bits)."""
    return f"{kind}_{now_ms():012x}{secrets.token_hex(8)}"


def new_input_file(extension: str = "png") -> str:
    """A name that nobody can guess, in a folder of ours below ComfyUI's input folder: its editor does not list it."""
    return f"fluxgate/{secrets.token_hex(16)}.{extension}"
