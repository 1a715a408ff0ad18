"""One socket to one instance: kept open, drained fast, and told apart by connection.

Events are a speed-up: what they say is confirmed by history, and nothing is lost when they stop.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable

import aiohttp

from gateway.comfy.messages import Message, Preview, parse_binary, parse_text

log = logging.getLogger(__name__)

Listener = Callable[[Message | Preview], None]

PING_S = 20.0
# A handshake that is never answered would else last as long as the session allows: 300 s without a usable instance.
HANDSHAKE_S = 5.0
# SaveImageWebsocket sends a whole picture as one frame; 7.7 MB was seen, aiohttp's default of 4 MiB would cut the socket.
MAX_FRAME_BYTES = 256 << 20
FEATURE_FLAGS = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}


class InstanceSocket:
    """Reads for ever and hands each message to the listener of its prompt.

    A new client id for every connection: ComfyUI forgets a newer socket when an older one of the same id closes. Events go
    to the client id a prompt was submitted under, so after a reconnect the earlier prompts are followed by polling alone.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url = url.replace("http", "ws", 1) + "/ws"
        self._session = session
        self._listeners: dict[str, Listener] = {}
        self._running: str | None = None
        self._connected = asyncio.Event()
        self.client_id = uuid.uuid4().hex
        self.connections = 0

    @property
    def is_connected(self) -> bool:
        return self._connected.is_set()

    def listen(self, prompt_id: str, listener: Listener) -> None:
        self._listeners[prompt_id] = listener

    def forget(self, prompt_id: str) -> None:
        self._listeners.pop(prompt_id, None)

    async def wait_connected(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._connected.wait()
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Connect, read, connect again. Ends only when cancelled."""
        pause_s = 0.1
        while True:
            client_id = uuid.uuid4().hex
            try:
                async with asyncio.timeout(HANDSHAKE_S):
                    socket = await self._session.ws_connect(
                        self._url, params={"clientId": client_id}, heartbeat=PING_S, max_msg_size=MAX_FRAME_BYTES, compress=0
                    )
                async with socket:
                    await socket.send_json(FEATURE_FLAGS)
                    self.client_id, pause_s = client_id, 0.1
                    self.connections += 1
                    self._connected.set()
                    await self._read(socket)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                log.info("socket closed", extra={"instance": self._url, "error": str(error)})
            finally:
                self._connected.clear()
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, 5.0)

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        async for frame in socket:
            if frame.type is aiohttp.WSMsgType.TEXT:
                self._hand_over(parse_text(frame.data))
            elif frame.type is aiohttp.WSMsgType.BINARY:
                self._hand_over(parse_binary(frame.data))

    def _hand_over(self, message: Message | Preview | None) -> None:
        if message is None:
            return
        if isinstance(message, Preview):
            # The older frame names no prompt: it belongs to the one that runs.
            prompt_id = message.prompt_id or self._running
        else:
            prompt_id = message.data.prompt_id
            if message.type == "execution_start":
                self._running = prompt_id
        listener = self._listeners.get(prompt_id) if prompt_id else None
        if listener is not None:
            listener(message)
