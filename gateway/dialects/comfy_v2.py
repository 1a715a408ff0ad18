"""Our jobs and events in the words of the Comfy API v2, as its official clients read them. Pure but for signing URLs.

Source: comfy-sdk 0.5.0, spec/openapi.yaml. Where that says less than its client reads (metadata, lists), the client decides.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from gateway.errors import BadRequest, Unprocessable
from gateway.inputs.asset_records import Asset
from gateway.jobs.model import TERMINAL, Event, EventKind, Job, JobError, JobStatus, Output, Progress, now_ms
from gateway.presentation import rfc3339
from gateway.storage import Storage

MAX_LABELS, MAX_LABEL_FILTERS, MAX_LABEL_BYTES = 16, 3, 256
_LABEL_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,40}")
# Control characters and those that turn the direction of writing.
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_OUTPUT_ID = re.compile(r"(gen_[0-9a-f]{1,64})\.([0-9]{1,4})")
_TYPES = ("image", "video", "audio")


def output_id(job_id: str, index: int) -> str:
    """Outputs are assets: this is their id."""
    return f"{job_id}.{index}"


def parse_output_id(asset_id: str) -> tuple[str, int] | None:
    """(job id, index) of an output's id, None for any other asset's."""
    match = _OUTPUT_ID.fullmatch(asset_id)
    return (match[1], int(match[2])) if match else None


@dataclass(frozen=True, slots=True)
class ComfyPresenter:
    """Jobs as v2 objects. `prefix` is the path our routes are mounted under; links go without a host, as the same one is asked again."""

    storage: Storage
    url_ttl_s: int
    job_ttl_s: int
    prefix: str = ""

    def job(self, job: Job, queue_position: int | None = None) -> dict[str, Any]:
        home = f"{self.prefix}/api/v2/jobs/{job.id}"
        ended_ms = job.finished_ms if job.is_terminal else None
        return {
            "id": job.id,
            "status": job.status.value,
            "created_at": rfc3339(job.spec.created_ms),
            "started_at": rfc3339(job.started_ms),
            "completed_at": rfc3339(ended_ms),
            "expires_at": rfc3339((ended_ms or now_ms()) + self.job_ttl_s * 1000),
            "queue_position": queue_position,
            "progress": None if job.status is JobStatus.QUEUED else present_progress(job.progress),
            "outputs": [self.output(output, job.id) for output in job.outputs],
            "error": present_error(job.error) if job.error else None,
            "metrics": job.metrics.model_dump(),
            "metadata": read_labels(job),
            "urls": {"self": home, "events": f"{home}/events", "cancel": f"{home}/cancel"},
        }

    def output(self, output: Output, job_id: str) -> dict[str, Any]:
        kind = output.content_type.partition("/")[0]
        return {
            "id": output_id(job_id, output.index),
            "node_id": output.node_id or "",
            "name": output.name or output.key.rpartition("/")[2],
            "type": kind if kind in _TYPES else "file",
            "content_type": output.content_type,
            "size_bytes": output.size_bytes,
            "hash": None,
            "url": self.storage.sign(output.key),
            "url_expires_at": rfc3339(now_ms() + self.url_ttl_s * 1000),
            "job_id": job_id,
        }

    def output_as_asset(self, output: Output, job: Job) -> dict[str, Any]:
        """An output where an asset is asked for."""
        record = self.output(output, job.id)
        expires_at = rfc3339((job.finished_ms or now_ms()) + self.job_ttl_s * 1000)
        kept = {name: value for name, value in record.items() if name not in ("node_id", "name", "type")}
        return {
            **kept,
            "file_path": record["name"],
            "created_at": rfc3339(job.finished_ms or job.spec.created_ms),
            "expires_at": expires_at,
        }

    def asset(self, asset: Asset) -> dict[str, Any]:
        """An upload."""
        return {
            "id": asset.id,
            "hash": f"blake3:{asset.blake3}" if asset.blake3 else None,
            "size_bytes": asset.size_bytes,
            "content_type": asset.content_type,
            "file_path": asset.name,
            "created_at": rfc3339(asset.created_ms),
            "url": self.storage.sign(asset.key),
            "url_expires_at": rfc3339(now_ms() + self.url_ttl_s * 1000),
            "expires_at": rfc3339(asset.expires_ms),
        }

    def list_item(self, job: Job) -> dict[str, Any]:
        """The lighter form in lists."""
        updated_ms = job.finished_ms or job.started_ms or job.spec.created_ms
        return {
            "id": job.id,
            "status": job.status.value,
            "create_time": rfc3339(job.spec.created_ms),
            "update_time": rfc3339(updated_ms),
            "deployment_id": None,
            "metadata": read_labels(job),
        }


def present_progress(progress: Progress) -> dict[str, Any]:
    """`current_node` is the node's id here."""
    steps = f" {progress.step}/{progress.steps}" if progress.step is not None and progress.steps else ""
    return {
        "value": progress.value,
        "nodes_done": progress.nodes_done,
        "nodes_total": progress.nodes_total,
        "current_node": progress.current_node_id,
        "current_node_class": progress.current_node_class,
        "step": progress.step,
        "steps": progress.steps,
        "message": f"{progress.current_node_class}{steps}" if progress.current_node_class else progress.message,
    }


