"""Who is connected and what is still to be sent to whom.
It knows sockets and addresses, and refuses to know what a message means."""

import asyncio
import json
import uuid
from typing import Any

from aiohttp import ClientError, WSMsgType, web

RunningNode = tuple[str | None, str | None]  # (client id, node id) of the prompt in progress

SERVER_FEATURES = {"supports_preview_metadata": True, "max_upload_size": 100 * 1024 * 1024}


class Sockets:
    """Messages may be sent from any thread; one loop publishes them in order, to one socket after the other.
    A peer that stops reading therefore stalls everybody, which is what ComfyUI does too and what a gateway has to survive."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._outbox: asyncio.Queue[tuple[str | bytes, str | None]] = asyncio.Queue()
        self._sockets: dict[str, web.WebSocketResponse] = {}
        self._features: dict[str, dict[str, Any]] = {}

    def send(self, kind: str, data: dict[str, Any], sid: str | None = None) -> None:
        """To the socket of `sid`, or to every socket when it is None."""
        self._post(_encode(kind, data), sid)

    def send_frame(self, frame: bytes, sid: str | None = None) -> None:
        self._post(frame, sid)

    def wants_preview_metadata(self, sid: str | None) -> bool:
        return sid is not None and bool(self._features.get(sid, {}).get("supports_preview_metadata"))

    async def publish(self) -> None:
        """Sends what is posted, for ever."""
        while True:
            message, sid = await self._outbox.get()
            if sid is None:
                for socket in list(self._sockets.values()):
                    await _deliver(socket, message)
            elif sid in self._sockets:
                await _deliver(self._sockets[sid], message)

    async def serve(
        self, request: web.Request, greeting: dict[str, Any], running: "tuple[str | None, str | None]"
    ) -> web.WebSocketResponse:
        """One client's connection. A client that comes back is told the node of its prompt that is running."""
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        sid = request.query.get("clientId") or uuid.uuid4().hex
        self._sockets[sid] = socket
        self._features[sid] = {}
        try:
            await _deliver(socket, _encode("status", {"status": greeting, "sid": sid}))
            if running[0] == sid and running[1] is not None:
                await _deliver(socket, _encode("executing", {"node": running[1]}))
            await self._listen(socket, sid)
        finally:
            # By id, not by socket: when an older socket of the same id closes, the newer one goes silent. Recorded so.
            self._sockets.pop(sid, None)
            self._features.pop(sid, None)
        return socket

    async def _listen(self, socket: web.WebSocketResponse, sid: str) -> None:
        """Feature flags count only in the first message that is JSON."""
        first = True
        async for message in socket:
            if message.type is not WSMsgType.TEXT or not first:
                continue
            try:
                said = json.loads(message.data)
            except ValueError:
                continue
            first = False
            if isinstance(said, dict) and said.get("type") == "feature_flags" and isinstance(said.get("data", {}), dict):
                self._features[sid] = said.get("data", {})
                await _deliver(socket, _encode("feature_flags", SERVER_FEATURES))

    def _post(self, message: str | bytes, sid: str | None) -> None:
        self._loop.call_soon_threadsafe(self._outbox.put_nowait, (message, sid))


def _encode(kind: str, data: dict[str, Any]) -> str:
    return json.dumps({"type": kind, "data": data})


async def _deliver(socket: web.WebSocketResponse, message: str | bytes) -> None:
    try:
        if isinstance(message, str):
            await socket.send_str(message)
        else:
            await socket.send_bytes(message)
    except (ClientError, ConnectionError):
        return  # the peer is gone; its own handler tidies up
