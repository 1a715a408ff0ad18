"""One claimed job, from its claim to its end: what its prompt says becomes events, its pictures become objects in S3.

The prompt's slot is freed as soon as ComfyUI is done, before pictures are fetched: the instance never waits for us.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from comfy_workflows.graph import find_sinks
from gateway.comfy.client import HistoryEntry, OutputFile
from gateway.comfy.companion import save_in_background
from gateway.comfy.messages import ErrorData, Executed, ExecutedData, ExecutionError, ExecutionStart, Message, Preview
from gateway.dispatch.faults import describe_node_error, describe_rejection, misses_a_value
from gateway.dispatch.fleet import missing
from gateway.dispatch.ingest import Early, Ingest
from gateway.dispatch.instance import Instance
from gateway.dispatch.progress import ProgressTracker
from gateway.dispatch.prompt import DeadlinePassed, GoneFromInstance, Prompt
from gateway.dispatch.writer import LeaseLost, Writer, persist
from gateway.errors import (
    InstanceError,
    InstanceUnreachable,
    Moderated,
    ModerationUnavailable,
    PromptRejected,
    StorageUnavailable,
    Unavailable,
)
from gateway.jobs.model import EventKind, Job, JobError, JobStatus, Output, now_ms
from gateway.jobs.records import Claim, EventDraft, output_events, status_event
from gateway.jobs.store import JobStore
from gateway.settings import Settings

log = logging.getLogger(__name__)

PREVIEW_S = 0.1
MAX_PREVIEW_BYTES = 200_000
MAX_TAKEOVERS = 5


class Execution:
    """Call `run` once. `cancel` may come at any time, from the same loop."""

    def __init__(
        self,
        claim: Claim,
        instance: Instance,
        store: JobStore,
        ingest: Ingest,
        settings: Settings,
        on_slot_free: Callable[[], None],
        is_watched: Callable[[str], bool],
    ) -> None:
        """`is_watched(job_id)`: whether somebody looks at the previews."""
        self.claim = claim
        self.job: Job = claim.job
        self._instance, self._store, self._ingest, self._settings = instance, store, ingest, settings
        self._on_slot_free, self._is_watched = on_slot_free, is_watched
        self._graph: dict[str, Any] = json.loads(claim.graph)
        self._tracker = ProgressTracker(self._graph)
        self._companion = instance.has_companion
        sinks = find_sinks(self._graph)
        self._prompt = Prompt(claim.job.prompt_id or "", self._graph_to_submit(), sinks, instance, settings, self._on_message)
        self._prompt.stop_wanted = claim.job.status is JobStatus.CANCELING
        self._cancel_wanted = self._prompt.stop_wanted
        self._writer = Writer(claim, store, lambda: (self.job, self._tracker.current), self.cancel)
        self._early: dict[OutputFile, Early] = {}  # pictures that are fetched before the prompt's end
        self._storing: asyncio.Task[tuple[Output, ...] | JobError] | None = None
        self._node_error: ErrorData | None = None
        self._preview_due = 0.0

    def _graph_to_submit(self) -> bytes:
        """The graph as it was admitted; where our extension is, its save nodes encode in the background."""
        if not self._companion:
            return self.claim.graph
        parameters = self.job.spec.parameters
        graph = save_in_background(self._graph, str(parameters.get("output_format", "png")), int(parameters.get("quality", 90)))
        return json.dumps(graph, ensure_ascii=False).encode()

    def cancel(self) -> None:
        self._cancel_wanted = True
        self._prompt.stop()

    def lose(self) -> None:
        """Its lease is somebody else's: `run` ends with LeaseLost."""
        self._prompt.abandon()
        if self._storing is not None:
            self._storing.cancel()

    async def stop_if_replaced(self) -> None:
        """Where the job was started anew its old prompt runs for nobody. A prompt that somebody else follows is theirs."""
        job = await self._store.load(self.claim.id)
        if job is None or job.prompt_id != self._prompt.id:
            await self._prompt.stop_on_instance()

    async def run(self, *, resumed: bool) -> None:
        """Carry the job to its end. Raises LeaseLost when it is no longer ours."""
        try:
            if self.job.attempts > self._settings.max_attempts or self.job.takeovers > MAX_TAKEOVERS:
                await self._prompt_away()
                message = f"Given up: {self.job.attempts} attempts, and {self.job.takeovers} dispatchers did not live to see it end."
                await self._fail(JobError(code="too_many_attempts", message=message))
            else:
                await self._run(resumed)
        finally:
            self.claim.holds_slot = False
            for fetching in self._early.values():
                fetching.cancel()
            self.free_slot()

    def free_slot(self) -> None:
        """Tell the dispatcher that the instance has room. More than once does no harm."""
        self._on_slot_free()

    async def _run(self, resumed: bool) -> None:
        writing = asyncio.create_task(self._write_for_ever())
        try:
            await self._follow(resumed)
        finally:
            # Never in the middle of a write: its events would be lost.
            async with self._writer.writing:
                writing.cancel()

    async def _follow(self, resumed: bool) -> None:
        since_claim_s = (now_ms() - (self.job.claimed_ms or now_ms())) / 1000
        try:
            if not resumed:
                await self._bring_inputs()
                await self._hold_lease()
            entry = await self._prompt.follow(resumed=resumed, deadline=time.monotonic() + self.job.spec.timeout_s - since_claim_s)
        except PromptRejected as rejection:
            if misses_a_value(rejection) and await self._has_lost_a_file():
                await self._give_back(rejection)
            else:
                await self._fail(describe_rejection(rejection, self._graph))
            return
        except StorageUnavailable as error:
            await self._fail(JobError(code="input_unavailable", message=f"An input could not be read: {error.message}", hint=error.hint))
            return
        except DeadlinePassed as passed:
            self._instance.breaker.record_fault(passed.code)
            await self._fail(JobError(code=passed.code, message=str(passed)))
            return
        except (GoneFromInstance, InstanceUnreachable) as reason:
            self._instance.breaker.record_fault(str(reason) or "lost a prompt")
            await self._give_back(reason)
            return
        self._instance.breaker.record_success()
        await self._conclude(entry)

    async def _has_lost_a_file(self) -> bool:
        """What an instance has is known some seconds late: a file may have gone since the job was placed there, to be brought again."""
        try:
            await self._instance.look_again()
        except InstanceError:
            return False
        return bool(missing(self.job.spec.needs, self._instance.catalog or {}))

    async def _write_for_ever(self) -> None:
        try:
            await self._writer.write_for_ever()
        except LeaseLost:
            self.lose()

    async def _bring_inputs(self) -> None:
        try:
            await self._ingest.bring(self._instance.client, self.job.spec)
        except InstanceUnreachable:
            raise
        except InstanceError as error:
            raise GoneFromInstance(error.message) from error

    async def _hold_lease(self) -> None:
        """Between claim and submit a process may be paused or kept waiting: what somebody else has taken over must not run for nobody."""
        if time.monotonic() - self.claim.asked_s < self._settings.lease_s / 3:
            return
        status = (await persist(lambda: self._store.renew([self.claim], self._settings.lease_s)))[self.claim.id]
        if status == "lost":
            raise LeaseLost(self.claim.id)
        if status == JobStatus.CANCELING:
            self.cancel()

    async def _take_inputs_away(self) -> None:
        await self._ingest.take_away(self._instance.client, self.job.spec, companion=self._companion)

    async def _prompt_away(self) -> None:
        """A job that is given up must not go on running."""
        await self._prompt.stop_on_instance()

    # -- messages ----------------------------------------------------------------------------------------------

    def _on_message(self, message: Message | Preview) -> None:
        if isinstance(message, Preview):
            self._show_preview(message)
            return
        if isinstance(message, ExecutionStart):
            self._start()
        elif isinstance(message, ExecutionError):
            self._node_error = message.data
        elif isinstance(message, Executed):
            self._fetch_early(message.data)
        progress = self._tracker.apply(message, now_ms())
        if progress is not None:
            self._writer.queue((EventKind.PROGRESS, "", progress.model_dump_json()))

    def _start(self) -> None:
        if self.job.started_ms is None:
            started = now_ms()
            metrics = self.job.metrics.model_copy(update={"queue_ms": started - self.job.spec.created_ms})
            self.job = self.job.model_copy(update={"status": JobStatus.RUNNING, "started_ms": started, "metrics": metrics})
            self._writer.queue(status_event(self.job))

    def _fetch_early(self, said: ExecutedData) -> None:
        """A node's pictures are whole when it tells of them, a little before the prompt's end. They count when the prompt succeeds."""
        for file in self._files(HistoryEntry.heard({said.node: said.output or {}})):
            if file not in self._early:
                instance, spec = self._instance, self.job.spec
                self._early[file] = self._ingest.fetch_early(
                    instance.client, spec, file, companion=self._companion, after=instance.changeover.passed
                )

    def _show_preview(self, preview: Preview) -> None:
        # A whole picture sent as a frame is no preview: the live feed is bounded by count, not by size.
        is_small = len(preview.image) <= MAX_PREVIEW_BYTES
        # Where pictures are judged nobody sees one before its judge does.
        is_small = is_small and not self._ingest.moderation.judges_pictures
        if is_small and time.monotonic() >= self._preview_due and self._is_watched(self.claim.id):
            self._preview_due = time.monotonic() + PREVIEW_S
            data = {"mime": preview.content_type, "base64": base64.b64encode(preview.image).decode()}
            self._writer.queue((EventKind.PREVIEW, "", json.dumps(data)))

    # -- the end -----------------------------------------------------------------------------------------------

    async def _conclude(self, entry: HistoryEntry | None) -> None:
        ended_ms = now_ms()
        await self._instance.changeover.passed()
        execution_ms = ended_ms - self.job.started_ms if self.job.started_ms is not None else None
        if execution_ms is not None:
            self._instance.learn(self.claim.id, execution_ms / 1000, self._prompt.submitted_s)
        if entry is not None and execution_ms is None:
            # The socket said nothing (reconnect, takeover): when it started is not known, only that it ran.
            self._start()
        metrics = self.job.metrics.model_copy(update={"execution_ms": execution_ms, "load_ms": self._tracker.load_ms})
        self.job = self.job.model_copy(update={"metrics": metrics})
        error = None if entry is None or entry.has_succeeded else entry.error or self._node_error
        if entry is None or entry.was_interrupted:
            await self._leave_instance()
            await self._end_stopped()
        elif error is not None:
            await self._leave_instance()
            await self._end_failed(error)
        elif entry.has_failed:
            await self._leave_instance()
            message = "The instance says that the prompt failed, and not why."
            await self._fail(JobError(code="prompt_failed", message=message, hint="The instance's own log may tell more."))
        else:
            storing = self._storing = asyncio.create_task(self._store_outputs(entry))
            try:
                await self._leave_soon()
                await self._succeed(await storing, entry, ended_ms)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if storing.cancelled() and task is not None and not task.cancelling():
                    # Not we: `lose` stopped it.
                    raise LeaseLost(self.claim.id) from None
                raise
            finally:
                storing.cancel()

    async def _leave_soon(self) -> None:
        """The same where more jobs are at work: then what the last moments said travels with the end, unless storing takes long."""
        if len(self._instance.held) > 1:
            self._instance.leave(self.claim)
            self._writer.give_slot_up()
            self._on_slot_free()
        else:
            await self._leave_instance()

    async def _leave_instance(self) -> None:
        """ComfyUI is done with the prompt: its slot goes to the next job before anything else is done for this one."""
        await self._writer.flush(free_slot=True)
        self._on_slot_free()

    async def _end_stopped(self) -> None:
        if self._cancel_wanted:
            await self._finish(JobStatus.CANCELED)
        else:
            message = "The prompt was interrupted on the instance by somebody other than this gateway."
            await self._fail(JobError(code="interrupted", message=message))

    async def _end_failed(self, error: ErrorData) -> None:
        """A node raised. Out of memory gets one more chance, elsewhere if there is an elsewhere."""
        described = describe_node_error(error, self._graph)
        if described.code != "out_of_memory":
            await self._fail(described)
            return
        try:
            await self._instance.client.free()
        except InstanceError as reason:
            log.info("memory not freed", extra={"error": reason.message})
        if not self.job.avoid and not self._cancel_wanted:
            log.warning("out of memory, one more try", extra={"instance": self._instance.id})
            await self._take_inputs_away()
            if await persist(lambda: self._store.requeue(self.claim, avoid=(self._instance.id,))) != "canceling":
                return
        asked = {name: self.job.spec.parameters.get(name) for name in ("width", "height", "num_images")}
        details = {**described.details, **asked, "base_model": self.job.spec.base_model}
        await self._fail(described.model_copy(update={"details": details}))

    def _files(self, entry: HistoryEntry) -> list[OutputFile]:
        """What is kept: of a caller's own graph also what it only previews."""
        return entry.files(("output", "temp") if self.job.spec.raw else ("output",))

    async def _store_outputs(self, entry: HistoryEntry) -> tuple[Output, ...] | JobError:
        """The stored pictures, or why there are none."""
        try:
            files, client = self._files(entry), self._instance.client
            outputs = await self._ingest.store(client, self.job.spec, files, self._early, companion=self._companion)
        except (Moderated, ModerationUnavailable) as error:
            return JobError(code=error.code, message=error.message, hint=error.hint, details=error.details)
        except Unavailable as error:
            return JobError(code="upload_failed", message=f"The pictures could not be stored: {error.message}", hint=error.hint)
        if outputs or self.job.spec.raw:
            return outputs
        return JobError(code="no_output", message="The workflow ended without a picture.", hint="Does it have a SaveImage node?")

    async def _succeed(self, stored: tuple[Output, ...] | JobError, entry: HistoryEntry, ended_ms: int) -> None:
        if isinstance(stored, JobError):
            await self._fail(stored)
            if stored.code == Moderated.code:
                self._instance.forget_soon(self._prompt.id, entry.files())
            return
        metrics = self.job.metrics.model_copy(update={"upload_ms": now_ms() - ended_ms, **await self._measured_load()})
        self.job = self.job.model_copy(update={"outputs": stored, "metrics": metrics, "progress": self._tracker.completed()})
        await self._finish(JobStatus.SUCCEEDED, output_events(self.job))
        self._instance.forget_soon(self._prompt.id, entry.files())

    async def _measured_load(self) -> dict[str, int]:
        """The instance's own figure for loading, where it has one: better than what its node events tell."""
        if not self._companion:
            return {}
        try:
            load_ms = await self._instance.client.load_ms(self._prompt.id)
        except InstanceError:
            return {}
        return {} if load_ms is None else {"load_ms": load_ms}

    async def _fail(self, error: JobError) -> None:
        self.job = self.job.model_copy(update={"error": error})
        await self._finish(JobStatus.FAILED, [(EventKind.ERROR, "", error.model_dump_json())])

    async def fail_unexpectedly(self) -> None:
        """End the job after a surprise of our own; the log has the trace."""
        await self._fail(JobError(code="internal_error", message="The gateway met something it did not expect; its log says what."))

    async def finish_cached(self, job: Job) -> None:
        """End the job with the pictures of an identical one."""
        self.job = job
        await self._finish(JobStatus.SUCCEEDED, output_events(job))

    async def _finish(self, status: JobStatus, events: Iterable[EventDraft] = ()) -> None:
        ran = self.job.started_ms is not None and not self.job.cached
        files = (value for _, _, value in self.job.spec.needs.choices)
        made_on = self._instance.made_on(files) if ran else self.job.made_on
        self.job = self.job.model_copy(update={"status": status, "finished_ms": now_ms(), "made_on": made_on})
        await self._writer.finish(self.job, events)
        await asyncio.sleep(0)  # who waits for it goes first
        await self._take_inputs_away()

    async def _give_back(self, reason: Exception) -> None:
        """The instance lost the prompt or is lost itself: to the front of the line again, until the attempts are used up."""
        said = str(reason) or type(reason).__name__
        log.warning("attempt lost", extra={"instance": self._instance.id, "attempt": self.job.attempts, "reason": said})
        if self._cancel_wanted:
            await self._finish(JobStatus.CANCELED)
            return
        if self.job.attempts >= self._settings.max_attempts:
            message = f"The instance lost the job in each of {self.job.attempts} attempts."
            await self._fail(JobError(code="instance_lost", message=message, hint="GET /v1/instances shows what the instances say."))
            return
        await self._take_inputs_away()
        if await persist(lambda: self._store.requeue(self.claim, avoid=self.job.avoid)) == "canceling":
            await self._finish(JobStatus.CANCELED)
