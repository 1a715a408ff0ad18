"""The gateway as a caller sees it: make a job, follow its events, read its pictures. And the engine's own
record of what it ran: the files it saved, and the graph inside them."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
from PIL import Image

PATIENCE_S = 60.0
TERMINAL = {"succeeded", "failed", "canceled", "expired"}

Job = dict[str, Any]


class SseEvent(NamedTuple):
    """One frame of a stream. `id` is None for the snapshot, which is no part of the history."""

    id: str | None
    kind: str
    data: dict[str, Any]

    @property
    def position(self) -> tuple[int, int]:
        assert self.id is not None, f"a {self.kind} without an id has no place"
        milliseconds, sequence = self.id.split("-")
        return int(milliseconds), int(sequence)


def parse_frame(frame: str) -> SseEvent | None:
    """One event of a stream, None for a comment. Lines end at `\\n` alone: a prompt may hold every other separator."""
    fields = dict(line.split(": ", 1) for line in frame.split("\n") if line and not line.startswith(":"))
    return SseEvent(fields.get("id"), fields["event"], json.loads(fields["data"])) if fields else None


def strip_signatures(value: Any) -> Any:
    """The same data without what is new at every delivery: the signature of a picture's URL."""
    if isinstance(value, dict):
        return {key: urlsplit(part)._replace(query="").geturl() if key == "url" else strip_signatures(part) for key, part in value.items()}
    return [strip_signatures(part) for part in value] if isinstance(value, list) else value


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"{what} did not happen in {PATIENCE_S:g} s"
        time.sleep(0.03)


class Api:
    """One caller of one gateway, over one connection pool."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=PATIENCE_S)

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    @classmethod
    def of(cls, http: httpx.Client) -> Api:
        """The caller that this client is, with its key."""
        api = cls.__new__(cls)
        api.http = http
        return api

    def create(self, **body: Any) -> Job:
        answer = self.http.post("/v1/generations", json=body)
        assert answer.status_code == 202, answer.text
        return dict(answer.json())

    def get(self, job_id: str) -> Job:
        answer = self.http.get(f"/v1/generations/{job_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def wait(self, job_id: str, *statuses: str) -> Job:
        """The job once it has one of these statuses; without any, once it has ended. A 503 says to ask again."""
        wanted = set(statuses) or TERMINAL
        deadline = time.monotonic() + PATIENCE_S
        while (answer := self.http.get(f"/v1/generations/{job_id}")).status_code == 503 or answer.json()["status"] not in wanted:
            assert answer.status_code == 503 or answer.json()["status"] not in TERMINAL, f"it ended: {answer.text}"
            assert time.monotonic() < deadline, f"not {sorted(wanted)} after {PATIENCE_S:g} s: {answer.text}"
            time.sleep(0.03)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def run(self, **body: Any) -> Job:
        """Make it and wait for its success."""
        job = self.wait(self.create(**body)["id"])
        assert job["status"] == "succeeded", job["error"]
        return job

    def follow(self, job_id: str, after: str | None = None) -> Iterator[SseEvent]:
        """The stream as it comes, to its end, comments left out. httpx.HTTPError when it breaks."""
        headers = {"Last-Event-ID": after} if after else {}
        with self.http.stream("GET", f"/v1/generations/{job_id}/events", headers=headers) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            buffer = b""
            for chunk in answer.iter_bytes():
                *frames, buffer = (buffer + chunk).split(b"\n\n")
                yield from filter(None, (parse_frame(frame.decode()) for frame in frames))

    def replay(self, job_id: str, after: str | None = None) -> list[SseEvent]:
        """The kept history of a job that has ended: its events that have an id."""
        return [event for event in self.follow(job_id, after) if event.id is not None]

    def graph(self, job_id: str) -> dict[str, Any]:
        return dict(self.http.get(f"/v1/generations/{job_id}/workflow").json())


def fetch(output: dict[str, Any]) -> bytes:
    """The picture behind a signed URL, by anybody who has it."""
    answer = httpx.get(output["url"])
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == output["content_type"]
    assert len(answer.content) == output["size_bytes"]
    return answer.content


def open_picture(body: bytes) -> Image.Image:
    return Image.open(io.BytesIO(body)).convert("RGB")


def read_graph(png: bytes) -> dict[str, Any]:
    """The graph that the engine itself wrote into a picture it made."""
    with Image.open(io.BytesIO(png)) as image:
        return dict(json.loads(image.info["prompt"]))


def count_saved(engine_url: str, job_id: str) -> int:
    """How many pictures the engine has of a job; a second run would add its own to those of the first."""
    count = 0
    while httpx.get(f"{engine_url}/view", params={"filename": f"image_{count + 1:05}_.png", "subfolder": job_id}).status_code == 200:
        count += 1
    return count
