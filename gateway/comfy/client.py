"""ComfyUI's HTTP routes, one method each. Says what the instance said; decides nothing."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, NamedTuple, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import aiohttp
from pydantic import BaseModel, ConfigDict, Field, RootModel, TypeAdapter, ValidationError

from gateway.comfy.messages import ErrorData
from gateway.errors import InstanceError, InstanceUnreachable, OutputMissing, PromptRejected
from gateway.plain_http import PlainHttp


class OutputFile(NamedTuple):
    """Where a saved picture lies on the instance, as history names it, and the node that saved it."""

    filename: str
    subfolder: str
    type: str
    node_id: str = ""

    def place(self) -> dict[str, str]:
        return {"filename": self.filename, "subfolder": self.subfolder, "type": self.type}


class QueueState(NamedTuple):
    running: frozenset[str]
    pending: frozenset[str]

    def holds(self, prompt_id: str) -> bool:
        return prompt_id in self.running or prompt_id in self.pending


class _Status(BaseModel):
    model_config = ConfigDict(extra="ignore")
    status_str: str = "success"
    completed: bool = True
    messages: list[tuple[str, dict[str, Any]]] = Field(default_factory=list)


class HistoryEntry(BaseModel):
    """How a prompt ended, by node what it put out."""

    model_config = ConfigDict(extra="ignore")
    outputs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    status: _Status | None = None

    @classmethod
    def heard(cls, outputs: dict[str, dict[str, Any]]) -> HistoryEntry:
        """What history would say of a success that was followed message by message."""
        return cls(outputs=outputs, status=_Status())

    def files(self, kinds: Collection[str] = ("output",)) -> list[OutputFile]:
        """Pictures and other files to keep, in the order of the history; previews (`temp`) only where they are asked for."""
        return [
            OutputFile(str(item["filename"]), str(item.get("subfolder", "")), item["type"], node_id)
            for node_id, output in self.outputs.items()
            for items in output.values()
            for item in (items if isinstance(items, list) else ())
            if isinstance(item, dict) and item.get("type") in kinds and "filename" in item
        ]

    @property
    def error(self) -> ErrorData | None:
        """The node's error; `status_str` is `error` for an interrupt too, so the last message decides."""
        if self.status is None or self.status.status_str != "error":
            return None
        for name, data in reversed(self.status.messages):
            if name == "execution_error":
                return ErrorData.model_validate(data)
        return None

    @property
    def has_succeeded(self) -> bool:
        """It says so itself; entries of very old versions say nothing."""
        return self.status is not None and self.status.status_str == "success"

    @property
    def has_failed(self) -> bool:
        """It says so itself, perhaps without a reason."""
        return self.status is not None and self.status.status_str == "error"

    @property
    def was_interrupted(self) -> bool:
        return bool(
            self.status
            and self.status.status_str == "error"
            and self.status.messages
            and self.status.messages[-1][0] == "execution_interrupted"
        )


class _PromptError(BaseModel):
    model_config = ConfigDict(extra="ignore")
    message: str = ""
    details: str = ""


class _PromptAnswer(BaseModel):
    model_config = ConfigDict(extra="ignore")
    error: _PromptError | None = None
    node_errors: dict[str, Any] = Field(default_factory=dict)


class _Metadata(RootModel[dict[str, Any]]):
    pass


class _Queue(BaseModel):
    """Each item begins with a number and the prompt's id."""

    model_config = ConfigDict(extra="ignore")
    queue_running: list[Annotated[list[Any], Field(min_length=2)]]
    queue_pending: list[Annotated[list[Any], Field(min_length=2)]]


T = TypeVar("T")

_QUEUE = TypeAdapter(_Queue)
_HISTORY = TypeAdapter(dict[str, HistoryEntry])
_CLASSES = TypeAdapter(dict[str, dict[str, Any]])
_OBJECT = TypeAdapter(dict[str, Any])
_NAMES = TypeAdapter(list[str])


class _Stored(BaseModel):
    model_config = ConfigDict(extra="ignore")
    name: str
    subfolder: str = ""


class _Timing(BaseModel):
    model_config = ConfigDict(extra="ignore")
    load_ms: float


