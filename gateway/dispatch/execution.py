"""One claimed job on one instance, from submission to its end. History is the truth; the socket only makes it quick.

The prompt's slot is freed as soon as ComfyUI is done, before pictures are fetched: the instance never waits for us.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from gateway.comfy.client import HistoryEntry
from gateway.comfy.messages import Executing, ExecutionError, ExecutionStart, Message, Preview
from gateway.dispatch.faults import describe_node_error, describe_rejection
from gateway.dispatch.ingest import Ingest
from gateway.dispatch.instance import Instance
from gateway.dispatch.progress import ProgressTracker
from gateway.errors import InstanceError, InstanceUnreachable, PromptRejected, RedisUnavailable, Unavailable
from gateway.jobs.model import EventKind, Job, JobError, JobStatus, now_ms
from gateway.jobs.store import Claim, EventDraft, JobStore, status_event
from gateway.settings import Settings

T = TypeVar("T")

log = logging.getLogger(__name__)

# Events of one burst travel together; below what a person can see, above what a Redis round trip costs.
FLUSH_S = 0.02
PREVIEW_S = 0.1
CANCEL_POLL_S = 0.25


class LeaseLost(Exception):
    """Somebody else is this job's writer now; whatever we still know is theirs to find out."""


class GoneFromInstance(Exception):
    """The instance neither runs, keeps nor remembers the prompt."""


