"""Waiting for a job's end without polling: by its events, and by its record when they are silent."""

from __future__ import annotations

import asyncio
import time

from gateway.errors import RedisUnavailable
from gateway.jobs.events import RETRY_S, EventFeed
from gateway.jobs.model import TERMINAL, EventKind, Job
from gateway.jobs.store import JobStore

SILENCE_S = 5.0


async def wait_until_ended(store: JobStore, feed: EventFeed, job: Job, wait_s: float) -> Job:
    """The job when it is terminal, or as it stands after `wait_s`.

    What came before is not read: a job that was just made has little past, and of that only the end counts.
    """
    deadline, ended = time.monotonic() + wait_s, list[Job]()

    def tell(end: Job) -> None:
        ended.append(end)
        subscription.wake()

    with feed.subscribe(job.id) as subscription, store.ends.hear(job.id, tell):
        has_missed_it = feed.has_told_end(job.id)
        while not has_missed_it and not feed.closed and (left_s := deadline - time.monotonic()) > 0:
            came = await subscription.wait(min(left_s, SILENCE_S))
            if ended:
                return ended[0]
            for event in subscription.take():
                # Only what is the end is parsed.
                if event.kind == EventKind.STATUS and event.status in TERMINAL:
                    return Job.model_validate_json(event.data)
            if not came or subscription.behind:
                subscription.behind = False
                try:
                    current = await store.load(job.id)
                except RedisUnavailable:
                    await asyncio.sleep(RETRY_S)
                    continue
                if current is None or current.is_terminal:
                    return current or job
    return await store.load(job.id) or job
