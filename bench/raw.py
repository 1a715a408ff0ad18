"""The best a client can do on ComfyUI's own wire: one socket kept open, one request to submit, one to learn the file, one to fetch it."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from bench.deployment import WORKFLOWS

Graph = dict[str, Any]


def load_graph(workflow: str, values: dict[str, dict[str, Any]], prefix: str) -> Graph:
    """A bench workflow's graph with `values` (title -> input -> value) set, saving under `prefix`."""
    graph: Graph = json.loads((WORKFLOWS / workflow / "graph.json").read_bytes())
    for node in graph.values():
        title = node["_meta"]["title"]
        node["inputs"].update(values.get(title, {}))
        if title == "Save":
            node["inputs"]["filename_prefix"] = f"{prefix}/image"
    return graph


class RawClient:
    """Any number of `make` may run at once."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self._url, self._session = url, session
        self._client_id = uuid.uuid4().hex
        self._ends: dict[str, asyncio.Future[None]] = {}

    async def listen(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Read for ever; the message that ends a prompt wakes whoever waits for it."""
        async for frame in socket:
            # Most messages are progress; looking for the one that counts before parsing is what a fast client does.
            if frame.type is aiohttp.WSMsgType.TEXT and '"executing"' in frame.data:
                data = json.loads(frame.data)["data"]
                if data.get("node") is None and (end := self._ends.get(data.get("prompt_id"))) is not None and not end.done():
                    end.set_result(None)

    async def connect(self) -> aiohttp.ClientWebSocketResponse:
        return await self._session.ws_connect(
            self._url.replace("http", "ws", 1) + "/ws", params={"clientId": self._client_id}, max_msg_size=0, compress=0
        )

    async def make(self, graph: Graph) -> bytes:
        """The bytes of the first picture. Raises aiohttp's errors, and KeyError when there is no picture."""
        prompt_id = str(uuid.uuid4())
        self._ends[prompt_id] = asyncio.get_running_loop().create_future()
        try:
            body = {"prompt": graph, "prompt_id": prompt_id, "client_id": self._client_id}
            async with self._session.post(f"{self._url}/prompt", json=body) as response:
                await response.read()
                response.raise_for_status()
            await self._ends[prompt_id]
        finally:
            del self._ends[prompt_id]
        async with self._session.get(f"{self._url}/history/{prompt_id}") as response:
            entry = json.loads(await response.read())[prompt_id]
        file = next(output["images"][0] for output in entry["outputs"].values())
        async with self._session.get(f"{self._url}/view", params=file) as response:
            response.raise_for_status()
            return await response.read()


@asynccontextmanager
async def open_raw_client(url: str) -> AsyncIterator[RawClient]:
    """A client with its socket open and read."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        client = RawClient(url, session)
        async with await client.connect() as socket:
            reader = asyncio.create_task(client.listen(socket))
            try:
                yield client
            finally:
                reader.cancel()
