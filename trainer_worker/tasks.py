"""What RQ calls by name: one job, from its claim to its end. It knows Redis and S3; trainers and captioners run in children."""

from __future__ import annotations

import asyncio
import logging
import uuid
from contextlib import suppress

import aiohttp

from gateway.jobs.trainings import CAPTIONING, IMPORT, TrainingStore
from gateway.moderation.verdicts import open_moderation
from gateway.redis_client import connect_redis
from gateway.settings import Settings
from gateway.storage import Storage
from gateway.telemetry import configure_logging, job_context
from trainer_worker.captioning import caption_dataset
from trainer_worker.held import Held, LeaseLost
from trainer_worker.lora_import import import_lora
from trainer_worker.training import train_lora

log = logging.getLogger(__name__)

# By what the job is about; everything else is a training.
WORKS = {CAPTIONING: caption_dataset, IMPORT: import_lora}


def run_training(job_id: str) -> None:
    """RQ's entry. Returns when the job has ended, or at once when there is nothing to do for us."""
    settings = Settings()
    configure_logging(settings.log_level)
    with job_context(job_id):
        asyncio.run(_run(job_id, settings))


async def _run(job_id: str, settings: Settings) -> None:
    redis, storage = connect_redis(settings.redis_url), Storage(settings)
    try:
        store = TrainingStore(redis, ttl_s=settings.job_ttl_s)
        claim = await store.claim_training(job_id, lease=uuid.uuid4().hex, lease_s=settings.training_lease_s)
        if claim is None:
            log.info("nothing to do: ended, or another worker has it")
            return
        work = WORKS.get(claim.job.spec.workflow, train_lora)
        async with aiohttp.ClientSession() as session:
            with suppress(LeaseLost):
                await Held(claim, settings, store, storage, redis, open_moderation(settings, session)).run(work)
    finally:
        storage.close()
        await redis.aclose()
