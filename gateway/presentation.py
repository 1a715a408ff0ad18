"""A job as callers see it: RFC 3339 times, signed URLs, links. The one place where records become answers."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from pydantic_core import to_json

from gateway.jobs.batch_records import Batch, archive_key
from gateway.jobs.model import Event, EventKind, Job, JobInput, JobSpec, JobStatus, Output
from gateway.outside.addresses import show_url
from gateway.pricing import compute_cost
from gateway.storage import Storage


# A stream tells the same few moments of a job in each of its statuses.
@lru_cache(4096)
def rfc3339(milliseconds: int | None) -> str | None:
    """Milliseconds since the epoch as a UTC time with milliseconds."""
    if milliseconds is None:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def present_output(output: Output, storage: Storage) -> dict[str, Any]:
    """An output with a URL that is signed now."""
    return {
        "index": output.index,
        "url": storage.sign(output.key),
        "content_type": output.content_type,
        "size_bytes": output.size_bytes,
        "width": output.width,
        "height": output.height,
        "sha256": output.sha256,
    }


def present_webhook(job: Job) -> dict[str, Any]:
    """Who is told of the job's end, without the query in which receivers carry their keys, and each try to do so."""
    if job.spec.webhook is None:
        return {"webhook": None, "webhook_deliveries": []}
    tries = [
        {"at": rfc3339(one.at_ms), "attempt": one.attempt, "status": one.status, "ms": one.ms, "error": one.error} for one in job.deliveries
    ]
    return {"webhook": show_url(job.spec.webhook.url), "webhook_deliveries": tries}


def present_input(given: JobInput, storage: Storage) -> dict[str, Any]:
    """A picture that the job was given, as ComfyUI gets it, with a URL that is signed now."""
    return {
        "parameter": given.parameter,
        "url": storage.sign(given.key),
        "size_bytes": given.size_bytes,
        "width": given.width,
        "height": given.height,
        "sha256": given.sha256,
    }


def present_request(spec: JobSpec) -> dict[str, Any]:
    """What was decided about a job when it was admitted."""
    return {
        "workflow": spec.workflow,
        "workflow_version": spec.workflow_version,
        "base_model": spec.base_model,
        "parameters": spec.parameters,
        "seed": spec.seed,
        "loras": [{"name": lora.name, "weight": lora.weight} for lora in spec.loras],
        "priority": spec.priority,
    }


