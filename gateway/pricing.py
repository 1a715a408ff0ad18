"""How long a job will take, from what jobs like it took. Pure arithmetic over measured medians; it says None when nothing was measured."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

# Fewer measurements than this say too little to promise anything.
ENOUGH = 3


def estimate_run_s(measured_ms: Sequence[int]) -> float | None:
    """Seconds a job of this kind runs: the median of the newest measurements."""
    return median(measured_ms) / 1000 if len(measured_ms) >= ENOUGH else None


def estimate_wait_s(run_s: float | None, jobs_ahead: int, instances: int) -> float | None:
    """Seconds until a waiting job has ended: those ahead share the instances, then it runs itself."""
    if run_s is None or instances < 1:
        return None
    return round((jobs_ahead // instances + 1) * run_s, 1)


def estimate_rest_s(run_s: float | None, elapsed_s: float) -> float | None:
    """Seconds a running job still needs; never less than none."""
    return None if run_s is None else round(max(0.0, run_s - elapsed_s), 1)
