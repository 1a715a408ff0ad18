"""How far each node of the running prompt is, told to the client that submitted it."""

from typing import Any

from PIL import Image

from local.engine.frames import encode_picture, pack_picture, pack_picture_with_metadata
from local.engine.sockets import Sockets


class Progress:
    """The states of one prompt's nodes. Each change sends all of them, which is what ComfyUI's progress_state carries.
    A `client_id` of None addresses every socket."""

    def __init__(self, sockets: Sockets, prompt_id: str, client_id: str | None) -> None:
        self._sockets = sockets
        self._prompt_id = prompt_id
        self._client_id = client_id
        self._states: dict[str, dict[str, Any]] = {}

    def start(self, node_id: str) -> None:
        self._change(node_id, 0.0, 1.0, "running")

    def finish(self, node_id: str) -> None:
        maximum = self._states[node_id]["max"] if node_id in self._states else 1
        self._change(node_id, maximum, maximum, "finished")

    def report(self, node_id: str, value: int, maximum: int, picture: Image.Image | None, full_size: bool) -> None:
        """progress_state, progress, and the picture: before `progress` with its metadata, or after it without."""
        encoded = encode_picture(picture, full_size=full_size) if picture is not None else None
        with_metadata = self._sockets.wants_preview_metadata(self._client_id)
        self._change(node_id, value, maximum, "running")
        if encoded and with_metadata:
            metadata = {"node_id": node_id, "prompt_id": self._prompt_id, **_place(node_id)}
            self._sockets.send_frame(pack_picture_with_metadata(*encoded, metadata), self._client_id)
        tick = {"value": value, "max": maximum, "prompt_id": self._prompt_id, "node": node_id}
        self._sockets.send("progress", tick, self._client_id)
        if encoded and not with_metadata:
            self._sockets.send_frame(pack_picture(*encoded), self._client_id)

    def _change(self, node_id: str, value: float, maximum: float, state: str) -> None:
        self._states[node_id] = {
            "value": value,
            "max": maximum,
            "state": state,
            "node_id": node_id,
            "prompt_id": self._prompt_id,
            **_place(node_id),
        }
        self._sockets.send("progress_state", {"prompt_id": self._prompt_id, "nodes": self._states}, self._client_id)


def _place(node_id: str) -> dict[str, Any]:
    """Subgraphs do not exist here, so every node stands for itself."""
    return {"display_node_id": node_id, "parent_node_id": None, "real_node_id": node_id}
