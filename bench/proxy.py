"""A TCP proxy on loopback that holds requests back or listens in. It understands no more of a protocol than it needs for that."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

CHUNK_BYTES = 1 << 16

Listener = Callable[[bytes], None]


class PromptTimes:
    """Start and end of each prompt, in ms, from ComfyUI's own messages as they pass. Give `listen()` to a proxy."""

    _MESSAGE = re.compile(rb'"type": ?"execution_(start|success)", ?"data": ?\{"prompt_id": ?"([^"]+)", ?"timestamp": ?(\d+)')
    # Longer than such a message, so that one cut in two by the network is still seen.
    _TAIL_BYTES = 256

    def __init__(self) -> None:
        self.started_ms: dict[str, int] = {}
        self.ended_ms: dict[str, int] = {}

    def listen(self) -> Listener:
        tail = b""

        def read(data: bytes) -> None:
            nonlocal tail
            text = tail + data
            for kind, prompt_id, timestamp in self._MESSAGE.findall(text):
                (self.started_ms if kind == b"start" else self.ended_ms)[prompt_id.decode()] = int(timestamp)
            tail = text[-self._TAIL_BYTES :]

        return read

    def forget(self) -> None:
        self.started_ms.clear()
        self.ended_ms.clear()


class TcpProxy:
    """Passes bytes both ways. Requests that begin with PUT are held for `hold_put_s` first; `listen` makes a listener for each
    connection, which sees what the server says."""

    def __init__(self, target_url: str, *, hold_put_s: float = 0.0, listen: Callable[[], Listener] | None = None) -> None:
        parts = urlsplit(target_url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._hold_put_s, self._listen = hold_put_s, listen
        self._connections: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.puts_held = 0

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        """Listen on a free port; gives the URL to use instead of the target's."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for writer in self._writers:
                writer.close()
            await asyncio.gather(*self._connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            target_reader, target_writer = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.close()
            self._connections.discard(task)
            return
        self._writers |= {writer, target_writer}
        # One side that breaks off must not cut what the other still has to say; its own error is no news to anybody.
        await asyncio.gather(self._pass_requests(reader, target_writer), self._pass_answers(target_reader, writer), return_exceptions=True)
        for end in (writer, target_writer):
            end.close()
            self._writers.discard(end)
        self._connections.discard(task)

    async def _pass_requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(CHUNK_BYTES):
            # A client that waits for each answer begins every request in a chunk of its own.
            if self._hold_put_s and data.startswith(b"PUT "):
                self.puts_held += 1
                await asyncio.sleep(self._hold_put_s)
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    async def _pass_answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        listener = self._listen() if self._listen is not None else None
        while data := await reader.read(CHUNK_BYTES):
            if listener is not None:
                listener(data)
            writer.write(data)
            await writer.drain()
        writer.write_eof()
