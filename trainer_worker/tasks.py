"""What RQ calls by name: one training, from its claim to a published LoRA. It knows Redis and S3; the trainer runs in a child."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from gateway.datasets import DatasetStore
from gateway.errors import Conflict, FluxgateError, NotFound, RedisUnavailable
from gateway.gpu import GpuLease
from gateway.instances import InstanceRegistry
from gateway.jobs.model import JobError, JobStatus
from gateway.jobs.records import Claim
from gateway.jobs.trainings import TrainingStore
from gateway.loras import LoraRegistry
from gateway.redis_client import RedisClient, connect_redis
from gateway.settings import Settings
from gateway.storage import Storage
from gateway.telemetry import configure_logging, job_context
from trainer_worker.config import TrainingConfig
from trainer_worker.dataset import write_dataset
from trainer_worker.journal import Journal
from trainer_worker.plan import choose_trainer, plan_training
from trainer_worker.process import Limits
from trainer_worker.progress import TrainerEvent
from trainer_worker.publish import publish
from trainer_worker.train import Outcome, train
from trainer_worker.trainers import Trainer

log = logging.getLogger(__name__)

RENEW_S = 1.0
GPU_WAIT_S = 900.0


class LeaseLost(Exception):
    """Another worker has the training now, or it is over."""


def run_training(job_id: str) -> None:
    """RQ's entry. Returns when the training has ended, or at once when there is nothing to do for us."""
    settings = Settings()
    configure_logging(settings.log_level)
    with job_context(job_id):
        asyncio.run(_run_training(job_id, settings))


async def _run_training(job_id: str, settings: Settings) -> None:
    redis, storage = connect_redis(settings.redis_url), Storage(settings)
    try:
        store = TrainingStore(redis, ttl_s=settings.job_ttl_s)
        claim = await store.claim_training(job_id, lease=uuid.uuid4().hex, lease_s=settings.training_lease_s)
        if claim is None:
            log.info("nothing to do: ended, or another worker has it")
            return
        work = _Work(claim, settings, store, storage, redis)
        with suppress(LeaseLost):
            await work.run()
    finally:
        storage.close()
        await redis.aclose()


