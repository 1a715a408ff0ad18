"""A circuit breaker: an instance that keeps losing prompts rests, then gets one job to show that it is well. Pure."""

from __future__ import annotations

import time
from collections.abc import Callable

FAULTS_TO_OPEN = 3
FIRST_REST_S = 5.0
LONGEST_REST_S = 120.0


class Breaker:
    """`allows(held)` says whether one more job may go there, given how many it holds. States: closed, open, trial."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._faults = 0
        self._rest_s = FIRST_REST_S
        self._open_until: float | None = None
        self.last_fault: str | None = None

    @property
    def state(self) -> str:
        if self._open_until is None:
            return "closed"
        return "open" if self._clock() < self._open_until else "trial"

    def allows(self, held: int) -> bool:
        return self.state == "closed" or (self.state == "trial" and held == 0)

    def record_success(self) -> None:
        self._faults, self._rest_s, self._open_until = 0, FIRST_REST_S, None

    def record_fault(self, reason: str) -> None:
        """A prompt was lost, refused to answer for, or stalled: the instance's doing, not the graph's."""
        self.last_fault = reason
        on_trial = self.state == "trial"
        self._faults += 1
        if on_trial or self._faults >= FAULTS_TO_OPEN:
            self._open_until = self._clock() + self._rest_s
            self._rest_s = min(self._rest_s * 2, LONGEST_REST_S)
            self._faults = 0
