"""What one job says while it runs, on its way to Redis: bundled, in order, and counted once however often it is sent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

from gateway.errors import RedisUnavailable
from gateway.jobs.model import EventKind, Job, JobStatus, Progress
from gateway.jobs.records import Claim, EventDraft
from gateway.jobs.store import JobStore

T = TypeVar("T")

# Events of one burst travel together; below what a person can see, above what a Redis round trip costs.
FLUSH_S = 0.02
# A node that ticks faster than that is told by its newest step alone.
BURST = 16


class LeaseLost(Exception):
    """Somebody else is this job's writer now; whatever we still know is theirs to find out."""


async def persist(call: Callable[[], Awaitable[T]]) -> T:
    """Redis may be away for a while: the same write is tried until it is back, and counts once."""
    while True:
        try:
            return await call()
        except RedisUnavailable:
            await asyncio.sleep(0.5)


class Writer:
    """The one writer of a claimed job. All of it is called from one loop."""

    def __init__(self, claim: Claim, store: JobStore, read: Callable[[], tuple[Job, Progress]], on_cancel: Callable[[], None]) -> None:
        """`read` gives the job as it is to be recorded now. `on_cancel` is called when an answer says that it shall be canceled."""
        self._claim, self._store, self._read, self._on_cancel = claim, store, read, on_cancel
        self._pending: list[EventDraft] = []
        self._wake = asyncio.Event()
        self.writing = asyncio.Lock()  # held during a write, which must not be broken off: its events would be lost
        self._written: Job | None = None  # the record as of the last write; only progress changes more often
        self._slot_given_up = False

    def queue(self, event: EventDraft) -> None:
        """To be told with the next write, which is soon."""
        if len(self._pending) >= BURST and event[0] is EventKind.PROGRESS and self._pending[-1][0] is EventKind.PROGRESS:
            self._pending[-1] = event
        else:
            self._pending.append(event)
        self._wake.set()

    def give_slot_up(self) -> None:
        """The job's slot is free. Redis hears of it with the next claim for the instance, the next write or the job's end."""
        self._slot_given_up = True
        self._wake.set()

    async def write_for_ever(self) -> None:
        """Raises LeaseLost."""
        while True:
            await self._wake.wait()
            # All jobs write at the same moments, so that their news travel together.
            await asyncio.sleep(FLUSH_S - time.monotonic() % FLUSH_S)
            await self.flush(free_slot=self._slot_given_up)

    async def flush(self, *, free_slot: bool = False) -> None:
        """Write what is new; `free_slot` gives the job's slot up in the same step. Raises LeaseLost."""
        async with self.writing:
            self._wake.clear()
            events, self._pending = self._pending, []
            free_slot = free_slot and self._claim.holds_slot
            if not events and not free_slot:
                return
            fields = self._fields()
            self._claim.writes += 1
            write = self._claim.writes
            status = await persist(lambda: self._store.update(self._claim, fields, events, free_slot=free_slot, write=write))
        if status == "lost":
            raise LeaseLost(self._claim.id)
        self._claim.holds_slot &= not free_slot
        if status == JobStatus.CANCELING:
            self._on_cancel()

    def _fields(self) -> dict[str, Any]:
        job, progress = self._read()
        fields: dict[str, Any] = {"progress": progress}
        if job is not self._written:
            fields["warm"], self._written = job.warm, job
            if job.started_ms is not None:
                fields |= {"status": job.status.value, "started_ms": job.started_ms, "metrics": job.metrics}
        return fields

    async def finish(self, job: Job, events: Iterable[EventDraft]) -> None:
        """The job's end, with what was not told yet before it. Raises LeaseLost."""
        async with self.writing:
            drafts, self._pending = [*self._pending, *events], []
            if not await persist(lambda: self._store.finish(self._claim, job, drafts)):
                raise LeaseLost(self._claim.id)
            self._claim.holds_slot = False
