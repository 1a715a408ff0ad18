"""The routes under /fluxgate: parse, call, shape the answer. Errors are `{"error": text}`."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import mimetypes
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from . import host
from .files import FileName, FileRefused, FindFolder, parse_file_name, remove_entry, resolve_entry, resolve_file
from .heap import Heap
from .timing import PromptTimings
from .writes import WriteQueue

VERSION = "0.1.0"
VIEW_WAIT_S = 30.0
FILES_PER_REQUEST = 1000

log = logging.getLogger(__name__)


@dataclass
class Companion:
    """Everything the routes speak about. `features` tells which parts this ComfyUI took."""

    heap: Heap
    timings: PromptTimings
    writes: WriteQueue
    features: dict[str, bool] = field(default_factory=dict)
    find_folder: FindFolder = host.find_folder
    view_wait_s: float = VIEW_WAIT_S

    def add_routes(self, routes: web.RouteTableDef) -> None:
        routes.get("/fluxgate/status")(self.get_status)
        routes.get("/fluxgate/view")(self.view)
        routes.delete("/fluxgate/outputs")(self.delete_outputs)
        routes.get("/fluxgate/prompts/{prompt_id}")(self.get_prompt)

    async def get_status(self, _request: web.Request) -> web.Response:
        return web.json_response(
            {
                "version": VERSION,
                "features": self.features,
                "frozen_objects": gc.get_freeze_count(),
                "gc": self.heap.report(),
                "pending_writes": self.writes.pending,
                "vram": ask_or_none(host.describe_memory),
                "loaded_models": ask_or_none(host.describe_models) or [],
            }
        )

    async def get_prompt(self, request: web.Request) -> web.Response:
        prompt_id = request.match_info["prompt_id"]
        described = self.timings.describe(prompt_id)
        return fail(404, f"no timing of prompt {prompt_id}") if described is None else web.json_response(described)

    async def view(self, request: web.Request) -> web.StreamResponse:
        """The bytes of a file, once it is written."""
        query = request.query
        try:
            path = resolve_file(
                FileName(query.get("filename", ""), query.get("subfolder", ""), query.get("type", "output")), self.find_folder
            )
        except FileRefused as error:
            return fail(400, str(error))
        if not await self.wait_for_write(path):
            return fail(504, f"{path.name} is not written after {self.view_wait_s:g} s")
        if (failure := self.writes.find_failure(path)) is not None:
            return fail(500, f"{path.name} was not written: {failure}")
        if not path.is_file():
            return fail(404, f"no file {path.name} in {query.get('subfolder', '')!r} of {query.get('type', 'output')}")
        return web.FileResponse(path, headers={"Content-Type": choose_content_type(path), "X-Content-Type-Options": "nosniff"})

    async def delete_outputs(self, request: web.Request) -> web.Response:
        """Checks all names before it removes the first file; a file that is absent is no error."""
        try:
            names, remove_folders = parse_deletion(await request.json())
            found = [(name, resolve_entry(name, self.find_folder)) for name in names]
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            return fail(400, f"the body is no JSON: {error}")
        except FileRefused as error:
            return fail(400, str(error))
        removed = 0
        for name, path in found:
            if not await self.wait_for_write(path):
                return fail(504, f"{path.name} is not written after {self.view_wait_s:g} s; removed {removed} of {len(found)}")
            self.writes.forget_failure(path)
            try:
                removed += remove_entry(path, empty_folder_of=self.find_root(name) if remove_folders else None)
            except OSError as error:
                return fail(500, f"{path.name} was not removed: {error}; removed {removed} of {len(found)}")
        return web.json_response({"removed": removed, "absent": len(found) - removed})

    def find_root(self, name: FileName) -> Path | None:
        folder = self.find_folder(name.type)
        return None if folder is None else folder.resolve()

    async def wait_for_write(self, path: Path) -> bool:
        """False when it is still pending at the end. A client that leaves does not take the write with it."""
        pending = self.writes.find_pending(path)
        if pending is None:
            return True
        done, _ = await asyncio.wait({asyncio.wrap_future(pending)}, timeout=self.view_wait_s)
        return bool(done)


def parse_deletion(body: Any) -> tuple[list[FileName], bool]:
    """From `{"files": [...], "remove_empty_folders": false}`. Raises FileRefused."""
    files = body.get("files") if isinstance(body, dict) else None
    if not isinstance(files, list) or len(files) > FILES_PER_REQUEST:
        raise FileRefused(f"files is a list of at most {FILES_PER_REQUEST} objects with filename, subfolder and type")
    return [parse_file_name(item) for item in files], body.get("remove_empty_folders") is True


def choose_content_type(path: Path) -> str:
    """Pictures, videos and sounds by name; anything else is bytes, so that no page of ComfyUI's origin runs it."""
    guessed = mimetypes.guess_type(path.name)[0] or ""
    passive = guessed.startswith(("image/", "video/", "audio/")) and guessed != "image/svg+xml"
    return guessed if passive else "application/octet-stream"


def fail(status: int, message: str) -> web.Response:
    return web.json_response({"error": message}, status=status)


def ask_or_none(ask: Callable[[], Any]) -> Any:
    """What ComfyUI says of itself, or None where it has no such function."""
    try:
        return ask()
    except Exception as error:  # noqa: BLE001  # boundary: inner functions change with versions; the rest of the status stands
        log.debug("fluxgate: %s failed: %s", ask.__name__, error)
        return None