class _Work:
    """One attempt at one training."""

    def __init__(self, claim: Claim, settings: Settings, store: TrainingStore, storage: Storage, redis: RedisClient) -> None:
        self._claim, self._settings, self._store, self._storage = claim, settings, store, storage
        self._datasets, self._loras, self._registry = DatasetStore(redis), LoraRegistry(redis), InstanceRegistry(redis)
        self._gpu = GpuLease(redis, settings.shared_gpu) if settings.shared_gpu else None
        self._has_gpu = False
        self._journal = Journal(claim, store, storage)
        self._stop = threading.Event()
        self._lost = False
        if claim.job.status is JobStatus.CANCELING:
            self._stop.set()

    async def run(self) -> None:
        renewing = asyncio.create_task(self._renew())
        try:
            await self._attempt()
        except FluxgateError as error:
            await self._journal.fail(JobError(code=error.code, message=error.message, hint=error.hint, details=error.details))
        except (OSError, ValueError, KeyError) as error:
            # boundary: one training's surprise must not leave it without an end.
            log.exception("training broke")
            await self._journal.fail(JobError(code="training_refused", message=f"The trainer does not take it: {error}"))
        finally:
            renewing.cancel()
            if self._gpu is not None:
                with suppress(RedisUnavailable):
                    await self._gpu.let_go(self._claim.id)

    async def _attempt(self) -> None:
        job = self._claim.job
        if self._stop.is_set():
            await self._journal.finish(JobStatus.CANCELED)
            return
        if job.attempts > self._settings.training_attempts:
            message = f"Given up: its worker died in each of {self._settings.training_attempts} attempts."
            await self._journal.fail(JobError(code="too_many_attempts", message=message))
            return
        await self._journal.start("prepare", "The data set is fetched.")
        folder = await self._prepare()
        trainer = choose_trainer(self._settings)
        fresh = plan_training(job, self._settings, folder, resume=False)
        config = replace(fresh, resume=bool(trainer.find_checkpoints(fresh)))
        await self._take_gpu()
        outcome = await self._train(trainer, config)
        await self._conclude(outcome, folder)

    async def _prepare(self) -> Path:
        """The training's folder, with the data set in it. One that goes on from another works in that one's."""
        parameters = self._claim.job.spec.parameters
        folder = self._settings.training_dir.absolute() / str(parameters["run"])
        dataset = await self._datasets.load(str(parameters["dataset"]))
        if dataset is None:
            raise NotFound("The data set was deleted before the training began.", code="dataset_not_found")
        await write_dataset(dataset, self._storage, folder / "data", str(parameters.get("trigger_word") or "") or None)
        return folder

    async def _train(self, trainer: Trainer, config: TrainingConfig) -> Outcome:
        """The trainer blocks in a thread of its own; what it says comes back here in order."""
        loop = asyncio.get_running_loop()
        heard: asyncio.Queue[TrainerEvent | None] = asyncio.Queue()
        limits = Limits(stall_s=self._settings.training_stall_s, total_s=self._settings.training_timeout_s)

        def tell(event: TrainerEvent) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, event)

        telling = asyncio.create_task(self._journal.tell_all(heard))
        try:
            outcome = await asyncio.to_thread(train, trainer, config, tell, self._stop, limits)
        finally:
            loop.call_soon(heard.put_nowait, None)
            await telling
        if self._lost:
            raise LeaseLost
        return outcome

    async def _conclude(self, outcome: Outcome, folder: Path) -> None:
        if outcome.status == "completed" and outcome.final is not None:
            await self._journal.stage("publish", "The LoRA is checked and stored.")
            lora = await publish(outcome.final, self._claim.job, self._storage, self._loras, folder / "published")
            await self._journal.wait_until_ready(lora, self._loras, self._registry)
            await self._journal.finish(JobStatus.SUCCEEDED, lora=lora.name)
        elif outcome.status == "interrupted" and self._stop.is_set():
            await self._journal.finish(JobStatus.CANCELED)
        else:
            failure = outcome.failure
            assert failure is not None, "an outcome that is not completed says why"
            details = {"log_tail": outcome.log_tail[-4000:]}
            await self._journal.fail(JobError(code=failure.code, message=failure.message, hint=failure.hint, details=details))

    async def _renew(self) -> None:
        """Keep the lease and the GPU, learn of a cancel within a second. A lost lease stops the trainer: somebody else resumes it."""
        parent = os.getppid()
        while True:
            if os.getppid() != parent:
                # The worker that forked us was killed: nobody would know of this process any more.
                self._lost = True
                self._stop.set()
            try:
                status = (await self._store.renew([self._claim], self._settings.training_lease_s))[self._claim.id]
                if self._gpu is not None and self._has_gpu:
                    await self._gpu.take(self._claim.id, self._settings.training_lease_s)
                self._lost = self._lost or status == "lost"
                if status in ("lost", JobStatus.CANCELING):
                    self._stop.set()
            except RedisUnavailable as error:
                log.warning("lease not renewed", extra={"error": error.message})
            await asyncio.sleep(RENEW_S)

    async def _take_gpu(self) -> None:
        """Wait for the GPU, then until every instance on it is out of the way."""
        if self._gpu is None:
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + GPU_WAIT_S
        while not self._stop.is_set():
            if loop.time() > deadline:
                raise Conflict(f"The GPU was not free within {GPU_WAIT_S:g} s.", code="gpu_busy", hint="GET /v1/instances shows what runs.")
            if await self._gpu.take(self._claim.id, self._settings.training_lease_s):
                self._has_gpu = True
                up = {facts.id for facts in await self._registry.all() if facts.state != "down"}
                if up <= await self._gpu.drained(self._claim.id):
                    return
            await self._journal.stage("gpu", "Waits until the instances on this GPU have finished what they run.")
            await asyncio.sleep(0.5)
