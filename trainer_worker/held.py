"""A claimed job in the worker's hands: its lease is renewed, a cancel or a loss of it stops the work, and it gets exactly one ending."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Awaitable, Callable

from gateway.datasets.store import DatasetStore
from gateway.errors import FluxgateError, RedisUnavailable
from gateway.gpu import GpuLease
from gateway.instances import InstanceRegistry
from gateway.jobs.model import JobError, JobStatus
from gateway.jobs.records import Claim
from gateway.jobs.trainings import TrainingStore
from gateway.loras.registry import LoraRegistry
from gateway.moderation.verdicts import Moderation
from gateway.redis_client import HAND_OVER, RedisClient
from gateway.settings import Settings
from gateway.storage import Storage
from trainer_worker.gpu_turn import GpuTurn
from trainer_worker.journal import Journal
from trainer_worker.machine import ask_smi, read_smi

log = logging.getLogger(__name__)

RENEW_S = 1.0


class LeaseLost(Exception):
    """Another worker has the job now, or it is over."""


class Held:
    """One attempt at one job. `stop` is set when it shall end; `is_lost` then says that it is not ours to end."""

    def __init__(
        self, claim: Claim, settings: Settings, store: TrainingStore, storage: Storage, redis: RedisClient, moderation: Moderation
    ) -> None:
        self.claim, self.settings, self.store, self.storage = claim, settings, store, storage
        self.datasets, self.loras, self.registry = DatasetStore(redis), LoraRegistry(redis), InstanceRegistry(redis)
        self.journal = Journal(claim, store, storage, moderation)
        self.stop = threading.Event()
        self.is_lost = self.is_handed_over = False
        gpu = GpuLease(redis, settings.shared_gpu) if settings.shared_gpu else None
        self.turn = GpuTurn(gpu, claim.id, settings.training_lease_s, self.registry, measure_free_gpu)
        if claim.job.status is JobStatus.CANCELING:
            self.stop.set()

    async def run(self, work: Callable[[Held], Awaitable[None]]) -> None:
        """Do the work to its end. Raises LeaseLost, and whatever the work raises that is no ending of a job."""
        renewing = asyncio.create_task(self._renew())
        asyncio.get_running_loop().add_signal_handler(HAND_OVER, self._hand_over)
        try:
            await self._attempt(work)
        except FluxgateError as error:
            await self.journal.fail(JobError(code=error.code, message=error.message, hint=error.hint, details=error.details))
        except (OSError, ValueError, KeyError) as error:
            # boundary: one job's surprise must not leave it without an end.
            log.exception("work broke")
            await self.journal.fail(JobError(code="training_refused", message=f"The trainer does not take it: {error}"))
        finally:
            renewing.cancel()
            await self.turn.let_go()
            if self.is_handed_over:
                await self.store.release([self.claim])

    def _hand_over(self) -> None:
        """Our worker is told to stop. The work stops as when its lease is lost; whoever looks next goes on from its last checkpoint."""
        self.is_lost = self.is_handed_over = True
        self.stop.set()

    async def _attempt(self, work: Callable[[Held], Awaitable[None]]) -> None:
        attempts = self.settings.training_attempts
        if self.stop.is_set():
            await self.journal.finish(JobStatus.CANCELED)
        elif self.claim.job.attempts > attempts:
            message = f"Given up: its worker died in each of {attempts} attempts."
            await self.journal.fail(JobError(code="too_many_attempts", message=message))
        else:
            await work(self)

    def require_lease(self) -> None:
        if self.is_lost:
            raise LeaseLost

    async def _renew(self) -> None:
        """Keep the lease and the GPU, learn of a cancel within a second. A lost lease stops the work: somebody else resumes it."""
        parent = os.getppid()
        while True:
            if os.getppid() != parent:
                # The worker that forked us was killed: nobody would know of this process any more.
                self.is_lost = True
                self.stop.set()
            try:
                status = (await self.store.renew([self.claim], self.settings.training_lease_s))[self.claim.id]
                await self.turn.keep()
                self.is_lost = self.is_lost or status == "lost"
                if status in ("lost", JobStatus.CANCELING):
                    self.stop.set()
            except RedisUnavailable as error:
                log.warning("lease not renewed", extra={"error": error.message})
            await asyncio.sleep(RENEW_S)


async def measure_free_gpu() -> int | None:
    """Bytes; None where nvidia-smi does not tell them. torch is not asked: that takes memory itself."""
    said = await asyncio.to_thread(ask_smi)
    free = read_smi(said, os.environ.get("CUDA_VISIBLE_DEVICES")).get("gpu_free_bytes") if said is not None else None
    return free if isinstance(free, int) else None
