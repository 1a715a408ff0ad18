"""Keeps full garbage collections short. ComfyUI runs one in the executor thread every 10 s, and 500,000 objects of its
modules take 250 ms and more to walk, during which no prompt runs and no request is answered."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

FULL_GENERATION = 2
# Survivors that took this long to walk are worth freezing; next to a frozen start-up heap they take under 1 ms at first.
# It is the thread's own time: on a busy machine the clock on the wall would freeze too often.
SLOW_COLLECTION_MS = 20.0
# A frozen object in a dead cycle is never freed, so after this many freezes the whole heap is walked once.
FREEZES_BEFORE_THAW = 8


class Heap:
    """Freezes what survives. `is_idle` tells whether no prompt runs: only then nothing short-lived is on the heap."""

    def __init__(self, is_idle: Callable[[], bool], read_cpu_s: Callable[[], float] = time.thread_time) -> None:
        self.may_refreeze = True
        self._is_idle = is_idle
        self._read_cpu_s = read_cpu_s
        self._began_s = self._began_cpu_s = 0.0
        self._watching = False
        self._refreezes = 0  # since the start or the last thaw
        self._counts = {"full_collections": 0, "freezes": 0, "thaws": 0}
        self._times_ms = {"last_ms": 0.0, "max_ms": 0.0, "total_ms": 0.0}

    def start(self) -> None:
        """Collects and freezes once, and from then on watches each full collection."""
        gc.collect()
        gc.freeze()
        self._counts["freezes"] += 1
        if not self._watching:
            gc.callbacks.append(self.observe)
            self._watching = True

    def stop(self) -> None:
        if self._watching:
            gc.callbacks.remove(self.observe)
            self._watching = False
        gc.unfreeze()

    def observe(self, phase: str, info: dict[str, int]) -> None:
        """One of `gc.callbacks`. At `stop` only survivors are left, which is the moment to freeze them."""
        if info["generation"] != FULL_GENERATION:
            return
        if phase == "start":
            self._began_s, self._began_cpu_s = time.perf_counter(), self._read_cpu_s()
            return
        self._record(1000 * (time.perf_counter() - self._began_s))
        cpu_ms = 1000 * (self._read_cpu_s() - self._began_cpu_s)
        if self.may_refreeze and cpu_ms >= SLOW_COLLECTION_MS and self._is_idle():
            self._freeze_or_thaw()

    def thaw(self) -> None:
        """Lets the next full collection see everything; call it when models are to be freed. The start-up heap alone holds none."""
        if self._refreezes:
            gc.unfreeze()
            self._counts["thaws"] += 1
            self._refreezes = 0

    def report(self) -> dict[str, Any]:
        rounded = {name: round(value, 3) for name, value in self._times_ms.items()}
        return {"watching": self._watching, **self._counts, **rounded}

    def _freeze_or_thaw(self) -> None:
        if self._refreezes >= FREEZES_BEFORE_THAW:
            self.thaw()
            return
        gc.freeze()
        self._counts["freezes"] += 1
        self._refreezes += 1

    def _record(self, duration_ms: float) -> None:
        self._counts["full_collections"] += 1
        self._times_ms["last_ms"] = duration_ms
        self._times_ms["max_ms"] = max(self._times_ms["max_ms"], duration_ms)
        self._times_ms["total_ms"] += duration_ms
