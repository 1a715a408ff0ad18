"""Jobs for tests: specs with only what a test cares about spelled out, a clock that the test moves, and short words for the store."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from gateway.jobs.events import read_events
from gateway.jobs.model import Event, EventKind, Job, JobSpec, JobStatus, stream_position
from gateway.jobs.records import Claim
from gateway.jobs.store import JobStore
from gateway.redis_client import RedisClient

GRAPH = b'{"1": {"class_type": "EmptyImage", "inputs": {}}}'
START_MS = 1_767_225_600_000
LEASE_S = 10.0


def make_spec(job_id: str, **fields: Any) -> JobSpec:
    """A spec of caller `ann` unless told otherwise; the base model and the LoRAs matter to placement alone."""
    given: dict[str, Any] = {
        "id": job_id,
        "caller": "ann",
        "workflow": "flux",
        "workflow_version": "1",
        "base_model": "flux1-dev",
        "parameters": {"prompt": "a red circle"},
        "seed": 7,
        "created_ms": START_MS,
    }
    return JobSpec(**(given | fields))


async def read_all(redis: RedisClient, job_id: str) -> list[Event]:
    """A job's whole stream, by pages."""
    events: list[Event] = []
    while page := await read_events(redis, job_id, events[-1].id if events else "0"):
        events += page
    return events


def statuses(events: list[Event]) -> list[str]:
    """The statuses told, in order."""
    return [Job.model_validate_json(event.data).status.value for event in events if event.kind == EventKind.STATUS]


def is_in_order(events: list[Event]) -> bool:
    """Whether every id is greater than the one before."""
    places = [stream_position(event.id) for event in events]
    return all(one < two for one, two in pairwise(places))


class Clock:
    """Milliseconds that pass when told to."""

    def __init__(self) -> None:
        self.now_ms = START_MS

    def __call__(self) -> int:
        return self.now_ms

    def pass_s(self, seconds: float) -> None:
        self.now_ms += int(seconds * 1000)


_leases: Iterator[str] = (f"lease-{number}" for number in range(1_000_000))


async def claim(store: JobStore, job_id: str, *, instance: str = "a", slots: int = 2, **given: Any) -> Claim | None:
    lease = given.pop("lease", None) or next(_leases)
    return await store.claim(
        job_id,
        instance=instance,
        lease=lease,
        lease_s=LEASE_S,
        slots=slots,
        prompt_id=f"prompt-of-{lease}",
        **({"base_model": "flux1-dev", "lora_files": ()} | given),
    )


async def take(store: JobStore, job_id: str, **given: Any) -> Claim:
    taken = await claim(store, job_id, **given)
    assert taken is not None, f"{job_id} was not to be had"
    return taken


async def create(store: JobStore, *job_ids: str, **fields: Any) -> None:
    for job_id in job_ids:
        await store.create(make_spec(job_id, **fields), GRAPH)


async def finish(store: JobStore, claim: Claim, status: JobStatus = JobStatus.SUCCEEDED) -> bool:
    return await store.finish(claim, claim.job.model_copy(update={"status": status}))


async def line(store: JobStore) -> list[str]:
    return (await store.peek(1000))[0]