class ComfyClient:
    """One instance's HTTP side. Raises InstanceUnreachable when nothing usable came back."""

    def __init__(self, url: str, session: aiohttp.ClientSession, *, timeout_s: float = 10.0, plain: PlainHttp | None = None) -> None:
        """`timeout_s` bounds every answer but a picture, which may take ten times as long while it does not pause.

        With `plain` the two requests that every job makes go that way, where the URL permits.
        """
        self.url = url
        self._session, self._plain = session, plain.host(url) if plain else None
        self._timeout_s, self._folder = timeout_s, urlsplit(url).path
        self._timeout = aiohttp.ClientTimeout(total=timeout_s, connect=5)
        self._picture_timeout = aiohttp.ClientTimeout(total=timeout_s * 10, connect=5, sock_read=timeout_s)

    async def _request(self, method: str, path: str, timeout: aiohttp.ClientTimeout | None = None, **kwargs: Any) -> tuple[int, bytes]:
        try:
            async with self._session.request(method, self.url + path, timeout=timeout or self._timeout, **kwargs) as response:
                return response.status, await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._unreachable(method, path, error) from error

    def _unreachable(self, method: str, path: str, error: Exception) -> InstanceUnreachable:
        return InstanceUnreachable(f"{self.url} did not answer {method} {path.partition('?')[0]}: {error or type(error).__name__}")

    async def _ask_plainly(self, method: str, path: str, body: bytes = b"", *, silence_s: float | None = None) -> tuple[int, bytes]:
        """The same without aiohttp, unless the answer is somewhere else. Bodies are JSON; with `silence_s` ten times as long may pass."""
        headers, timeout_s = {"Content-Type": "application/json"} if body else None, self._timeout_s * (10 if silence_s else 1)
        if self._plain is not None:
            try:
                answer = await self._plain.request(
                    method, self._folder + path, headers=headers, body=body, timeout_s=timeout_s, silence_s=silence_s
                )
            except (TimeoutError, OSError) as error:
                raise self._unreachable(method, path, error) from error
            if not answer.is_redirect:
                return answer
        timeout = self._picture_timeout if silence_s else self._timeout
        return await self._request(method, path, timeout, data=body or None, headers=headers)

    async def _read(self, path: str, shape: TypeAdapter[T]) -> T:
        """What lies there. A proxy may answer 200 with a page of its own or with nothing: that is an InstanceError as well."""
        status, body = await self._request("GET", path)
        if status != 200:
            raise InstanceError(f"{self.url} answered {status} to GET {path}")
        try:
            return shape.validate_json(body)
        except ValidationError as error:
            raise InstanceError(f"{self.url} answered GET {path} with something that no ComfyUI says") from error

    async def submit(self, prompt_id: str, client_id: str, graph: bytes) -> None:
        """Queue a graph (JSON) under our own id. A 200 that reports node errors dropped a branch, so it is a rejection too."""
        body = b'{"prompt_id":"%s","client_id":"%s","prompt":%s}' % (prompt_id.encode(), client_id.encode(), graph)
        status, raw = await self._ask_plainly("POST", "/prompt", body)
        try:
            answer = _PromptAnswer.model_validate_json(raw)
        except ValidationError as error:
            raise InstanceError(f"{self.url} answered {status} to POST /prompt with no JSON") from error
        if status == 200 and not answer.node_errors:
            return
        if status == 200 or status == 400:
            message = answer.error.message if answer.error else "a branch of the graph was refused"
            if answer.error and answer.error.details:
                message = f"{message} ({answer.error.details})"
            raise PromptRejected(message, node_errors=answer.node_errors, rest_is_queued=status == 200)
        raise InstanceError(f"{self.url} answered {status} to POST /prompt")

    async def queue(self) -> QueueState:
        answer = await self._read("/queue", _QUEUE)
        return QueueState(
            frozenset(str(item[1]) for item in answer.queue_running), frozenset(str(item[1]) for item in answer.queue_pending)
        )

    async def history(self, prompt_id: str) -> HistoryEntry | None:
        """How the prompt ended, or None while it has not (or is unknown)."""
        return (await self._read(f"/history/{prompt_id}", _HISTORY)).get(prompt_id)

    async def has_run(self) -> bool:
        """Whether its process has run anything, or is about to, as far as its queue and history tell."""
        # In this order: leaving the one and entering the other is one step.
        queue = await self.queue()
        newest = await self._read("/history?max_items=1", _HISTORY)
        return bool(queue.running or queue.pending or newest)

    async def view(self, file: OutputFile, *, companion: bool = False) -> bytes:
        """The bytes of a saved picture. The companion extension's route waits for a picture that is still being written."""
        path = f"{'/fluxgate/view' if companion else '/view'}?{urlencode(file.place(), quote_via=quote)}"
        status, body = await self._ask_plainly("GET", path, silence_s=self._timeout_s)
        if status != 200:
            raise OutputMissing(f"{self.url} announced {file.filename!r} but answers {status} for it")
        return body

    async def put_input(self, file: str, body: bytes, *, overwrite: bool = False) -> None:
        """Store a file, `FOLDER/NAME`, below the input folder. It must get exactly that name: the graph says so already."""
        folder, _, name = file.rpartition("/")
        # Names of ours need no quoting, and ComfyUI would not undo it.
        form = aiohttp.FormData(quote_fields=False)
        form.add_field("image", body, filename=name, content_type="application/octet-stream")
        for field, value in (("subfolder", folder), ("type", "input"), ("overwrite", "true" if overwrite else "false")):
            form.add_field(field, value)
        status, raw = await self._request("POST", "/upload/image", self._picture_timeout, data=form)
        if status != 200:
            raise InstanceError(f"{self.url} answered {status} to POST /upload/image")
        try:
            stored = _Stored.model_validate_json(raw)
        except ValidationError as error:
            raise InstanceError(f"{self.url} answered POST /upload/image with something that no ComfyUI says") from error
        if (stored.subfolder, stored.name) != (folder, name):
            raise InstanceError(f"{self.url} stored an input as {stored.subfolder}/{stored.name} instead of {file}")

    async def remove_input(self, file: str, *, companion: bool) -> None:
        """Take an input away. ComfyUI has no route for that: without our extension the file stays, but nothing is in it."""
        folder, _, name = file.rpartition("/")
        if companion:
            await self.remove_outputs([OutputFile(name, folder, "input")])
        else:
            await self.put_input(file, b"", overwrite=True)

    async def drop(self, prompt_id: str) -> None:
        """Take a waiting prompt out of the queue; nothing happens to any other."""
        await self._request("POST", "/queue", json={"delete": [prompt_id]})

    async def interrupt(self, prompt_id: str) -> None:
        """Stop this prompt if it is the one that runs."""
        await self._request("POST", "/interrupt", json={"prompt_id": prompt_id})

    async def free(self) -> None:
        """Let go of loaded models and cached results before the next prompt."""
        await self._request("POST", "/free", json={"unload_models": True, "free_memory": True})

    async def delete_history(self, prompt_ids: list[str]) -> None:
        await self._request("POST", "/history", json={"delete": prompt_ids})

    async def remove_outputs(self, files: list[OutputFile]) -> None:
        """Delete pictures that are stored elsewhere now. Only the companion extension can."""
        body = {"files": [file.place() for file in files], "remove_empty_folders": True}
        await self._request("DELETE", "/fluxgate/outputs", json=body)

    async def load_ms(self, prompt_id: str) -> int | None:
        """Milliseconds the prompt spent loading models, as the companion extension measured it."""
        status, body = await self._request("GET", f"/fluxgate/prompts/{prompt_id}")
        if status != 200:
            return None
        try:
            return round(_Timing.model_validate_json(body).load_ms)
        except ValidationError:
            return None

    async def object_info(self) -> dict[str, Any]:
        return await self._read("/object_info", _CLASSES)

    async def system_stats(self) -> dict[str, Any]:
        return await self._read("/system_stats", _OBJECT)

    async def model_names(self, folder: str) -> list[str]:
        return await self._read(f"/models/{folder}", _NAMES)

    async def model_metadata(self, folder: str, name: str) -> dict[str, Any]:
        """A safetensors file's own metadata; empty when it has none."""
        status, body = await self._request("GET", f"/view_metadata/{folder}", params={"filename": name})
        if status != 200 or not body:
            return {}
        try:
            return dict(_Metadata.model_validate_json(body).root)
        except ValidationError:
            return {}