class Execution:
    """Call `run` once. `cancel` may come at any time, from the same loop."""

    def __init__(
        self, claim: Claim, instance: Instance, store: JobStore, ingest: Ingest, settings: Settings, on_slot_free: Callable[[], None]
    ) -> None:
        self.claim = claim
        self.job: Job = claim.job
        self._instance, self._store, self._ingest, self._settings = instance, store, ingest, settings
        self._on_slot_free = on_slot_free
        self._graph: dict[str, Any] = json.loads(claim.graph)
        self._tracker = ProgressTracker(self._graph)
        self._pending: list[EventDraft] = []
        self._wake_flush = asyncio.Event()
        self._news = asyncio.Event()  # the end marker came, or a cancel
        self._has_ended = False
        self._cancel_wanted = claim.job.status is JobStatus.CANCELING
        self._node_error: ExecutionError | None = None
        self._preview_due = 0.0
        self._writing = asyncio.Lock()

    @property
    def prompt_id(self) -> str:
        assert self.job.prompt_id is not None, "a claim always carries a prompt id"
        return self.job.prompt_id

    def cancel(self) -> None:
        self._cancel_wanted = True
        self._news.set()

    def _end(self) -> None:
        self._has_ended = True
        self._news.set()

    async def run(self, *, resumed: bool) -> None:
        """Carry the job to its end. Raises LeaseLost when it is no longer ours."""
        self._instance.socket.listen(self.prompt_id, self._on_message)
        try:
            await self._run(resumed)
        finally:
            self._instance.socket.forget(self.prompt_id)
            self._on_slot_free()

    async def _run(self, resumed: bool) -> None:
        if self.job.attempts > self._settings.max_attempts:
            await self._fail(
                JobError(code="too_many_attempts", message=f"Given up after {self._settings.max_attempts} attempts that did not end.")
            )
            return
        flusher = asyncio.create_task(self._flush_for_ever())
        try:
            entry = await self._execute(resumed)
        except PromptRejected as rejection:
            await self._fail(describe_rejection(rejection, self._graph))
            return
        except (GoneFromInstance, InstanceUnreachable) as reason:
            await self._give_back(reason)
            return
        finally:
            # Never in the middle of a write: its events would be lost.
            async with self._writing:
                flusher.cancel()
        await self._conclude(entry)

    # -- on the instance ---------------------------------------------------------------------------------------

    async def _execute(self, resumed: bool) -> HistoryEntry | None:
        """Submit unless the instance has the prompt already, wait for its end. None: canceled before it ran."""
        if self._cancel_wanted and not resumed:
            return None
        if not resumed or not await self._is_known():
            if resumed and self.job.status is JobStatus.CANCELING:
                return None
            if resumed:
                raise GoneFromInstance
            await self._submit()
        return await self._wait_for_end()

    async def _is_known(self) -> bool:
        client = self._instance.client

        async def look() -> bool:
            return (await client.queue()).holds(self.prompt_id) or await client.history(self.prompt_id) is not None

        return await self._patiently(look)

    async def _submit(self) -> None:
        client, client_id = self._instance.client, self._instance.socket.client_id
        try:
            await client.submit(self.prompt_id, client_id, self.claim.graph)
        except PromptRejected:
            raise
        except InstanceError:
            # It may have been taken all the same (a 500 or a lost answer): only its absence permits another try.
            if not await self._is_known():
                raise GoneFromInstance from None

    async def _patiently(self, look: Callable[[], Awaitable[T]]) -> T:
        """Ask until the instance answers, `instance_lost_s` at the most; then InstanceUnreachable."""
        deadline, pause_s = time.monotonic() + self._settings.instance_lost_s, 0.1
        while True:
            try:
                return await look()
            except InstanceError as error:
                if time.monotonic() > deadline:
                    raise InstanceUnreachable(f"{self._instance.id} has not answered for {self._settings.instance_lost_s:g} s") from error
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 1.0)

    async def _wait_for_end(self) -> HistoryEntry | None:
        """The first of: end marker, history. A cancel stops the prompt on the way. None: canceled and nothing left of it."""
        while True:
            if not self._has_ended:
                with suppress(TimeoutError):
                    async with asyncio.timeout(CANCEL_POLL_S if self._cancel_wanted else self._settings.poll_s):
                        await self._news.wait()
            self._news.clear()
            if self._cancel_wanted and not self._has_ended:
                await self._stop_prompt()
            found, entry = await self._patiently(self._look)
            if found is False:
                if self._cancel_wanted:
                    return None
                raise GoneFromInstance
            if entry is not None:
                return entry
            # The end marker came but history is not there: keep asking, without hurry.
            self._has_ended = False

    async def _look(self) -> tuple[bool, HistoryEntry | None]:
        """Whether the instance knows the prompt, and how it ended. Queue first: leaving it and entering history is one step."""
        client = self._instance.client
        if self._has_ended:
            entry = await client.history(self.prompt_id)
            if entry is not None:
                return True, entry
        if (await client.queue()).holds(self.prompt_id):
            return True, None
        entry = await client.history(self.prompt_id)
        return entry is not None, entry

    async def _stop_prompt(self) -> None:
        """Out of the queue if it waits; interrupted by id, which touches nobody else's, if it runs."""
        try:
            await self._instance.client.drop(self.prompt_id)
            await self._instance.client.interrupt(self.prompt_id)
        except InstanceError as error:
            log.info("stop not delivered", extra={"instance": self._instance.id, "error": error.message})

    # -- messages ----------------------------------------------------------------------------------------------

    def _on_message(self, message: Message | Preview) -> None:
        if isinstance(message, Preview):
            self._show_preview(message)
            return
        if isinstance(message, ExecutionStart):
            self._start()
        elif isinstance(message, ExecutionError):
            self._node_error = message
        elif isinstance(message, Executing) and message.data.node is None:
            self._tracker.apply(message, now_ms())
            self._end()
            return
        progress = self._tracker.apply(message, now_ms())
        if progress is not None:
            self._queue_event((EventKind.PROGRESS, "", progress.model_dump_json()))

    def _start(self) -> None:
        if self.job.started_ms is None:
            started = now_ms()
            metrics = self.job.metrics.model_copy(update={"queue_ms": started - self.job.spec.created_ms})
            self.job = self.job.model_copy(update={"status": JobStatus.RUNNING, "started_ms": started, "metrics": metrics})
            self._queue_event(status_event(self.job))

    def _show_preview(self, preview: Preview) -> None:
        if time.monotonic() >= self._preview_due:
            self._preview_due = time.monotonic() + PREVIEW_S
            self._queue_event((EventKind.PREVIEW, "", _preview_json(preview)))

    def _queue_event(self, event: EventDraft) -> None:
        self._pending.append(event)
        self._wake_flush.set()

    # -- writing -----------------------------------------------------------------------------------------------

    async def _flush_for_ever(self) -> None:
        while True:
            await self._wake_flush.wait()
            await asyncio.sleep(FLUSH_S)
            try:
                await self._flush()
            except LeaseLost:
                self._end()
                return

    async def _flush(self, *, free_slot: bool = False) -> None:
        async with self._writing:
            self._wake_flush.clear()
            events, self._pending = self._pending, []
            if not events and not free_slot:
                return
            fields: dict[str, Any] = {"progress": self._tracker.current, "warm": self.job.warm}
            if self.job.started_ms is not None:
                fields |= {"status": self.job.status.value, "started_ms": self.job.started_ms, "metrics": self.job.metrics}
            await self._write(fields, events, free_slot=free_slot)

    async def _write(self, fields: dict[str, Any], events: Iterable[EventDraft], *, free_slot: bool) -> None:
        """Redis may be away for a while: the same write is tried until it is back, and counts once."""
        self.claim.writes += 1
        events = list(events)
        while True:
            try:
                status = await self._store.update(self.claim, fields, events, free_slot=free_slot, write=self.claim.writes)
                break
            except RedisUnavailable:
                await asyncio.sleep(0.5)
        if status == "lost":
            raise LeaseLost(self.claim.id)
        if status == JobStatus.CANCELING:
            self.cancel()

    async def _persist(self, call: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await call()
            except RedisUnavailable:
                await asyncio.sleep(0.5)

    # -- the end -----------------------------------------------------------------------------------------------

    async def _conclude(self, entry: HistoryEntry | None) -> None:
        ended_ms = now_ms()
        execution_ms = ended_ms - self.job.started_ms if self.job.started_ms is not None else None
        if entry is not None and execution_ms is None:
            # The socket said nothing (reconnect, takeover): the start is not known, only that it ran.
            self._start()
        metrics = self.job.metrics.model_copy(update={"execution_ms": execution_ms, "load_ms": self._tracker.load_ms})
        self.job = self.job.model_copy(update={"metrics": metrics})
        await self._flush(free_slot=True)
        self._on_slot_free()
        if entry is None or entry.was_interrupted:
            await self._end_stopped()
        elif entry.error is not None or self._node_error is not None:
            error = entry.error or (self._node_error.data if self._node_error else None)
            assert error is not None
            await self._fail(describe_node_error(error, self._graph))
        else:
            await self._succeed(entry, ended_ms)

    async def _end_stopped(self) -> None:
        if self._cancel_wanted:
            await self._finish(JobStatus.CANCELED)
        else:
            await self._fail(
                JobError(code="interrupted", message="The prompt was interrupted on the instance by somebody other than this gateway.")
            )

    async def _succeed(self, entry: HistoryEntry, ended_ms: int) -> None:
        try:
            outputs = await self._ingest.store(self._instance.client, self.job.spec, entry.files())
        except Unavailable as error:
            await self._fail(JobError(code="upload_failed", message=f"The pictures could not be stored: {error.message}", hint=error.hint))
            return
        if not outputs:
            await self._fail(
                JobError(code="no_output", message="The workflow ended without a picture.", hint="Does it have a SaveImage node?")
            )
            return
        metrics = self.job.metrics.model_copy(update={"upload_ms": now_ms() - ended_ms})
        progress = self._tracker.current.model_copy(
            update={
                "value": 1.0,
                "nodes_done": len(self._graph),
                "current_node": None,
                "current_node_class": None,
                "step": None,
                "steps": None,
            }
        )
        self.job = self.job.model_copy(update={"outputs": outputs, "metrics": metrics, "progress": progress})
        await self._finish(JobStatus.SUCCEEDED, [(EventKind.OUTPUT, "", output.model_dump_json()) for output in outputs])

    async def _fail(self, error: JobError) -> None:
        self.job = self.job.model_copy(update={"error": error})
        await self._finish(JobStatus.FAILED, [(EventKind.ERROR, "", error.model_dump_json())])

    async def fail_unexpectedly(self) -> None:
        """End the job after a surprise of our own; the log has the trace."""
        await self._fail(JobError(code="internal_error", message="The gateway met something it did not expect; its log says what."))

    async def _finish(self, status: JobStatus, events: Iterable[EventDraft] = ()) -> None:
        self.job = self.job.model_copy(update={"status": status, "finished_ms": now_ms()})
        drafts = [*self._pending, *events]
        self._pending = []
        if not await self._persist(lambda: self._store.finish(self.claim, self.job, drafts)):
            raise LeaseLost(self.claim.id)

    async def _give_back(self, reason: Exception) -> None:
        """The instance lost the prompt or is lost itself: to the front of the line again, until the attempts are used up."""
        log.warning(
            "attempt lost",
            extra={"instance": self._instance.id, "attempt": self.job.attempts, "reason": str(reason) or type(reason).__name__},
        )
        if self._cancel_wanted:
            await self._finish(JobStatus.CANCELED)
            return
        if self.job.attempts >= self._settings.max_attempts:
            message = f"The instance lost the job in each of {self.job.attempts} attempts."
            await self._fail(JobError(code="instance_lost", message=message, hint="GET /v1/instances shows what the instances say."))
            return
        if await self._persist(lambda: self._store.requeue(self.claim)) == "canceling":
            await self._finish(JobStatus.CANCELED)


def _preview_json(preview: Preview) -> str:

    return json.dumps({"mime": preview.content_type, "base64": base64.b64encode(preview.image).decode()})
