"""A proxy in front of one instance that does to its HTTP answers and its socket what networks and crashes do.
It knows ComfyUI's paths only by the rules a test gives it, and nothing of the gateway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web

PIECE_PAUSE_S = 0.02
LARGEST_FRAME_BYTES = 64 << 20


@dataclass(frozen=True)
class Answer:
    """What the instance said to one request."""

    status: int
    content_type: str
    body: bytes

    def respond(self) -> web.Response:
        return web.Response(status=self.status, body=self.body, headers={"Content-Type": self.content_type})


Forward = Callable[[], Awaitable[Answer]]
Twist = Callable[[web.Request, Forward], Awaitable[web.StreamResponse]]
Frame = str | bytes
Relay = Callable[[Frame], Iterable[Frame]]  # what becomes of a message on its way to the gateway


@dataclass
class Rule:
    """Requests of this method to this path or below it are twisted, the first `times` of them after `skip` (None: all)."""

    method: str
    path: str
    twist: Twist
    times: int | None = 1
    skip: int = 0
    used: int = 0

    def takes(self, request: web.Request) -> bool:
        if request.method != self.method or not f"{request.path}/".startswith(f"{self.path}/"):
            return False
        if self.skip:
            self.skip -= 1
            return False
        if self.times is not None and self.used >= self.times:
            return False
        self.used += 1
        return True


class FaultyProxy:
    """Listens at `url` and passes everything on to `target`; `rules` and `relay` may change at any time."""

    def __init__(self, target: str) -> None:
        self.target, self.url = target, ""
        self.rules: list[Rule] = []
        self.relay: Relay = lambda frame: [frame]
        self.sockets: list[tuple[web.Request, web.WebSocketResponse]] = []
        self.sockets_opened = 0
        self._held: set[asyncio.Task[Any]] = set()
        self._session: aiohttp.ClientSession

    def add(self, method: str, path: str, twist: Twist, *, times: int | None = 1, skip: int = 0) -> Rule:
        self.rules.append(Rule(method, path, twist, times, skip))
        return self.rules[-1]

    @asynccontextmanager
    async def open(self) -> AsyncIterator[FaultyProxy]:
        app = web.Application(client_max_size=LARGEST_FRAME_BYTES)
        app.router.add_route("*", "/{path:.*}", self._serve)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as self._session:
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            try:
                yield self
            finally:
                for task in list(self._held):
                    task.cancel()
                await runner.cleanup()

    def cut_sockets(self) -> None:
        """Break every socket as a lost network does."""
        for request, _ in self.sockets:
            cut(request)

    def half_close_sockets(self) -> None:
        """Say that no more will come, and go on listening."""
        for request, _ in self.sockets:
            assert request.transport is not None
            request.transport.write_eof()

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        task = asyncio.current_task()
        assert task is not None
        self._held.add(task)
        try:
            twist = next((rule.twist for rule in self.rules if rule.takes(request)), None)
            if request.path == "/ws" and twist is None:
                return await self._relay_socket(request)
            body = await request.read()
            return await (twist or pass_on)(request, lambda: self._forward(request, body))
        finally:
            self._held.discard(task)

    async def _forward(self, request: web.Request, body: bytes) -> Answer:
        headers = {"Content-Type": request.headers.get("Content-Type", "application/octet-stream")} if body else {}
        try:
            async with self._session.request(request.method, self.target + request.path_qs, data=body or None, headers=headers) as answer:
                return Answer(answer.status, answer.headers.get("Content-Type", "application/octet-stream"), await answer.read())
        except aiohttp.ClientError:
            return Answer(502, "text/plain", b"bad gateway")

    async def _relay_socket(self, request: web.Request) -> web.StreamResponse:
        ours = web.WebSocketResponse(max_msg_size=LARGEST_FRAME_BYTES, compress=False)
        await ours.prepare(request)
        self.sockets.append((request, ours))
        self.sockets_opened += 1
        try:
            target = self.target.replace("http", "ws", 1) + request.path_qs
            async with self._session.ws_connect(target, max_msg_size=LARGEST_FRAME_BYTES) as theirs:
                up = asyncio.create_task(_pass_up(ours, theirs))
                try:
                    await self._pass_down(theirs, ours)
                finally:
                    up.cancel()
        except (aiohttp.ClientError, ConnectionError):
            cut(request)
        finally:
            self.sockets = [pair for pair in self.sockets if pair[1] is not ours]
            with suppress(ConnectionError):
                await ours.close()
        return ours

    async def _pass_down(self, theirs: aiohttp.ClientWebSocketResponse, ours: web.WebSocketResponse) -> None:
        async for message in theirs:
            if message.type in (aiohttp.WSMsgType.TEXT, aiohttp.WSMsgType.BINARY):
                for frame in self.relay(message.data):
                    await (ours.send_str(frame) if isinstance(frame, str) else ours.send_bytes(frame))


async def _pass_up(ours: web.WebSocketResponse, theirs: aiohttp.ClientWebSocketResponse) -> None:
    async for message in ours:
        if message.type is aiohttp.WSMsgType.TEXT:
            await theirs.send_str(message.data)
    await theirs.close()


def cut(request: web.Request) -> None:
    """Reset the connection, now."""
    if request.transport is not None:
        request.transport.abort()


# -- twists of one HTTP request ---------------------------------------------------------------------------------


async def pass_on(request: web.Request, forward: Forward) -> web.StreamResponse:
    return (await forward()).respond()


async def drop_request(request: web.Request, forward: Forward) -> web.StreamResponse:
    """The connection breaks before the instance hears anything."""
    cut(request)
    return web.Response()


async def drop_answer(request: web.Request, forward: Forward) -> web.StreamResponse:
    """The instance did it; nobody learns."""
    await forward()
    cut(request)
    return web.Response()


async def keep_silent(request: web.Request, forward: Forward) -> web.StreamResponse:
    """The instance did it, and the connection stays open without a byte."""
    if request.path != "/ws":
        await forward()
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def truncate(request: web.Request, forward: Forward) -> web.StreamResponse:
    """Half of the body, then the connection breaks: the length that was announced shows it."""
    answer = await forward()
    response = web.StreamResponse(headers={"Content-Type": answer.content_type, "Content-Length": str(len(answer.body))})
    await response.prepare(request)
    await response.write(answer.body[: len(answer.body) // 2])
    cut(request)
    return response


async def truncate_unseen(request: web.Request, forward: Forward) -> web.StreamResponse:
    """Half of the body as if it were all, as from a file that is still being written."""
    answer = await forward()
    return Answer(answer.status, answer.content_type, answer.body[: len(answer.body) // 2]).respond()


async def drip(request: web.Request, forward: Forward) -> web.StreamResponse:
    """A byte now and then, for ever: the connection lives and nothing is ever whole."""
    answer = await forward()
    response = web.StreamResponse(headers={"Content-Type": answer.content_type, "Content-Length": str(1 << 20)})
    await response.prepare(request)
    with suppress(ConnectionError):
        while True:
            await response.write(b" ")
            await asyncio.sleep(PIECE_PAUSE_S)
    return response


def delay(seconds: float) -> Twist:
    """The instance hears of it late, and so does the gateway."""

    async def twist(request: web.Request, forward: Forward) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return (await forward()).respond()

    return twist


def answer_with(status: int, body: bytes = b"upstream error", content_type: str = "text/html", *, forwarded: bool = False) -> Twist:
    """Something else than the instance would say; `forwarded` tells whether it got the request all the same."""

    async def twist(request: web.Request, forward: Forward) -> web.StreamResponse:
        if forwarded:
            await forward()
        return Answer(status, content_type, body).respond()

    return twist


def change_json(change: Callable[[dict[str, Any]], object]) -> Twist:
    """The instance's own answer with something changed in it."""

    async def twist(request: web.Request, forward: Forward) -> web.StreamResponse:
        answer = await forward()
        said = json.loads(answer.body)
        change(said)
        return Answer(answer.status, answer.content_type, json.dumps(said).encode()).respond()

    return twist


