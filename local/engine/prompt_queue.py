"""Prompts that wait, run and have run. It knows their order and their history, and refuses to know what a node is."""

import heapq
import threading
from collections.abc import Callable
from typing import Any

# (number, prompt id, graph, extra data, ids of the outputs to execute): what /queue shows and history keeps.
Prompt = tuple[float, str, dict[str, Any], dict[str, Any], list[str]]

HISTORY_LIMIT = 10001


class DuplicatePrompt(Exception):
    """Same number and same id as a waiting prompt. It is queued nevertheless: ComfyUI answers 500 and runs it."""


class PromptQueue:
    """Lower numbers first, then smaller ids. All methods may be called from any thread."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._pending: list[tuple[float, str, int, Prompt]] = []
        self._sequence = 0
        self._running: Prompt | None = None
        self._history: dict[str, dict[str, Any]] = {}
        self._flags: set[str] = set()

    def put(self, prompt: Prompt) -> None:
        with self._wake:
            clash = any(entry[:2] == prompt[:2] for entry in self._pending)
            self._sequence += 1
            heapq.heappush(self._pending, (prompt[0], prompt[1], self._sequence, prompt))
            self._changed()
            self._wake.notify()
        if clash:
            raise DuplicatePrompt(f"number {prompt[0]} and prompt_id {prompt[1]!r} are already waiting")

    def take(self) -> tuple[Prompt | None, set[str]]:
        """Waits for work: the next prompt, now running, or None with the flags that were raised."""
        with self._wake:
            while not self._pending and not self._flags:
                self._wake.wait()
            flags, self._flags = self._flags, set()
            if self._pending:
                self._running = heapq.heappop(self._pending)[3]
                self._changed()
                return self._running, flags
            return None, flags

    def finish(self, entry: dict[str, Any]) -> None:
        """Moves the running prompt into history."""
        with self._lock:
            prompt = self._running
            assert prompt is not None
            self._running = None
            if len(self._history) >= HISTORY_LIMIT and prompt[1] not in self._history:
                self._history.pop(next(iter(self._history)))
            self._history[prompt[1]] = {"prompt": list(prompt), **entry}
            self._changed()

    def raise_flag(self, name: str) -> None:
        with self._wake:
            self._flags.add(name)
            self._wake.notify()

    def remaining(self) -> int:
        with self._lock:
            return len(self._pending) + (self._running is not None)

    def running_id(self) -> str | None:
        with self._lock:
            return self._running[1] if self._running else None

    def snapshot(self) -> dict[str, list[list[Any]]]:
        with self._lock:
            running = [list(self._running)] if self._running else []
            return {"queue_running": running, "queue_pending": [list(entry[3]) for entry in sorted(self._pending, key=lambda e: e[:3])]}

    def delete(self, prompt_id: str) -> None:
        """Forgets one waiting prompt of that id, silently when there is none."""
        with self._lock:
            for index, entry in enumerate(self._pending):
                if entry[1] == prompt_id:
                    del self._pending[index]
                    heapq.heapify(self._pending)
                    self._changed()
                    return

    def clear(self) -> None:
        with self._lock:
            self._pending.clear()
            self._changed()

    def history(self, max_items: int | None = None, offset: int = -1) -> dict[str, Any]:
        """Oldest first. Without an offset the last `max_items`, with one those that follow it."""
        with self._lock:
            entries = list(self._history.items())
        if max_items is None:
            return dict(entries[max(offset, 0) :])
        if offset < 0:
            offset = max(0, len(entries) - max_items)
        return dict(entries[offset : offset + max_items])

    def history_of(self, prompt_id: str) -> dict[str, Any]:
        with self._lock:
            return {prompt_id: self._history[prompt_id]} if prompt_id in self._history else {}

    def forget(self, prompt_id: str) -> None:
        with self._lock:
            self._history.pop(prompt_id, None)

    def forget_all(self) -> None:
        with self._lock:
            self._history.clear()
