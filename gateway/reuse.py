"""Answering a job with the pictures an identical one made: copied, so that neither depends on the other's life."""

from __future__ import annotations

import logging

from gateway.errors import StorageUnavailable
from gateway.jobs.model import Job, JobStatus, now_ms
from gateway.jobs.store import JobStore
from gateway.storage import Storage

log = logging.getLogger(__name__)


async def reuse_result(job: Job, source_id: str, store: JobStore, storage: Storage) -> Job | None:
    """`job` as succeeded with the source's pictures, or None when any of them is gone: then the job has to be run."""
    source = await store.load(source_id)
    if source is None or source.status is not JobStatus.SUCCEEDED or not source.outputs:
        return None
    outputs = []
    for output in source.outputs:
        key = f"generations/{job.id}/{output.key.rpartition('/')[2]}"
        try:
            await storage.copy(output.key, key)
        except StorageUnavailable as error:
            log.info("cached picture is gone", extra={"source": source_id, "error": error.message})
            return None
        outputs.append(output.model_copy(update={"key": key}))
    return job.model_copy(
        update={
            "status": JobStatus.SUCCEEDED,
            "cached": True,
            "outputs": tuple(outputs),
            "progress": source.progress,
            "made_on": source.made_on,
            "finished_ms": now_ms(),
        }
    )