def present_error(error: JobError) -> dict[str, Any]:
    """The traceback stays out: it holds paths."""
    # A graph that ComfyUI refused names several nodes.
    where = (error.details.get("nodes") or [error.details])[0]
    return {
        "code": "node_execution_error" if error.code == "node_error" else error.code,
        "message": error.message,
        "node_id": where.get("node_id"),
        "class_type": where.get("node_class"),
        "traceback": None,
    }


def present_preview(event: Event, node_id: str | None) -> dict[str, Any]:
    data = json.loads(event.data)
    return {"node_id": node_id or "", "content_type": data["mime"], "data_base64": data["base64"]}


def read_labels(job: Job) -> dict[str, str]:
    """A job's metadata as far as it is labels: jobs made by other routes may carry any JSON."""
    return {name: value for name, value in job.spec.metadata.items() if isinstance(value, str)}


def require_labels(metadata: Any) -> dict[str, str]:
    """The labels of a submission. Raises Unprocessable, naming what is wrong."""
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise _refuse_labels("metadata is an object of texts.", metadata)
    if len(metadata) > MAX_LABELS:
        raise _refuse_labels(f"{len(metadata)} labels are too many; {MAX_LABELS} are taken.", len(metadata))
    for name, value in metadata.items():
        if fault := _find_label_fault(name, value):
            raise _refuse_labels(f"The label {name[:40]!r} {fault}.", name)
    return metadata


def _find_label_fault(name: str, value: Any) -> str | None:
    if not _LABEL_NAME.fullmatch(name):
        return "needs a name of 1 to 40 characters of A-Z a-z 0-9 _ - ."
    if not isinstance(value, str) or _UNFIT.search(value):
        return "must be a text without control characters"
    return f"is longer than {MAX_LABEL_BYTES} bytes" if len(value.encode()) > MAX_LABEL_BYTES else None


def _refuse_labels(message: str, value: Any) -> Unprocessable:
    return Unprocessable(message, code="metadata_invalid", details={"parameter": "metadata", "value": ascii(value)[:100]})


def require_label_filters(query: list[tuple[str, str]]) -> dict[str, str]:
    """The `metadata[name]=value` pairs of a query. Raises BadRequest."""
    found: dict[str, str] = {}
    for key, value in query:
        if key.startswith("metadata"):
            match = re.fullmatch(r"metadata\[(.*)\]", key, re.S)
            name = match[1] if match else key
            if not match or _find_label_fault(name, value) or len(found) >= MAX_LABEL_FILTERS:
                message = f"A filter is metadata[NAME]=VALUE, {MAX_LABEL_FILTERS} of them at the most."
                details = {"parameter": key[:100], "value": value[:100]}
                raise BadRequest(message, code="invalid_metadata_filter", details=details)
            found[name] = value
    return found


def frame(kind: str, data: dict[str, Any]) -> bytes:
    """One server-sent event. No id: this stream knows no replay."""
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


class ComfyStream:
    """A job's events as frames of a v2 stream."""

    def __init__(self, presenter: ComfyPresenter, job: Job) -> None:
        self._presenter, self._job_id = presenter, job.id
        self._node_id = job.progress.current_node_id
        self._told: tuple[str, int | None] | None = None
        self._ended = False

    def has_ended(self) -> bool:
        return self._ended

    def open(self, job: Job, queue_position: int | None) -> bytes:
        """The job as it stands. What ended is told whole before its status, after which nobody reads on."""
        progress = b"" if job.status is JobStatus.QUEUED else frame("progress", present_progress(job.progress))
        outputs = b"".join(frame("output", self._presenter.output(output, job.id)) for output in job.outputs)
        status = self.status(job.status, queue_position)
        return progress + outputs + status if job.is_terminal else status + progress + outputs

    def status(self, status: JobStatus, queue_position: int | None = None) -> bytes:
        """A status event, unless it says nothing new."""
        self._ended = status in TERMINAL
        told = (status.value, queue_position)
        if told == self._told:
            return b""
        self._told = told
        return frame("status", {"status": status.value, "queue_position": queue_position})

    def translate(self, event: Event) -> bytes:
        """An event's frame; kinds that the API does not have are left out."""
        if event.kind == EventKind.STATUS:
            return self.status(JobStatus(event.status))
        if event.kind == EventKind.PROGRESS:
            progress = Progress.model_validate_json(event.data)
            self._node_id = progress.current_node_id
            return frame("progress", present_progress(progress))
        if event.kind == EventKind.PREVIEW:
            return frame("preview", present_preview(event, self._node_id))
        if event.kind == EventKind.OUTPUT:
            return frame("output", self._presenter.output(Output.model_validate_json(event.data), self._job_id))
        return b""
