"""JSON logs that carry the request and job id and no secrets, and the Prometheus metrics."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from gateway.redaction import hide_secrets

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
job_id: ContextVar[str | None] = ContextVar("job_id", default=None)

_STANDARD = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line; everything given as `extra=` becomes a field."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, variable in (("request_id", request_id), ("job_id", job_id)):
            if (value := variable.get()) is not None:
                line[name] = value
        line.update({key: value for key, value in record.__dict__.items() if key not in _STANDARD})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        # Whatever puts one into a line, the line does not keep it.
        return hide_secrets(json.dumps(line, default=str, ensure_ascii=False))


def configure_logging(level: str) -> None:
    """Sends every logger of the process, uvicorn's too, to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # One line a request comes from our own middleware, with its id and time.
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    logging.getLogger("botocore").setLevel(logging.WARNING)
    # They tell every head that comes, keys and all.
    for name in ("websockets", "urllib3"):
        logging.getLogger(name).setLevel(logging.INFO)


@contextmanager
def job_context(value: str) -> Iterator[None]:
    """Log lines inside carry this job id."""
    token = job_id.set(value)
    try:
        yield
    finally:
        job_id.reset(token)


class Metrics:
    """All Prometheus metrics of one process, in a registry of their own so that tests can build many apps."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        seconds = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
        self.requests = Counter("fluxgate_http_requests", "HTTP requests", ["method", "route", "status"], registry=self.registry)
        self.request_s = Histogram("fluxgate_http_request_seconds", "HTTP request time", ["route"], buckets=seconds, registry=self.registry)
        self.jobs = Counter("fluxgate_jobs", "Jobs by how they ended", ["workflow", "status", "code"], registry=self.registry)
        self.queue_s = Histogram("fluxgate_job_queue_seconds", "Accepted until started", buckets=seconds, registry=self.registry)
        self.execution_s = Histogram(
            "fluxgate_job_execution_seconds", "Started until ComfyUI ended", ["workflow"], buckets=seconds, registry=self.registry
        )
        self.upload_s = Histogram("fluxgate_job_upload_seconds", "Pictures fetched and stored", buckets=seconds, registry=self.registry)
        self.warm = Counter("fluxgate_jobs_warm", "Jobs by whether their models were loaded already", ["warm"], registry=self.registry)
        self.cached = Counter("fluxgate_jobs_cached", "Jobs answered with the pictures of an identical one", registry=self.registry)
        self.busy_s = Counter(
            "fluxgate_instance_busy_seconds", "Time in which jobs ran, counted at their end", ["instance"], registry=self.registry
        )
        self.moderation = Counter("fluxgate_moderation", "Judgements of prompts and pictures", ["stage", "outcome"], registry=self.registry)
        self.streams = Gauge("fluxgate_event_streams", "Open event streams", registry=self.registry)
        self.webhooks = Counter("fluxgate_webhooks", "Tries to tell a job's end", ["outcome"], registry=self.registry)
        self.lease_takeovers = Counter("fluxgate_lease_takeovers", "Expired leases taken over", registry=self.registry)
        self._add_state()

    def _add_state(self) -> None:
        """What is read from Redis at each scrape. No number is better than an old one."""
        self.redis_up = Gauge("fluxgate_redis_up", "1 while Redis answers", registry=self.registry)
        self.redis_used = self._gauge("fluxgate_redis_used_bytes", "Memory that Redis uses")
        self.redis_limit = self._gauge("fluxgate_redis_limit_bytes", "Its maxmemory, or else all memory of its machine")
        self.queue_depth = self._gauge("fluxgate_queue_depth", "Jobs that wait for a slot")
        self.queue_oldest_s = self._gauge("fluxgate_queue_oldest_seconds", "Age of the job that waits longest; 0 when none does")
        self.trainers = self._gauge("fluxgate_trainers", "Trainer workers that report")
        self.trainings = self._gauge("fluxgate_trainings", "Unfinished trainings", "status")
        self.instance_up = self._gauge("fluxgate_instance_up", "1 while usable", "instance")
        self.slots = self._gauge("fluxgate_instance_slots", "Prompts it may hold", "instance")
        self.slots_used = self._gauge("fluxgate_instance_slots_used", "Prompts held", "instance")
        self.instance_training = self._gauge("fluxgate_instance_training", "1 while a training has its GPU", "instance")
        self.vram_total = self._gauge("fluxgate_instance_vram_total_bytes", "GPU memory", "instance")
        self.vram_free = self._gauge("fluxgate_instance_vram_free_bytes", "GPU memory that is free", "instance")
        self.of_instances = (self.instance_up, self.slots, self.slots_used, self.instance_training, self.vram_total, self.vram_free)

    def _gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(name, meaning, labels, registry=self.registry)
