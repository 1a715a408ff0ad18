"""A plain client of ComfyUI's wire for these tests: graphs, one socket, and answers as they come.
It refuses to interpret anything, so that a test sees what the server sent."""

import asyncio
import json
import secrets
import struct
import uuid
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import aiohttp
from yarl import URL

Graph = dict[str, Any]

DEADLINE_S = 60.0  # for one message or answer; it only keeps a broken server from hanging the suite
END = "end"


@dataclass(frozen=True)
class Message:
    """A text message, or a binary frame of type `frame_type` with an empty kind."""

    kind: str
    data: dict[str, Any] = field(default_factory=dict)
    frame_type: int = 0
    payload: bytes = b""

    @property
    def is_end(self) -> bool:
        return self.kind == "executing" and self.data["node"] is None


@dataclass(frozen=True)
class Answer:
    status: int
    content_type: str
    raw: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.raw)


class Listener:
    """One socket and everything it has received."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, first: Message) -> None:
        self.socket = socket
        self.first = first
        self.messages: list[Message] = []

    @property
    def sid(self) -> str:
        return str(self.first.data["sid"])

    async def receive(self) -> Message:
        message = await _receive(self.socket)
        self.messages.append(message)
        return message

    async def until(self, kind: str, **data: Any) -> Message:
        """Reads until a message of that kind whose data holds these values."""
        while True:
            message = await self.receive()
            if message.kind == kind and data.items() <= message.data.items():
                return message

    async def until_end(self, prompt_id: str) -> list[Message]:
        """Reads until the end marker of that prompt and returns all received since the socket opened."""
        await self.until("executing", node=None, prompt_id=prompt_id)
        return self.messages


class Wire:
    """A client with its own id."""

    def __init__(self, http: aiohttp.ClientSession, base_url: str) -> None:
        self.http = http
        self.base_url = base_url
        self.client_id = uuid.uuid4().hex

    async def get(self, path: str, **query: str) -> Answer:
        return await self._ask("GET", path, params=query)

    async def post(self, path: str, body: Any = None, **options: Any) -> Answer:
        if body is not None:
            options["json"] = body
        return await self._ask("POST", path, **options)

    async def listen(self, client_id: str | None = "own", *, features: dict[str, Any] | None = None) -> Listener:
        """A socket for this client, for another id, or (None) for an id that the server chooses."""
        chosen = self.client_id if client_id == "own" else client_id
        query = {} if chosen is None else {"clientId": chosen}
        socket = await self.http.ws_connect(self.base_url + "/ws", params=query, max_msg_size=0)
        listener = Listener(socket, await _receive(socket))
        if features is not None:
            await socket.send_json({"type": "feature_flags", "data": features})
            await listener.until("feature_flags")
            listener.messages.clear()
        return listener

    async def submit(self, graph: Graph, **fields: Any) -> str:
        """Posts a graph that must be accepted whole, and returns its prompt id."""
        answer = await self.post("/prompt", {"prompt": graph, "client_id": self.client_id, **fields})
        assert answer.status == 200, answer.raw
        assert answer.body["node_errors"] == {}
        return str(answer.body["prompt_id"])

    async def run(self, graph: Graph, **fields: Any) -> tuple[str, list[Message]]:
        """Submits with an open socket; returns the prompt id and all messages up to the end marker."""
        listener = await self.listen()
        prompt_id = await self.submit(graph, **fields)
        messages = await listener.until_end(prompt_id)
        await listener.socket.close()
        return prompt_id, messages

    async def history_of(self, prompt_id: str) -> dict[str, Any]:
        answer = await self.get(f"/history/{quote(prompt_id, safe='')}")
        entry: dict[str, Any] = answer.body[prompt_id]
        return entry

    async def wait_for_history(self, prompt_id: str) -> dict[str, Any]:
        """Polls, for prompts whose end nobody is told."""
        while not (await self.get(f"/history/{prompt_id}")).body:  # noqa: ASYNC110  the server announces nothing
            await asyncio.sleep(0.02)
        return await self.history_of(prompt_id)

    async def wait_until_idle(self) -> None:
        while (await self.get("/prompt")).body["exec_info"]["queue_remaining"]:  # noqa: ASYNC110  see above
            await asyncio.sleep(0.02)

    async def _ask(self, method: str, path: str, **options: Any) -> Answer:
        async with asyncio.timeout(DEADLINE_S), self.http.request(method, URL(self.base_url + path, encoded=True), **options) as response:
            return Answer(response.status, response.content_type, await response.read())


async def _receive(socket: aiohttp.ClientWebSocketResponse) -> Message:
    received = await socket.receive(DEADLINE_S)
    if received.type is aiohttp.WSMsgType.TEXT:
        said = json.loads(received.data)
        return Message(said["type"], said["data"])
    if received.type is aiohttp.WSMsgType.BINARY:
        return Message("", frame_type=struct.unpack(">I", received.data[:4])[0], payload=received.data[4:])
    raise ConnectionError(f"the socket closed: {received}")


def empty_to_save(prefix: str, **empty: Any) -> Graph:
    """EmptyImage (node 1) of a fresh colour -> SaveImage (node 9)."""
    inputs = {"width": 64, "height": 64, "batch_size": 1, "color": secrets.randbelow(1 << 24), **empty}
    return {
        "1": {"class_type": "EmptyImage", "inputs": inputs},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    }


def probe_to_save(prefix: str, *, steps: int = 3, delay_s: float = 0.02, mode: str = "ok", tag: str | None = None) -> Graph:
    """EmptyImage (1) -> ProbeSteps (5) -> SaveImage (9); a fresh tag keeps it out of the cache."""
    graph = empty_to_save(prefix)
    probe = {"image": ["1", 0], "steps": steps, "delay": delay_s, "tag": tag or uuid.uuid4().hex, "mode": mode}
    graph["5"] = {"class_type": "ProbeSteps", "inputs": probe}
    graph["9"]["inputs"]["images"] = ["5", 0]
    return graph


def kinds(messages: list[Message], *, without: tuple[str, ...] = ()) -> list[str]:
    """The order of the messages; frames appear as `frame 1` or `frame 4`, the end marker as `end`."""
    names = [END if m.is_end else m.kind or f"frame {m.frame_type}" for m in messages]
    return [name for name in names if name not in without]


def of_kind(messages: list[Message], kind: str) -> list[dict[str, Any]]:
    return [message.data for message in messages if message.kind == kind]


def output_names(entry: dict[str, Any], node_id: str = "9") -> list[str]:
    return [item["filename"] for item in entry["outputs"][node_id]["images"]]
