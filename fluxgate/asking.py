"""What a call is made of: requests as steps, each of which is sent its answer. Pure: what carries the requests, blocking or not,
stands in `client`, and what repeats them in `retries`."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

from fluxgate.errors import ApiError
from fluxgate.wire import (
    Answer,
    drop_none,
    read_answer,
    reads,
)

T = TypeVar("T")
# A file on disk, or a name and its bytes.
File = str | Path | tuple[str, bytes]


@dataclass(frozen=True)
class Ask:
    """One request. `path` is the gateway's own, or the URL of a foreign place to which no key goes.

    `is_repeatable`: sent twice it does no more than once. `after_s`: seconds to wait first.
    """

    method: str
    path: str
    query: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    json: Any = None
    data: Mapping[str, str] | None = None
    files: Sequence[tuple[str, tuple[str, bytes]]] | None = None
    content: bytes | None = None
    is_foreign: bool = False
    is_repeatable: bool = True
    after_s: float = 0.0
    timeout_s: float | None = None

    def options(self) -> dict[str, Any]:
        """As httpx takes it."""
        bodies = {"json": self.json, "data": self.data, "files": self.files, "content": self.content}
        # Even empty `params` would replace the query of a signed URL.
        return {"params": dict(self.query) or None, "headers": dict(self.headers), **drop_none(bodies)}


Steps = Generator[Ask, httpx.Response, T]


def ask_for(ask: Ask, read: Callable[[httpx.Response], T]) -> Steps[T]:
    return read((yield ask))


def make(path: str, body: Any, read: Callable[[httpx.Response], T], key: str | None) -> Steps[T]:
    """A POST that makes a job: its key lets it be sent again without making a second one."""
    return ask_for(Ask("POST", path, json=body, headers={"Idempotency-Key": key or secrets.token_hex(16)}), read)


def drop(path: str) -> Steps[None]:
    return ask_for(Ask("DELETE", path), lambda answer: drop_answer(read_answer(answer)))


def drop_answer(_content: Any) -> None:
    """An answer that says no more than that it was done."""


def path_of(kind: str, name: str, *further: str) -> str:
    """`/v1/{kind}/{name}/...`. A name is one segment, whatever it holds: "../x" must stay an unknown one."""
    return "/".join(("/v1", kind, quote(name, safe=""), *further))


def kind_of(job_id: str) -> str:
    """Which resource a job's id belongs to."""
    return "generations" if job_id.startswith("gen_") else "trainings"


def page_of(kind: str, page: type[Answer], limit: int | None = None, cursor: str | None = None, **filters: str | None) -> Steps[Answer]:
    return ask_for(Ask("GET", f"/v1/{kind}", query=drop_none({**filters, "limit": limit, "cursor": cursor})), reads(page))


def open_file(file: File) -> tuple[str, bytes]:
    if isinstance(file, tuple):
        return file
    path = Path(file)
    return path.name, path.read_bytes()


def read_bytes(answer: httpx.Response) -> bytes:
    if not answer.is_success:
        raise ApiError(
            answer.status_code,
            "output_unreadable",
            f"{answer.request.url.copy_with(query=None)} cannot be read: S3 answers {answer.status_code}",
            "Signed URLs live about an hour; read the job again for a new one.",
        )
    return answer.content
