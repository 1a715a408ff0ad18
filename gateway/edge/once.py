"""POSTs that make no job, answered once for each Idempotency-Key: the body is read and known by its digest before anything is done."""

from __future__ import annotations

import asyncio
import hashlib
import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager, suppress
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message

from gateway.auth import Caller
from gateway.edge.bodies import read_idempotency_key, require_idempotency_key
from gateway.errors import BadRequest, Conflict
from gateway.jobs.answers import Answer, AnswerStore, Claim

# Up to here a body stays in memory; it is written and read again in pieces of this size.
PIECE_BYTES = 1 << 20
HEADER, REPLAYED = "idempotency-key", "Idempotency-Replayed"

Run = Callable[[Request], Awaitable[Response]]


class FormDigest:
    """What a multipart body says: its parts, whatever boundary stands between them, since clients draw one anew for each try."""

    def __init__(self, content_type: str) -> None:
        names = ("part_begin", "header_field", "header_value", "header_end", "part_data", "part_end")
        self._whole, self._head, self._data = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        _, options = parse_options_header(content_type.encode("latin-1"))
        self._parser: MultipartParser | None = None
        self._attempt(lambda: self._open(options.get(b"boundary", b""), names))

    def _open(self, boundary: bytes, names: Collection[str]) -> None:
        self._parser = MultipartParser(boundary, {f"on_{name}": getattr(self, f"_on_{name}") for name in names})  # type: ignore[arg-type]

    def _attempt(self, work: Callable[[], object]) -> None:
        """A body that cannot be read is refused by whom it is for; here it is only another one than any that can."""
        try:
            work()
        except FormParserError:
            self._parser = None

    def take(self, piece: bytes) -> None:
        if (parser := self._parser) is not None:
            self._attempt(lambda: parser.write(piece))

    def end(self) -> str:
        if (parser := self._parser) is not None:
            self._attempt(parser.finalize)
        return "unreadable" if self._parser is None else self._whole.hexdigest()

    def _on_part_begin(self) -> None:
        self._head, self._data = hashlib.sha256(), hashlib.sha256()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._head.update(data[start:end])

    _on_header_value = _on_header_field

    def _on_header_end(self) -> None:
        self._head.update(b"\n")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._data.update(data[start:end])

    def _on_part_end(self) -> None:
        self._whole.update(self._head.digest() + self._data.digest())


def _digest_plain(body: bytes) -> str:
    """JSON counts by what it says."""
    with suppress(ValueError, RecursionError):
        body = json.dumps(json.loads(body), sort_keys=True).encode()
    return hashlib.sha256(body).hexdigest()


@asynccontextmanager
async def _read_whole(request: Request) -> AsyncIterator[tuple[Request, str]]:
    """The request with its body at hand, and the body's digest. Files wait on disk."""
    kind = request.headers.get("content-type", "")
    try:
        if not kind.startswith("multipart/form-data"):
            yield request, _digest_plain(await request.body())
            return
        with tempfile.SpooledTemporaryFile(max_size=PIECE_BYTES) as spool:
            digest, piece = FormDigest(kind), bytearray()
            async for chunk in request.stream():
                digest.take(chunk)
                piece += chunk
                if len(piece) >= PIECE_BYTES:
                    await asyncio.to_thread(spool.write, bytes(piece))
                    piece.clear()
            spool.write(piece)
            spool.seek(0)
            yield Request(request.scope, _replay_body(spool, request)), digest.end()
    except ClientDisconnect as fault:
        raise BadRequest("The upload was broken off.", code="upload_broken_off") from fault


def _replay_body(spool: IO[bytes], request: Request) -> Callable[[], Awaitable[Message]]:
    is_over = False

    async def receive() -> Message:
        nonlocal is_over
        if is_over:
            return await request.receive()
        piece = await asyncio.to_thread(spool.read, PIECE_BYTES)
        is_over = not piece
        return {"type": "http.request", "body": piece, "more_body": not is_over}

    return receive


async def answer_once(request: Request, caller: Caller, answers: AnswerStore, secrets: Collection[str], run: Run) -> Response:
    """The answer that an earlier request with the same key and body got; else that of `run`, kept unless it is a refusal.

    `secrets` are fields of the answer that are kept nowhere. Raises Conflict where one would have to be said again.
    """
    given = request.headers.get(HEADER, "")
    require_idempotency_key(given)
    place = f"POST {request.scope['path']}?{request.scope['query_string'].decode('latin-1')}"
    async with _read_whole(request) as (whole, digest):
        key = read_idempotency_key(caller, given, place, digest)
        assert key is not None, "it was given"
        async with answers.claim(key) as found:
            if isinstance(found, Claim):
                response = await run(whole)
                if response.status_code < 400:
                    found.answer = _take_down(response, secrets)
                return response
        return _say_again(found, key.key)


def _take_down(response: Response, secrets: Collection[str]) -> Answer:
    headers = {name: value for name, value in response.headers.items() if name != "content-length"}
    body = bytes(response.body)
    said = json.loads(body)
    told = {name: value for name, value in said.items() if name not in secrets}
    is_whole = len(told) == len(said)
    return Answer(response.status_code, headers, body if is_whole else json.dumps(told).encode(), is_whole)


def _say_again(answer: Answer, key: str) -> Response:
    if answer.is_whole:
        return Response(answer.body, answer.status, {**answer.headers, REPLAYED: "true"})
    raise Conflict(
        "The first request with this Idempotency-Key was answered, with a secret that is kept nowhere.",
        code="answer_not_kept",
        hint="`details.answer` is the rest of it. For another one ask with a new Idempotency-Key, and take back what is of no use.",
        details={"parameter": "Idempotency-Key", "value": key[:100], "answer": json.loads(answer.body)},
    )