# -- twists of the socket's messages ----------------------------------------------------------------------------


def lose_all(frame: Frame) -> Iterable[Frame]:
    return []


def double(frame: Frame) -> Iterable[Frame]:
    return [frame, frame]


def truncate_messages(frame: Frame) -> Iterable[Frame]:
    return [frame[: len(frame) // 2]]


def lose_kinds(*kinds: str) -> Relay:
    """Messages of these types never arrive."""
    marks = [f'"type": "{kind}"' for kind in kinds]
    return lambda frame: [] if isinstance(frame, str) and any(mark in frame[:60] for mark in marks) else [frame]


def reverse_in_groups(size: int) -> Relay:
    """Every `size` messages arrive last one first; those of an incomplete group do not arrive."""
    waiting: list[Frame] = []

    def relay(frame: Frame) -> Iterable[Frame]:
        waiting.append(frame)
        if len(waiting) < size:
            return []
        group = waiting[::-1]
        waiting.clear()
        return group

    return relay


def end_marker(prompt_id: str) -> str:
    """What says that a prompt has ended, whatever came of it."""
    return json.dumps({"type": "executing", "data": {"node": None, "prompt_id": prompt_id}})


def add_after(kind: str, make: Callable[[str], Iterable[Frame]]) -> Relay:
    """After each message of this type come the frames that `make` makes for its prompt's id."""

    def relay(frame: Frame) -> Iterable[Frame]:
        if isinstance(frame, str) and f'"type": "{kind}"' in frame[:60]:
            return [frame, *make(json.loads(frame)["data"]["prompt_id"])]
        return [frame]

    return relay