def present_job(
    job: Job,
    *,
    base_url: str,
    storage: Storage,
    queue_position: int | None = None,
    eta_s: float | None = None,
    waiting_for: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The job's fields as documented in the API."""
    if job.spec.kind == "training":
        return present_training(job, base_url=base_url)
    spec, home = job.spec, f"{base_url}/v1/generations/{job.id}"
    return {
        "id": job.id,
        "object": "generation",
        "status": job.status.value,
        **present_request(spec),
        "inputs": [present_input(given, storage) for given in spec.inputs],
        "metadata": spec.metadata,
        "reproduces": spec.reproduces,
        "batch": spec.batch,
        "batch_index": spec.batch_index,
        **present_webhook(job),
        "progress": job.progress.model_dump(),
        "queue_position": queue_position,
        "eta_s": eta_s,
        "waiting_for": waiting_for,
        "outputs": [present_output(output, storage) for output in job.outputs],
        "error": job.error.model_dump() if job.error else None,
        "metrics": job.metrics.model_dump(),
        "instance": job.instance,
        "warm": job.warm,
        "cached": job.cached,
        "cost": present_cost(job),
        "manifest": present_manifest(job),
        "attempts": job.attempts,
        "created_at": rfc3339(spec.created_ms),
        "started_at": rfc3339(job.started_ms),
        "finished_at": rfc3339(job.finished_ms),
        "urls": {"self": home, "events": f"{home}/events", "cancel": f"{home}/cancel", "workflow": f"{home}/workflow"},
    }


def present_cost(job: Job) -> dict[str, float | None]:
    """What the job took of a GPU, once that is known; one that was answered from the cache took nothing."""
    ran_ms = job.metrics.execution_ms
    gpu_seconds = 0.0 if job.cached else None if ran_ms is None else ran_ms / 1000
    return compute_cost(gpu_seconds, job.spec.price_per_gpu_hour)


_MODEL_FILES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")


def present_manifest(job: Job) -> dict[str, Any]:
    """All that is known to decide what the pictures look like. A hash or a version that nobody told is null."""
    spec = job.spec
    known = {**(job.made_on.models if job.made_on else {}), **{lora.file: lora.sha256 for lora in spec.loras}}
    files = [choice for choice in spec.needs.choices if choice[2].lower().endswith(_MODEL_FILES)]
    return {
        "seed": spec.seed,
        "workflow": spec.workflow,
        "workflow_version": spec.workflow_version,
        "graph_sha256": spec.graph_sha256,
        "models": [{"node_class": name, "input": field, "file": file, "sha256": known.get(file)} for name, field, file in files],
        "inputs": [{"parameter": given.parameter, "sha256": given.sha256} for given in spec.inputs],
        "made_on": job.made_on.model_dump(exclude={"models"}) if job.made_on else None,
    }


def present_batch(batch: Batch, *, base_url: str, storage: Storage) -> dict[str, Any]:
    """A batch as callers see it: how many of its items are how."""
    spec, home = batch.spec, f"{base_url}/v1/batches/{batch.id}"
    archive = batch.archive.model_dump() if batch.archive else None
    if archive is not None:
        archive["url"] = storage.sign(archive_key(batch.id)) if archive["status"] == "ready" else None
    return {
        "id": batch.id,
        "object": "batch",
        "status": batch.status.value,
        "total": spec.total,
        "counts": batch.counts(),
        "workflow": spec.workflow,
        "sweep": spec.sweep,
        "metadata": spec.metadata,
        "archive": archive,
        "created_at": rfc3339(spec.created_ms),
        "finished_at": rfc3339(batch.ended_ms),
        "urls": {
            "self": home,
            "items": f"{home}/items",
            "cancel": f"{home}/cancel",
            "archive": f"{home}/archive",
            "contact_sheet": f"{home}/contact-sheet",
        },
    }


def present_item(index: int, spec: JobSpec, status: JobStatus, job: Job | None, *, base_url: str, storage: Storage) -> dict[str, Any]:
    """An item of a batch: decided from the start, a job once its turn has come, and a status when the job's record is gone."""
    return {
        "index": index,
        "id": spec.id,
        "status": (job.status if job else status).value,
        "workflow": spec.workflow,
        "parameters": spec.parameters,
        "seed": spec.seed,
        "metadata": spec.metadata,
        "outputs": [present_output(output, storage) for output in job.outputs] if job else [],
        "error": job.error.model_dump() if job and job.error else None,
        "urls": {"self": f"{base_url}/v1/generations/{spec.id}"},
    }


_INTERNAL = ("family", "source", "run", "flavour", "access")


def present_training(job: Job, *, base_url: str) -> dict[str, Any]:
    """A training or a captioning as callers see it: a job like any other, with what it published."""
    spec, home = job.spec, f"{base_url}/v1/trainings/{job.id}"
    parameters = {name: value for name, value in spec.parameters.items() if name not in _INTERNAL}
    return {
        "id": job.id,
        "object": spec.workflow,
        "status": job.status.value,
        "name": parameters.get("name"),
        "dataset": parameters.get("dataset"),
        "base": spec.base_model or None,
        "parameters": parameters,
        "seed": spec.seed,
        "metadata": spec.metadata,
        **present_webhook(job),
        "progress": job.progress.model_dump(),
        "access": spec.parameters.get("access"),
        "plan": job.plan,
        "lora": job.lora,
        "error": job.error.model_dump() if job.error else None,
        "metrics": job.metrics.model_dump(),
        "attempts": job.attempts,
        "created_at": rfc3339(spec.created_ms),
        "started_at": rfc3339(job.started_ms),
        "finished_at": rfc3339(job.finished_ms),
        "urls": {"self": home, "events": f"{home}/events", "cancel": f"{home}/cancel", "resume": f"{home}/resume"},
    }


def write_json(value: Any) -> bytes:
    """What is presented, as JSON: a third of the time of the standard library's writer."""
    return to_json(value, inf_nan_mode="null")


def write_job(job: Job, *, base_url: str, storage: Storage) -> str:
    """The job as JSON."""
    return write_json(present_job(job, base_url=base_url, storage=storage)).decode()


def write_event(event: Event, *, base_url: str, storage: Storage) -> str:
    """An event's data as JSON. Whole jobs and pictures get their signed URLs at the time of delivery."""
    if event.kind == EventKind.STATUS:
        return write_job(Job.model_validate_json(event.data), base_url=base_url, storage=storage)
    if event.kind == EventKind.OUTPUT:
        return write_json(present_output(Output.model_validate_json(event.data), storage)).decode()
    if event.kind == EventKind.SAMPLE:
        sample = json.loads(event.data)
        sample["url"] = storage.sign(sample.pop("key"))
        return json.dumps(sample)
    return event.data.decode()
