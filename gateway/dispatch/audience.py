"""Whose previews somebody looks at now. A preview is large and the live feed is read by every process, so nobody's are sent unasked."""

from __future__ import annotations

import time
from collections.abc import Callable

# Longer than two of the feed's rounds: one may be late.
ASKED_S = 25.0
MOST = 4096


class Audience:
    """Kept by dispatchers from what the feed says; a job may be asked about before it runs."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}

    def note(self, job_id: str) -> None:
        """Somebody asked for the job's previews."""
        if len(self._until) >= MOST:
            self._until = {job: until for job, until in self._until.items() if until > self._clock()}
        self._until[job_id] = self._clock() + ASKED_S

    def watches(self, job_id: str) -> bool:
        return self._until.get(job_id, 0.0) > self._clock()

    def forget(self, job_id: str) -> None:
        """The job has ended."""
        self._until.pop(job_id, None)
