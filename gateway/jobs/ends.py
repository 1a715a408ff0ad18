"""Who in this process waits for a job's end: told in the moment in which Redis has it, a little before the feed brings it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gateway.jobs.model import Job


class Ends:
    """Tells only of jobs that end by this process."""

    def __init__(self) -> None:
        self._listeners: dict[str, list[Callable[[Job], None]]] = {}

    def tell(self, job: Job) -> None:
        for listener in self._listeners.get(job.id, ()):
            listener(job)

    @contextmanager
    def hear(self, job_id: str, listener: Callable[[Job], None]) -> Iterator[None]:
        """`listener` is called with the job as it ended, if it ends here meanwhile; it must not block."""
        listeners = self._listeners.setdefault(job_id, [])
        listeners.append(listener)
        try:
            yield
        finally:
            listeners.remove(listener)
            if not listeners:
                del self._listeners[job_id]
