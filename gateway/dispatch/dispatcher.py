"""The loop between the queue and the instances: places waiting jobs, keeps their leases, takes over those of the dead.

Any number of dispatchers may run: a claim is atomic in Redis, and none of them is special.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from contextlib import suppress

import aiohttp
from pydantic import ValidationError

from gateway.dispatch.audience import Audience
from gateway.dispatch.execution import Execution
from gateway.dispatch.fleet import Candidate, Placement, choose
from gateway.dispatch.ingest import Ingest
from gateway.dispatch.instance import Held, Instance
from gateway.dispatch.line import Line
from gateway.dispatch.lora_disk import LoraDisk
from gateway.dispatch.roster import Roster
from gateway.dispatch.tally import Tally
from gateway.dispatch.writer import LeaseLost
from gateway.errors import FluxgateError, RedisUnavailable
from gateway.gpu import GpuLease
from gateway.instances import FleetRegistry, InstanceRegistry
from gateway.jobs.events import PREVIEWS_ASKED, WAKE, EventFeed
from gateway.jobs.model import TERMINAL, EventKind, Job, JobError, JobStatus, now_ms
from gateway.jobs.records import Claim, Made
from gateway.jobs.store import JobStore
from gateway.loras.registry import LoraRegistry
from gateway.moderation.verdicts import Moderation
from gateway.plain_http import PlainHttp
from gateway.reuse import reuse_result
from gateway.settings import Settings
from gateway.storage import Storage
from gateway.telemetry import Metrics, job_context

log = logging.getLogger(__name__)

IDLE_S = 1.0
CONTENTION_S = 0.005


class Dispatcher:
    """Owns the executions of this process. `run` ends only when cancelled, and gives its leases back then."""

    def __init__(
        self,
        settings: Settings,
        session: aiohttp.ClientSession,
        store: JobStore,
        feed: EventFeed,
        storage: Storage,
        registry: InstanceRegistry,
        fleet: FleetRegistry,
        loras: LoraRegistry,
        metrics: Metrics,
        moderation: Moderation,
        gpu: GpuLease | None = None,
        plain: PlainHttp | None = None,
    ) -> None:
        self._settings, self._store, self._metrics = settings, store, metrics
        self._ingest = Ingest(storage, moderation, tries=settings.upload_tries)
        self._storage = storage
        self._executions: dict[str, Execution] = {}
        self._lora_disk = (
            LoraDisk(settings.lora_dir, storage, settings.lora_dir_max_bytes, settings.lora_dir_min_free_bytes)
            if settings.lora_dir
            else None
        )
        self._placed_loras: set[str] = set()  # since they were last told of
        self._interrupted: list[Claim] = []
        self._line = Line(store)
        self._expected: set[str] = set()  # placed before they were made: that they were is no news
        self._group: asyncio.TaskGroup | None = None
        self._audience, self._tally = Audience(), Tally(metrics)
        self._wake = asyncio.Event()
        self._stopping, self._ended = False, asyncio.Event()
        self._roster = Roster(settings, session, store, registry, fleet, loras, gpu, self._wake, plain)
        self._instances = self._roster.instances
        feed.observe(self._observe)

    # -- the loops ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                group.create_task(self._roster.follow(group))
                group.create_task(self._keep_leases(group))
                group.create_task(self._place_for_ever(group))
                group.create_task(self._roster.bring_loras(self._lora_disk, self._list_loras_in_use))
        finally:
            self._stopping = True
            await self._give_leases_back()

    async def drain(self, timeout_s: float) -> None:
        """Claim nothing more, and wait that long for what runs here: for an instance that goes when this process does."""
        self._stopping = True
        log.info("claims nothing more", extra={"running": len(self._executions), "wait_s": timeout_s})
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0 and self._is_busy:
            self._ended.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._ended.wait()

    @property
    def _is_busy(self) -> bool:
        return bool(self._executions) or any(instance.held for instance in self._instances.values())

    @property
    def is_ready(self) -> bool:
        """Whether an instance could take a job from here now."""
        return not self._stopping and any(instance.is_usable for instance in self._instances.values())

    async def _place_for_ever(self, group: asyncio.TaskGroup) -> None:
        while True:
            self._wake.clear()
            try:
                await self._place_all(group)
            except RedisUnavailable as error:
                log.warning("placement waits for Redis", extra={"error": error.message})
                await asyncio.sleep(0.5)
            timer = asyncio.get_running_loop().call_later(IDLE_S, self._wake.set)
            try:
                await self._wake.wait()
            finally:
                timer.cancel()

    async def _keep_leases(self, group: asyncio.TaskGroup) -> None:
        """Renew ours, learn of cancels that the feed did not bring, and resume what nobody renews any more."""
        # Without the fleet a job taken over would look as if its instance were gone.
        await self._roster.known.wait()
        while True:
            try:
                await self._renew()
                # On an instance that only a dead dispatcher could ask its prompt may run on: that dispatcher is waited for.
                lease, limit, lost_s = uuid.uuid4().hex, 0 if self._stopping else 16, self._settings.instance_lost_s
                for claim in await self._store.take_over(
                    lease=lease, lease_s=self._settings.lease_s, limit=limit, instances=self._instances, foreign_s=lost_s
                ):
                    self._metrics.lease_takeovers.inc()
                    log.warning("lease taken over", extra={"job_id": claim.id, "instance": claim.job.instance})
                    self._start(group, claim, resumed=True)
                await self._expire_overdue()
                await self._store.record_measurements(self._tally.take_measured())
            except RedisUnavailable as error:
                log.warning("leases wait for Redis", extra={"error": error.message})
            await asyncio.sleep(self._settings.lease_s / 3)

    async def _renew(self) -> None:
        claims = [execution.claim for execution in self._executions.values()]
        if not claims:
            return
        for job_id, status in (await self._store.renew(claims, self._settings.lease_s)).items():
            execution = self._executions.get(job_id)
            if execution is not None and status == JobStatus.CANCELING:
                execution.cancel()
            elif execution is not None and status == "lost":
                execution.lose()

    async def _expire_overdue(self) -> None:
        for job_id in await self._store.overdue(limit=100):
            error = JobError(
                code="queue_timeout",
                message="No instance took the job within its time in the queue.",
                hint="GET /v1/instances shows what the instances are busy with.",
            )
            if await self._store.expire(job_id, error) == JobStatus.EXPIRED:
                log.warning("expired in the queue", extra={"job_id": job_id})

    async def _give_leases_back(self) -> None:
        try:
            await self._store.release(self._interrupted)
        except RedisUnavailable as error:
            log.warning("leases run out by themselves", extra={"error": error.message})

    # -- placement ---------------------------------------------------------------------------------------------

    async def _place_all(self, group: asyncio.TaskGroup) -> None:
        """Place until no free slot or no job that fits is left. Claims go out side by side: the next choice does not wait for them."""
        while not self._stopping and any(instance.may_take_more for instance in self._instances.values()):
            placement = self._choose(await self._line.look(self._instances))
            if placement is not None:
                self._place(group, placement, self._line.candidates[placement.job_id])
            elif self._line.may_show_more:
                self._line.look_again()
            else:
                return

    def expect(self, made: Made) -> None:
        """A job that this process makes in this moment. While nobody waits and a warm slot is free, its claim follows at its heels.

        Both go down the same line to Redis. A job that was not made, or not put in line, is simply not there to be claimed.
        """
        if self._group is None or self._stopping:
            return
        self._line.expect(made)
        if self._line.is_empty:
            self._group.create_task(self._place_expected(self._group, made.job))

    async def _place_expected(self, group: asyncio.TaskGroup, job: Job) -> None:
        await asyncio.sleep(0)  # its making is on its way by then, and Redis busy with it
        candidate = Candidate.of(job)
        if (placement := self._choose([candidate])) is not None and placement.warm and self._line.is_empty:
            self._expected.add(job.id)
            self._place(group, placement, candidate)

    def _choose(self, candidates: list[Candidate]) -> Placement | None:
        return choose(candidates, [instance.view() for instance in self._instances.values()], now_ms())

    def _place(self, group: asyncio.TaskGroup, placement: Placement, candidate: Candidate) -> None:
        instance = self._instances[placement.instance]
        slots = instance.place(candidate)
        self._line.begin_claim(candidate.job_id)
        group.create_task(self._claim(group, instance, candidate, slots, placement.warm))

    async def _claim(self, group: asyncio.TaskGroup, instance: Instance, candidate: Candidate, slots: int, warm: bool) -> None:
        """Make the placement true in Redis, where it is decided who has the job; then carry it out."""
        claim, left = None, instance.begin_to_tell()
        try:
            claim = await self._store.claim(
                candidate.job_id,
                instance=instance.id,
                lease=uuid.uuid4().hex,
                lease_s=self._settings.lease_s,
                slots=slots,
                prompt_id=str(uuid.uuid4()),
                base_model=candidate.base_model,
                lora_files=candidate.lora_files,
                recent_loras=instance.load.recent,
                left=left,
                made=self._line.take_made(candidate.job_id),
            )
        except RedisUnavailable as error:
            for claim_left in left:
                claim_left.is_leaving = False
            log.warning("claim waits for Redis", extra={"error": error.message})
            await asyncio.sleep(0.5)
        finally:
            self._line.end_claim(candidate.job_id)
        if claim is None:
            # Another dispatcher was quicker, or has the slot: look again at what is left.
            self._expected.discard(candidate.job_id)
            instance.held.pop(candidate.job_id, None)
            self._ended.set()
            self._line.look_again()
            await asyncio.sleep(CONTENTION_S)
            self._wake.set()
            return
        self._placed_loras |= candidate.lora_files
        claim.job = claim.job.model_copy(update={"warm": warm})
        self._start(group, claim, resumed=False)

    def _list_loras_in_use(self) -> set[str]:
        """Files that jobs wait for, run with, or were placed with since the last call."""
        placed, self._placed_loras = self._placed_loras, set()
        waiting = (candidate.lora_files for candidate in self._line.candidates.values())
        running = ({lora.file for lora in execution.claim.job.spec.loras} for execution in self._executions.values())
        return placed.union(*waiting, *running)

    def _wake_if_any_waits(self) -> None:
        """A slot is free. The feed told of every job that waits; one that it missed is found at the next idle look."""
        if self._line.may_hold_any:
            self._wake.set()

    def _observe(self, job_id: str, kind: str, status: str, data: bytes) -> None:
        """Every event of every job passes here: new jobs and freed slots wake the placement, cancels reach their execution."""
        if kind == WAKE:
            self._wake.set()
        elif kind == PREVIEWS_ASKED:
            self._audience.note(job_id)
        if kind != EventKind.STATUS:
            return
        if status == JobStatus.QUEUED:
            self._note_queued(job_id, data)
            return
        # It was claimed or has ended: as it was made it is of no more use.
        self._line.take_made(job_id)
        if status == JobStatus.CANCELING:
            if job_id in self._executions:
                self._executions[job_id].cancel()
        elif status in TERMINAL:
            self._audience.forget(job_id)
            self._expected.discard(job_id)
            self._line.leave(job_id)
            self._wake_if_any_waits()

    def _note_queued(self, job_id: str, data: bytes) -> None:
        if job_id in self._expected:
            self._expected.discard(job_id)
            return
        try:
            self._line.join(job_id, data)
        except ValidationError:
            log.warning("unreadable status event", extra={"job_id": job_id})
        self._wake.set()

    # -- executions --------------------------------------------------------------------------------------------

    def _start(self, group: asyncio.TaskGroup, claim: Claim, *, resumed: bool) -> None:
        instance = self._instances.get(claim.job.instance or "")
        if instance is None:
            # Claimed for an instance that this deployment no longer has: nothing runs there for us any more.
            group.create_task(self._requeue(claim))
            return
        instance.held.setdefault(claim.id, Held())
        free = self._slot_freer(instance, claim.id)
        execution = Execution(claim, instance, self._store, self._ingest, self._settings, free, self._audience.watches)
        self._executions[claim.id] = execution
        group.create_task(self._carry(execution, resumed=resumed))

    async def _answer_from_cache(self, execution: Execution) -> bool:
        """A twin of this job ended while it waited: give it the same pictures, if they are still there."""
        claim = execution.claim
        if claim.cached_in is None:
            return False
        try:
            job = await reuse_result(claim.job, claim.cached_in, self._store, self._storage)
        except RedisUnavailable:
            job = None
        if job is None:
            return False
        await execution.finish_cached(job)
        return True

    def _slot_freer(self, instance: Instance, job_id: str) -> Callable[[], None]:
        def free() -> None:
            instance.let_go(job_id)
            self._wake_if_any_waits()

        return free

    async def _carry(self, execution: Execution, *, resumed: bool) -> None:
        with job_context(execution.claim.id):
            try:
                if not await self._answer_from_cache(execution):
                    await execution.run(resumed=resumed)
                self._tally.count(execution.job)
            except asyncio.CancelledError:
                self._interrupted.append(execution.claim)
                raise
            except LeaseLost:
                log.warning("lease lost")
                with suppress(RedisUnavailable):
                    await execution.stop_if_replaced()
            except (FluxgateError, OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
                # boundary: one job's surprise must not end the dispatcher, nor leave the job without an end.
                log.exception("execution broke")
                with suppress(LeaseLost):
                    await execution.fail_unexpectedly()
            finally:
                execution.free_slot()
                if self._executions.get(execution.claim.id) is execution:
                    del self._executions[execution.claim.id]
                self._ended.set()

    async def _requeue(self, claim: Claim) -> None:
        try:
            await self._store.requeue(claim)
        except RedisUnavailable as error:
            log.warning("requeue waits for the lease to run out", extra={"error": error.message})
