"""The forms a job takes in Redis, and what the store answers: claims, loads, outcomes of a creation. No I/O."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from gateway.errors import TooManyRequests, Unprocessable
from gateway.jobs.model import EventKind, Job, JobSpec, now_ms

_JSON_FIELDS = ("progress", "outputs", "error", "metrics", "warm", "cached", "avoid", "deliveries", "plan", "made_on")
_PLAIN_FIELDS = ("status", "revision", "instance", "prompt_id", "attempts", "lora", "takeovers", "claimed_ms", "started_ms", "finished_ms")

EventDraft = tuple[EventKind, str, str]  # kind, status (or ""), data as JSON


@dataclass(slots=True)
class Claim:
    """A job, its graph as JSON, and the lease that makes the holder its only writer."""

    job: Job
    graph: bytes
    lease: str
    writes: int = 0
    holds_slot: bool = True  # as Redis has it
    is_leaving: bool = False  # a claim on its way tells Redis that the slot is free
    cached_in: str | None = None  # a finished job that made the same meanwhile
    asked_s: float = 0.0  # time.monotonic() before it was asked for: the lease is at least that old

    @property
    def id(self) -> str:
        return self.job.id


class Made(NamedTuple):
    """A job as it was made, known where it was: what Redis need not say again."""

    job: Job
    graph: bytes


class Load(NamedTuple):
    """What an instance holds, as Redis knows it: slots used, and what the last job placed there will have loaded.

    `recent` are the LoRAs of the jobs, oldest first, whose results its cache still holds; empty where it holds no more than the last one's.
    """

    slots_used: int
    base_model: str | None
    lora_files: frozenset[str]
    recent: tuple[frozenset[str], ...] = ()


class Limits(NamedTuple):
    """Admission: waiting jobs in all; unfinished jobs and GPU seconds a day (0: any number) of a caller whose key says nothing."""

    queue_depth: int = 10_000
    jobs_per_caller: int = 10_000
    gpu_seconds_per_day: int = 0


class Item(NamedTuple):
    """A job to be, decided in full: what was asked for, its graph as it will be submitted, and whether an identical job may answer."""

    spec: JobSpec
    graph: bytes
    reuse: bool


class Admitted(NamedTuple):
    """What came of a creation. `cached` stored nothing yet: `job_id` made the same before. `replay`: `job_id` is the first try's.

    `stale` stored nothing: of the job's batch another item is next, or none any more.
    """

    outcome: Literal["created", "following", "cached", "replay", "stale"]
    job_id: str


IDEMPOTENCY_TTL_S = 24 * 3600


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """A caller's key and the hash of the body it came with."""

    caller: str
    key: str
    body_hash: str

    @property
    def record(self) -> str:
        """Where in Redis the first request with it is known."""
        return f"fluxgate:idempotency:{self.caller}:{self.key}"

    def require_same_body(self, known_hash: str) -> None:
        if known_hash != self.body_hash:
            raise Unprocessable(
                "This Idempotency-Key came with another body before.",
                code="idempotency_key_reuse",
                hint="Use a new key for a new request.",
                details={"parameter": "Idempotency-Key", "value": self.key[:100]},
            )


DAY_MS = 86_400_000


def seconds_until_midnight(now: int) -> int:
    """Until the day in UTC ends, at least 1."""
    return (DAY_MS - now % DAY_MS) // 1000 + 1


def describe_refusal(outcome: str, used: int, allowed: int) -> TooManyRequests:
    """Why the scripts let a caller have no further job: its unfinished jobs, or the GPU seconds of its jobs that ended today."""
    if outcome == "caller_full":
        details = {"limit": "jobs_in_flight", "value": used, "allowed": allowed}
        hint = "Wait until one has ended, or cancel one."
        return TooManyRequests(f"You have {used} unfinished jobs.", code="too_many_jobs", hint=hint, retry_after_s=30, details=details)
    reset_s = seconds_until_midnight(now_ms())
    details = {"limit": "gpu_seconds_per_day", "value": used, "allowed": allowed, "reset_s": reset_s}
    message = f"Your jobs took {used} s of GPU time today; {allowed} are yours."
    return TooManyRequests(message, code="gpu_seconds_spent", hint="Midnight UTC begins a new day.", retry_after_s=reset_s, details=details)


def status_event(job: Job) -> EventDraft:
    """The event that tells a job's new status: the whole record as it is now."""
    return EventKind.STATUS, job.status.value, job.model_dump_json()


def private_webhook(spec: JobSpec) -> str:
    """What only the teller of the job's end may read; empty when nobody is told."""
    return spec.webhook.private_json() if spec.webhook else ""


def output_events(job: Job) -> list[EventDraft]:
    """One event for each stored picture."""
    return [(EventKind.OUTPUT, "", output.model_dump_json()) for output in job.outputs]


def decode_job(fields: Mapping[bytes, bytes]) -> Job:
    record: dict[str, Any] = {"spec": json.loads(fields[b"spec"])}
    for name in _PLAIN_FIELDS:
        if (raw := fields.get(name.encode())) is not None:
            record[name] = raw.decode()
    for name in _JSON_FIELDS:
        if (raw := fields.get(name.encode())) is not None:
            record[name] = json.loads(raw)
    return Job.model_validate(record)


def encode_fields(fields: Mapping[str, Any]) -> list[str]:
    """Flat (name, value) pairs; pydantic values as JSON."""
    flat: list[str] = []
    for name, value in fields.items():
        if hasattr(value, "model_dump_json"):
            text = value.model_dump_json()
        elif name in _JSON_FIELDS:
            text = json.dumps(value, default=lambda part: part.model_dump())
        else:
            text = str(value)
        flat += [name, text]
    return flat


def pair_up(flat: list[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
