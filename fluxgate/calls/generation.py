"""What can be asked about generations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fluxgate.asking import Ask, Steps, ask_for, drop, drop_answer, kind_of, make, page_of, path_of, read_bytes
from fluxgate.wire import (
    Job,
    Lora,
    Output,
    Page,
    make_request,
    read_answer,
    reads,
)


def generate(
    prompt: str | None = None,
    *,
    workflow: str | None = None,
    loras: Sequence[Lora | str] = (),
    idempotency_key: str | None = None,
    **parameters: Any,
) -> Steps[Job]:
    """Queue a picture and return at once. `parameters` are the workflow's own; those that are None keep its defaults.

    Some workflows take no prompt. `idempotency_key` is drawn when absent; give one to be safe across your own restarts.
    """
    return make("/v1/generations", make_request(prompt, workflow=workflow, loras=loras, parameters=parameters), reads(Job), idempotency_key)


def get(job_id: str) -> Steps[Job]:
    """The job as it stands, its picture URLs signed anew."""
    return ask_for(Ask("GET", path_of("generations", job_id)), reads(Job))


def jobs(*, status: str | None = None, limit: int = 20, cursor: str | None = None) -> Steps[Page[Job]]:
    """The caller's jobs, newest first."""
    return page_of("generations", Page[Job], limit, cursor, status=status)


def preview(
    prompt: str | None = None, *, workflow: str | None = None, loras: Sequence[Lora | str] = (), **parameters: Any
) -> Steps[dict[str, Any]]:
    """What `generate` would do with the same arguments: the graph, cache hit or not, seconds, cost. Runs nothing."""
    body = make_request(prompt, workflow=workflow, loras=loras, parameters=parameters)
    return ask_for(Ask("POST", "/v1/generations/preview", json=body), lambda answer: dict(read_answer(answer)))


def reproduce(job_id: str, *, idempotency_key: str | None = None) -> Steps[Job]:
    """Run the graph of a job that succeeded once more."""
    return make(path_of("generations", job_id, "reproduce"), None, reads(Job), idempotency_key)


def compare(job_id: str) -> Steps[dict[str, Any]]:
    """How the pictures of a reproduction differ from those of the job it reproduces."""
    return ask_for(Ask("GET", path_of("generations", job_id, "comparison")), lambda answer: dict(read_answer(answer)))


def cancel(job_id: str) -> Steps[Job]:
    """Stop a job; one that has ended stays as it is. The answer says how it stands."""
    return ask_for(Ask("POST", path_of("generations", job_id, "cancel")), reads(Job))


def delete(job_id: str) -> Steps[None]:
    """Forget a job that has ended: its record, its events and its pictures."""
    return drop(path_of("generations", job_id))


def graph(job_id: str) -> Steps[dict[str, Any]]:
    """The exact graph that was submitted, to open in ComfyUI's editor."""
    return ask_for(Ask("GET", path_of("generations", job_id, "workflow")), lambda answer: dict(read_answer(answer)))


def replay_webhook(job_id: str) -> Steps[None]:
    """Have the end of a generation or training told again to its webhook."""
    return ask_for(Ask("POST", path_of(kind_of(job_id), job_id, "webhook", "replay")), lambda answer: drop_answer(read_answer(answer)))


def download(picture: Output | str) -> Steps[bytes]:
    """The bytes behind an output, or behind any signed URL."""
    url = picture if isinstance(picture, str) else picture.url
    return ask_for(Ask("GET", url, is_foreign=True), read_bytes)
