"""The gateway over HTTP, one blocking call each. What is said and what is meant stands in `wire`; here is only the talking."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx
from httpx_sse import EventSource, ServerSentEvent, SSEError

from fluxgate.errors import ApiError, Unreachable
from fluxgate.wire import Batch, BatchItem, Event, Job, Lora, Output, Page, make_request, read_answer, read_batch, read_job

DEFAULT_URL = "http://127.0.0.1:8000"
# The gateway comments every 15 s on a quiet stream: three of them missing mean a dead connection.
STREAM_SILENCE_S = 45.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 5.0


@contextmanager
def translate(url: str) -> Iterator[None]:
    """httpx's failures as ours."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, SSEError) as error:
        raise Unreachable(url, str(error) or type(error).__name__) from error


class Client:
    """A gateway at `url` (default: FLUXGATE_URL, else http://127.0.0.1:8000) with a key (default: FLUXGATE_API_KEY, else none).

    Raises ApiError for what the gateway refuses and Unreachable when it does not answer; nothing of httpx's.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None, *, timeout_s: float = 30.0) -> None:
        self.url = (url or os.environ.get("FLUXGATE_URL") or DEFAULT_URL).rstrip("/")
        key = api_key or os.environ.get("FLUXGATE_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with translate(self.url):
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s)
            # Signed URLs carry their own right to read; S3 refuses a request that brings a second one.
            self._plain_http = httpx.Client(timeout=timeout_s, follow_redirects=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()
        self._plain_http.close()

    def _request(self, method: str, path: str, **options: Any) -> Any:
        with translate(self.url):
            return read_answer(self._http.request(method, path, **options))

    def generate(self, prompt: str | None = None, *, workflow: str | None = None, loras: Sequence[Lora] = (), **parameters: Any) -> Job:
        """Queue a picture and return at once. `parameters` are the workflow's own; those that are None keep its defaults.

        Some workflows take no prompt.
        """
        body = make_request(prompt, workflow=workflow, loras=loras, parameters=parameters)
        return read_job(self._request("POST", "/v1/generations", json=body))

    def get(self, job_id: str) -> Job:
        """The job as it stands, its picture URLs signed anew."""
        return read_job(self._request("GET", _path(job_id)))

    def jobs(self, *, status: str | None = None, limit: int = 20, cursor: str | None = None) -> Page:
        """The caller's jobs, newest first."""
        asked = {"status": status, "limit": limit, "cursor": cursor}
        content = self._request("GET", "/v1/generations", params={name: value for name, value in asked.items() if value is not None})
        return Page.model_validate(content)

    def cancel(self, job_id: str) -> Job:
        """Stop a job; one that has ended stays as it is. The answer says how it stands."""
        return read_job(self._request("POST", f"{_path(job_id)}/cancel"))

    def replay_webhook(self, job_id: str) -> None:
        """Have the end of a generation or training told again to its webhook."""
        self._request("POST", f"{_path(job_id, 'trainings' if job_id.startswith('trn_') else 'generations')}/webhook/replay")

    def batch(
        self,
        items: Sequence[dict[str, Any]] | None = None,
        *,
        sweep: dict[str, Any] | None = None,
        workflow: str | None = None,
        parameters: dict[str, Any] | None = None,
        **options: Any,
    ) -> Batch:
        """Queue many pictures under one id: a list of requests, or `parameters` with a `sweep` over some of them.

        A sweep's values are a list or `{"from": 1, "to": 100, "step": 1}`. `options` are metadata, priority, cache, webhook, timeout_s.
        """
        body = {"items": items, "sweep": sweep, "workflow": workflow, "parameters": parameters, **options}
        body = {name: value for name, value in body.items() if value is not None}
        return read_batch(self._request("POST", "/v1/batches", json=body))

    def get_batch(self, batch_id: str) -> Batch:
        """How many of its items are how."""
        return read_batch(self._request("GET", _batch_path(batch_id)))

    def batch_items(self, batch_id: str, *, status: str | None = None) -> Iterator[BatchItem]:
        """Every item in order, with its status and pictures; asks for page after page."""
        asked: dict[str, Any] = {"limit": 100, **({"status": status} if status else {})}
        while True:
            page = self._request("GET", f"{_batch_path(batch_id)}/items", params=asked)
            yield from (BatchItem.model_validate(item) for item in _read_list(page))
            if page.get("next_cursor") is None:
                return
            asked["cursor"] = page["next_cursor"]

    def cancel_batch(self, batch_id: str) -> Batch:
        """Stop all of it; what has ended stays as it is."""
        return read_batch(self._request("POST", f"{_batch_path(batch_id)}/cancel"))

    def workflows(self) -> list[dict[str, Any]]:
        """What can be asked for: name, title, description, base models, instances."""
        return _read_list(self._request("GET", "/v1/workflows"))

    def loras(self) -> list[dict[str, Any]]:
        """The LoRAs that instances have: name, family, trigger word, where each is ready."""
        return _read_list(self._request("GET", "/v1/loras"))

    def download(self, output: Output) -> bytes:
        """The picture's bytes."""
        with translate(httpx.URL(output.url).host):
            answer = self._plain_http.get(output.url)
        if not answer.is_success:
            raise ApiError(
                answer.status_code,
                "output_unreadable",
                f"Picture {output.index} cannot be read: S3 answers {answer.status_code}",
                "Signed URLs live about an hour; read the job again for a new one.",
            )
        return answer.content

    def wait(self, job_id: str, *, give_up_s: float = 60.0) -> Job:
        """The job when it has ended."""
        for event in self.events(job_id, give_up_s=give_up_s):
            if event.kind == "status" and (job := read_job(event.data)).is_terminal:
                return job
        return self.get(job_id)

    def events(self, job_id: str, *, after: str | None = None, previews: bool = False, give_up_s: float = 60.0) -> Iterator[Event]:
        """Every event until the job has ended, over as many connections as it takes; none twice, none left out.

        The first event of a connection is the job as it stands and has no id; `after` continues behind an id seen before.
        Unreachable when the gateway stays silent or away for `give_up_s`.
        """
        last_id, pause_s, deadline = after or "", FIRST_PAUSE_S, time.monotonic() + give_up_s
        while True:
            has_ended = False
            try:
                with closing(self._stream(job_id, last_id, previews)) as stream:
                    for event in stream:
                        pause_s, deadline = FIRST_PAUSE_S, time.monotonic() + give_up_s
                        last_id = event.id or last_id
                        if event.kind == "reconnect":
                            break
                        has_ended = has_ended or _is_end(event)
                        yield event
                if has_ended:
                    return
                reason: Unreachable | ApiError = Unreachable(self.url, f"the stream of {job_id} keeps ending early")
            except (Unreachable, ApiError) as error:
                # A gateway on its way up, or a proxy with none behind it, is worth another try; any other refusal is an answer.
                if isinstance(error, ApiError) and error.status not in (502, 503, 504):
                    raise
                reason = error
            if time.monotonic() + pause_s > deadline:
                raise reason
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    def _stream(self, job_id: str, last_id: str, previews: bool) -> Generator[Event, None, None]:
        """The events of one connection."""
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last_id} if last_id else {})}
        timeout = httpx.Timeout(self._http.timeout.connect, read=STREAM_SILENCE_S)
        params = {"previews": "1"} if previews else {}
        with translate(self.url):
            with self._http.stream("GET", f"{_path(job_id)}/events", headers=headers, params=params, timeout=timeout) as answer:
                if not answer.is_success:
                    answer.read()
                    read_answer(answer)
                for message in EventSource(answer).iter_sse():
                    yield _read_event(message)


def _read_event(message: ServerSentEvent) -> Event:
    try:
        data = message.json()
    except ValueError as error:
        raise ApiError(200, "not_the_gateway", f"An event {message.event!r} carries no JSON: {message.data[:100]!r}") from error
    return Event(message.id, message.event, data if isinstance(data, dict) else {"data": data})


def _is_end(event: Event) -> bool:
    return event.kind == "status" and read_job(event.data).is_terminal


def _path(job_id: str, kind: str = "generations") -> str:
    # An id is one segment, whatever it holds: "../x" must stay an unknown job.
    return f"/v1/{kind}/{quote(job_id, safe='')}"


def _batch_path(batch_id: str) -> str:
    return f"/v1/batches/{quote(batch_id, safe='')}"


def _read_list(content: Any) -> list[dict[str, Any]]:
    found = content.get("data") if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise ApiError(200, "not_the_gateway", "The answer is no list", "Is it a Fluxgate gateway?")
    return found
