"""A batch as it is kept: what was accepted, its items in packets, and one letter for how each of them stands. No I/O."""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gateway.jobs.model import JobSpec, JobStatus
from gateway.jobs.records import Item

# Items that travel together between Redis and a process. A hundred alike ones take some ten kilobytes, packed.
PACKET = 100
WAITING, LIVE = ".", "q"
LETTERS = {JobStatus.SUCCEEDED: "s", JobStatus.FAILED: "f", JobStatus.CANCELED: "c", JobStatus.EXPIRED: "x"}
_STATUSES = {letter: status for status, letter in LETTERS.items()}


class BatchSpec(BaseModel):
    """What was accepted. `sweep` as it was written, for a table of the results."""

    model_config = ConfigDict(extra="ignore")

    id: str
    caller: str
    total: int
    created_ms: int
    workflow: str | None = None  # None: the items differ
    sweep: dict[str, Any] | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class Archive(BaseModel):
    """The zip of a batch's pictures. `done` items of the batch are in it so far."""

    model_config = ConfigDict(extra="ignore")

    status: Literal["building", "ready", "failed"] = "building"
    done: int = 0
    pictures: int = 0
    size_bytes: int | None = None
    tries: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch at one moment. `states` holds a letter for each item, `live` the status of those that are unfinished jobs."""

    spec: BatchSpec
    fed: int
    states: str
    live: dict[str, JobStatus]
    canceled: bool = False
    deleted: bool = False
    ended_ms: int | None = None
    webhook: str | None = None  # what only the teller of the jobs' ends may read
    archive: Archive | None = None

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def status(self) -> JobStatus:
        if self.ended_ms is None:
            if self.canceled:
                return JobStatus.CANCELING
            return JobStatus.RUNNING if set(self.states) - {WAITING, LIVE} or self.counts()["running"] else JobStatus.QUEUED
        if "c" in self.states:
            return JobStatus.CANCELED
        return JobStatus.FAILED if {"f", "x"} & set(self.states) else JobStatus.SUCCEEDED

    def counts(self) -> dict[str, int]:
        """Items by status; those that are no job yet wait like those that are queued."""
        letters, live = Counter(self.states), Counter(self.live.values())
        found = {status.value: live[status] for status in JobStatus} | {
            status.value: letters[letter] for letter, status in _STATUSES.items()
        }
        # A job whose end is being written counts as what it was.
        found["queued"] = len(self.states) - sum(count for status, count in found.items() if status != "queued")
        return found

    def item_status(self, index: int, job_id: str) -> JobStatus:
        return _STATUSES.get(self.states[index]) or self.live.get(job_id, JobStatus.QUEUED)


def archive_key(batch_id: str) -> str:
    """Where the zip of its pictures lies in the bucket."""
    return f"batches/{batch_id}/pictures.zip"


def pack(items: Sequence[Item]) -> bytes:
    """At most PACKET items as they lie in Redis."""
    rows = [[item.spec.model_dump(mode="json"), item.graph.decode(), item.reuse] for item in items]
    return zlib.compress(json.dumps(rows, ensure_ascii=False).encode(), 6)


def unpack(packet: bytes) -> list[Item]:
    return [Item(JobSpec.model_validate(spec), graph.encode(), reuse) for spec, graph, reuse in json.loads(zlib.decompress(packet))]
