"""Answers that go on for as long as a job does. Thousands may be open: each is run outside the framework, after it has let go of the
request, so that an open stream holds two tasks and none of the frames, scopes and exit stacks that a request is served with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

BOX = "fluxgate.stream"


class EventStream(Response):
    """A body of server-sent events. Called as a response it only steps aside; whoever put a box into the scope runs it."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None], status_code: int = 200) -> None:
        super().__init__(status_code=status_code, headers={"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        box: list[EventStream] = scope[BOX]
        box.append(self)

    async def run(self, receive: Receive, send: Send) -> None:
        """Send until the chunks end or the client has gone."""
        async with asyncio.TaskGroup() as group:
            pump = group.create_task(self._pump(send))
            # A server says so when its client has gone, and when the answer is complete.
            while (await receive())["type"] != "http.disconnect":
                continue
            pump.cancel()

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._chunks) as chunks:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
