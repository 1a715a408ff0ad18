"""Waiting for a job's end without polling: by its events, and by its record when they are silent."""

from __future__ import annotations

import asyncio
import time

from gateway.jobs.events import EventFeed
from gateway.jobs.model import TERMINAL, Job
from gateway.jobs.store import JobStore


async def wait_until_ended(store: JobStore, feed: EventFeed, job: Job, wait_s: float) -> Job:
    """The job when it is terminal, or as it stands after `wait_s`."""
    deadline = time.monotonic() + wait_s
    try:
        async with asyncio.timeout(wait_s):
            async for event in feed.follow(job.id, idle_s=5.0):
                # Only what is the end is parsed.
                if event is None or (event.kind == "status" and event.status in TERMINAL):
                    current = Job.model_validate_json(event.data) if event else await store.load(job.id)
                    if current is None or current.is_terminal:
                        return current or job
                if time.monotonic() > deadline:
                    break
    except TimeoutError:
        pass
    return await store.load(job.id) or job
