"""Requests with a small answer over plain HTTP/1.1: a job makes three, for each of which aiohttp takes 80 µs of CPU and this 21.

It knows kept connections and answers that are read whole; TLS, forms, redirects and streams are for aiohttp, to which callers go with them.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple, cast
from urllib.parse import urlsplit

import httptools

CONNECT_S = 5.0
# Shorter than servers keep theirs (ComfyUI 75 s), so that a request rarely meets a connection that is being closed.
KEEP_S = 30.0
MAX_HEAD_BYTES = 64 << 10
# Sent once more when a kept connection turns out to be closed: doing them twice is doing them once.
_REPEATABLE = ("GET", "PUT")


class BrokenAnswer(ConnectionError):
    """The connection ended before the answer did, or what came is no HTTP."""


class Answer(NamedTuple):
    status: int
    body: bytes

    @property
    def is_redirect(self) -> bool:
        return self.status in (301, 302, 303, 307, 308)


class _Exchange(asyncio.Protocol):
    """One connection; one request on it at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._pieces: list[bytes] = []
        self._head_bytes, self._is_in_head, self._has_length = 0, True, False
        self._loop = asyncio.get_running_loop()
        self._heard_s, self._deadline_s = 0.0, 0.0
        self._silence_s: float | None = None
        self._clock: asyncio.TimerHandle | None = None
        self.has_heard = False  # of the answer that is waited for
        self.idle_since_s = 0.0
        self.is_open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is one without saying so.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if error is None and not self._is_in_head and not self._has_length:
            # Such an answer ends with its connection.
            self._end()
        self._fail(BrokenAnswer(f"connection lost: {error or 'closed by the other side'}"))

    @property
    def can_send(self) -> bool:
        return self.is_open and self._transport is not None and not self._transport.is_closing()

    def send(self, request: bytes, deadline_s: float, silence_s: float | None) -> asyncio.Future[Answer]:
        assert self._transport is not None, "made by create_connection"
        self._parser = httptools.HttpResponseParser(self)
        self._pieces, self._head_bytes, self._is_in_head, self._has_length = [], 0, True, False
        self.has_heard, self._heard_s = False, time.monotonic()
        self._deadline_s, self._silence_s = deadline_s, silence_s
        answer = self._answer = self._loop.create_future()
        self._check_clock()
        if not answer.done():
            self._transport.write(request)
        return answer

    def _check_clock(self) -> None:
        """One timer for both bounds; most requests are answered long before it."""
        now = time.monotonic()
        left_s = self._deadline_s - now
        if self._silence_s is not None:
            left_s = min(left_s, self._heard_s + self._silence_s - now)
        if left_s > 0:
            self._clock = self._loop.call_later(left_s, self._check_clock)
        elif now >= self._deadline_s:
            self._fail(TimeoutError("the answer did not come in time"))
        else:
            self._fail(TimeoutError(f"nothing came for {self._silence_s:g} s"))

    def rest(self) -> None:
        """The exchange is over; the connection waits for the next."""
        self.idle_since_s = time.monotonic()
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def close(self) -> None:
        self.rest()
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._parser is None:
            # Nobody asked.
            self.close()
            return
        self.has_heard, self._heard_s = True, time.monotonic()
        if self._is_in_head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(BrokenAnswer(f"no HTTP: {error}"))
        if self._is_in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._fail(BrokenAnswer("the answer's head has no end"))

    # -- what the parser tells ---------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        # An answer that nobody asked for would be taken for that to the next request.
        self.is_open = self.is_open and self._answer is not None

    def on_header(self, name: bytes, value: bytes) -> None:
        self._has_length |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        # 100 Continue and its kind announce the answer.
        self._is_in_head = self._parser.get_status_code() < 200

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if not self._is_in_head:
            self.is_open = self.is_open and self._parser.should_keep_alive()
            self._end()

    def _end(self) -> None:
        if self._answer is not None and self._parser is not None and not self._answer.done():
            self._answer.set_result(Answer(self._parser.get_status_code(), b"".join(self._pieces)))
        self._answer = None

    def _fail(self, error: OSError) -> None:
        self.close()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        self._answer = None


class PlainHost:
    """One server, and the connections to it that wait for the next request."""

    def __init__(self, host: str, port: int, name: str) -> None:
        """`name` is what its requests say in `Host`."""
        self._host, self._port = host, port
        self._host_line = f"Host: {name}\r\n"
        self._idle: deque[_Exchange] = deque()  # the one used last is at the right

    async def request(
        self,
        method: str,
        target: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        timeout_s: float,
        silence_s: float | None = None,
    ) -> Answer:
        """`target` is quoted already. `silence_s` bounds each pause of the answer, `timeout_s` all of it. Raises OSError, TimeoutError."""
        lines = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        length = f"Content-Length: {len(body)}\r\n" if body or method != "GET" else ""
        head = f"{method} {target} HTTP/1.1\r\n{self._host_line}{length}{lines}\r\n".encode("ascii")
        deadline_s = time.monotonic() + timeout_s
        while (kept := self._take_kept()) is not None:
            try:
                return await self._exchange(kept, head + body, deadline_s, silence_s)
            except ConnectionError:
                if kept.has_heard or method not in _REPEATABLE:
                    raise
        if (left_s := deadline_s - time.monotonic()) <= 0:
            raise TimeoutError("there was no time left for another connection")
        return await self._exchange(await self._connect(min(CONNECT_S, left_s)), head + body, deadline_s, silence_s)

    def _take_kept(self) -> _Exchange | None:
        now = time.monotonic()
        while self._idle and now - self._idle[0].idle_since_s > KEEP_S:
            self._idle.popleft().close()
        while self._idle:
            kept = self._idle.pop()
            if kept.can_send:
                return kept
        return None

    async def _connect(self, timeout_s: float) -> _Exchange:
        async with asyncio.timeout(timeout_s):
            _, exchange = await asyncio.get_running_loop().create_connection(_Exchange, self._host, self._port)
        return exchange

    async def _exchange(self, exchange: _Exchange, request: bytes, deadline_s: float, silence_s: float | None) -> Answer:
        is_answered = False
        try:
            answer = await exchange.send(request, deadline_s, silence_s)
            is_answered = True
        finally:
            if is_answered and exchange.is_open:
                exchange.rest()
                self._idle.append(exchange)
            else:
                # Given up: what came now would answer nothing that is asked later.
                exchange.close()
        return answer

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()


class PlainHttp:
    """The servers of a process that are asked this way."""

    def __init__(self) -> None:
        self._hosts: dict[str, PlainHost] = {}

    def host(self, url: str) -> PlainHost | None:
        """The server of a URL; None where it takes more than plain HTTP: TLS, or a password in the address."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or "@" in parts.netloc:
            return None
        name = parts.netloc.removesuffix(":80")
        if name not in self._hosts:
            self._hosts[name] = PlainHost(parts.hostname, parts.port or 80, name)
        return self._hosts[name]

    def close(self) -> None:
        for host in self._hosts.values():
            host.close()
