"""What jobs that ended say of the whole: the metrics, and how long their kind of work takes."""

from __future__ import annotations

import logging

from gateway.dispatch.pace import measure
from gateway.jobs.model import Job
from gateway.pricing import Measurement
from gateway.telemetry import Metrics

log = logging.getLogger(__name__)


class Tally:
    """Counts each job once, when it has ended."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._measured: dict[tuple[str, str], list[Measurement]] = {}

    def take_measured(self) -> dict[tuple[str, str], list[Measurement]]:
        """How long jobs ran that ended since the last call, by (workflow, base model)."""
        measured, self._measured = self._measured, {}
        return measured

    def count(self, job: Job) -> None:
        if not job.is_terminal:
            return
        self._metrics.jobs.labels(job.spec.workflow, job.status, job.error.code if job.error else "").inc()
        if job.cached:
            self._metrics.cached.inc()
        elif job.warm is not None:
            self._metrics.warm.labels(str(job.warm).lower()).inc()
        metrics = job.metrics
        if metrics.queue_ms is not None:
            self._metrics.queue_s.observe(metrics.queue_ms / 1000)
        if metrics.execution_ms is not None:
            self._measured.setdefault((job.spec.workflow, job.spec.base_model), []).append(measure(job, metrics.execution_ms))
            self._metrics.busy_s.labels(job.instance or "").inc(metrics.execution_ms / 1000)
            self._metrics.execution_s.labels(job.spec.workflow).observe(metrics.execution_ms / 1000)
        if metrics.upload_ms is not None:
            self._metrics.upload_s.observe(metrics.upload_ms / 1000)
        log.info("job ended", extra={"status": job.status, "instance": job.instance, "attempts": job.attempts, **metrics.model_dump()})
