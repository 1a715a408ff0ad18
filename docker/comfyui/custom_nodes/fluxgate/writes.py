"""Pictures on their way to the disk: bounded in bytes, a few threads, and a failed one is remembered until somebody asks."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

WORKERS = 2
# 85 pictures of 1024 px: at 445 ms each on two threads they are all written within the 30 s that a view waits.
LIMIT_BYTES = 256 * 2**20
FAILURES_KEPT = 1000
CHECK_INTERRUPT_S = 0.25

log = logging.getLogger(__name__)


def ignore_interrupts() -> None:
    """For callers that nobody interrupts."""


class WriteQueue:
    """Its threads start with the first write, and a normal exit of Python waits for all of them."""

    def __init__(self, workers: int = WORKERS, limit_bytes: int = LIMIT_BYTES, failures_kept: int = FAILURES_KEPT) -> None:
        self._limit_bytes = limit_bytes
        self._failures_kept = failures_kept
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="fluxgate-write")
        self._room = threading.Condition()
        self._pending_bytes = 0
        self._pending: dict[Path, Future[str | None]] = {}
        self._failures: OrderedDict[Path, str] = OrderedDict()

    @property
    def pending(self) -> int:
        return len(self._pending)

    def wait_for_room(self, size_bytes: int, check_interrupt: Callable[[], None] = ignore_interrupts) -> None:
        """Back-pressure: blocks while the queue is full; a picture above the limit waits until it is alone. Raises what the check does."""
        with self._room:
            while self._pending_bytes and self._pending_bytes + size_bytes > self._limit_bytes:
                check_interrupt()
                self._room.wait(CHECK_INTERRUPT_S)

    def submit(self, path: Path, size_bytes: int, write: Callable[[], None]) -> None:
        """Runs `write` soon; what it raises is the failure of `path`. Only one thread submits, so room that was there stays."""
        with self._room:
            self._failures.pop(path, None)
            self._pending_bytes += size_bytes
            self._pending[path] = self._executor.submit(self._run, path, size_bytes, write)

    def find_pending(self, path: Path) -> Future[str | None] | None:
        """Its result is None once written, or the text of the failure. It never raises."""
        with self._room:
            return self._pending.get(path)

    def find_failure(self, path: Path) -> str | None:
        with self._room:
            return self._failures.get(path)

    def forget_failure(self, path: Path) -> None:
        with self._room:
            self._failures.pop(path, None)

    def close(self) -> None:
        """Waits for all writes and takes no more."""
        self._executor.shutdown(wait=True)

    def _run(self, path: Path, size_bytes: int, write: Callable[[], None]) -> str | None:
        failure: str | None = None
        try:
            write()
        except Exception as error:  # noqa: BLE001  # boundary: whatever encoder or disk raise has to reach whoever asks for the picture
            failure = f"{type(error).__name__}: {error}"
            log.error("fluxgate: %s was not written: %s", path, failure)
        with self._room:
            self._pending.pop(path, None)
            self._pending_bytes -= size_bytes
            if failure is not None:
                self._failures[path] = failure
                while len(self._failures) > self._failures_kept:
                    self._failures.popitem(last=False)
            self._room.notify_all()
        return failure
