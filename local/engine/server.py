"""ComfyUI's HTTP routes and its socket in front of one engine.
It knows the wire, and refuses to know how a prompt is run."""

import ipaddress
import json
import os
import sys
import uuid
from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from local.engine.engine import Engine
from local.engine.files import FileRoutes
from local.engine.nodes import describe_node
from local.engine.sockets import SERVER_FEATURES
from local.engine.validation import validate_graph

COMFYUI_VERSION = "0.3.64"  # whose wire this is
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

NO_PROMPT = {"type": "no_prompt", "message": "No prompt provided", "details": "No prompt provided", "extra_info": {}}


def create_app(engine: Engine) -> web.Application:
    """Every route, each also under /api."""
    routes, files = Routes(engine), FileRoutes(engine.folders)
    app = web.Application(client_max_size=SERVER_FEATURES["max_upload_size"], middlewares=[refuse_foreign_origin])
    table: list[tuple[str, str, Handler]] = [
        ("GET", "/ws", routes.socket),
        ("GET", "/prompt", routes.queue_info),
        ("POST", "/prompt", routes.submit),
        ("GET", "/queue", routes.queue),
        ("POST", "/queue", routes.change_queue),
        ("POST", "/interrupt", routes.interrupt),
        ("POST", "/free", routes.free),
        ("GET", "/history", routes.history),
        ("POST", "/history", routes.change_history),
        ("GET", "/history/{prompt_id}", routes.history_of),
        ("GET", "/object_info", routes.object_info),
        ("GET", "/object_info/{node_class}", routes.object_info_of),
        ("GET", "/models", routes.model_folders),
        ("GET", "/models/{folder}", routes.models),
        ("GET", "/embeddings", routes.embeddings),
        ("GET", "/extensions", routes.extensions),
        ("GET", "/features", routes.features),
        ("GET", "/system_stats", routes.system_stats),
        ("GET", "/view", files.view),
        ("GET", "/view_metadata/{folder}", files.view_metadata),
        ("POST", "/upload/image", files.upload_image),
        ("POST", "/upload/mask", files.upload_mask),
    ]
    for method, path, handler in table:
        for prefixed in (path, "/api" + path):
            app.router.add_route(method, prefixed, handler)
    app.router.add_get("/", routes.root)
    return app


class Routes:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._number = 0

    async def root(self, request: web.Request) -> web.Response:
        return web.Response(text="Fluxgate's built-in small model. It speaks ComfyUI's wire; there is no editor here.\n")

    async def socket(self, request: web.Request) -> web.StreamResponse:
        return await self._engine.sockets.serve(request, self._engine.queue_info(), self._engine.executor.running_node)

    async def queue_info(self, request: web.Request) -> web.Response:
        return web.json_response(self._engine.queue_info())

    async def submit(self, request: web.Request) -> web.Response:
        """Malformed bodies raise and become ComfyUI's plain 500."""
        body: Any = await request.json()
        if "prompt" not in body:
            return web.json_response({"error": NO_PROMPT, "node_errors": {}}, status=400)
        number = self._choose_number(body)
        prompt_id = str(body.get("prompt_id", uuid.uuid4()))
        verdict = validate_graph(body["prompt"], body.get("partial_execution_targets"), self._engine.classes, self._engine.folders)
        if verdict.error is not None:
            return web.json_response({"error": verdict.error, "node_errors": verdict.node_errors}, status=400)
        extra_data = dict(body.get("extra_data", {}))
        if "client_id" in body:
            extra_data["client_id"] = body["client_id"]
        self._engine.queue.put((number, prompt_id, body["prompt"], extra_data, verdict.outputs))
        return web.json_response({"prompt_id": prompt_id, "number": number, "node_errors": verdict.node_errors})

    async def queue(self, request: web.Request) -> web.Response:
        return web.json_response(self._engine.queue.snapshot())

    async def change_queue(self, request: web.Request) -> web.Response:
        body: Any = await request.json()
        if body.get("clear"):
            self._engine.queue.clear()
        for prompt_id in body.get("delete", ()):
            self._engine.queue.delete(prompt_id)
        return web.Response()

    async def interrupt(self, request: web.Request) -> web.Response:
        """Whatever runs, or only the prompt named in the body; a body that is no JSON counts as empty."""
        try:
            body: Any = await request.json()
        except json.JSONDecodeError:
            body = {}
        wanted = body.get("prompt_id")
        if not wanted or wanted == self._engine.queue.running_id():
            self._engine.executor.interrupt()
        return web.Response()

    async def free(self, request: web.Request) -> web.Response:
        body: Any = await request.json()
        for flag in ("unload_models", "free_memory"):
            if body.get(flag, False):
                self._engine.queue.raise_flag(flag)
        return web.Response()

    async def history(self, request: web.Request) -> web.Response:
        max_items = request.query.get("max_items")
        offset = int(request.query.get("offset", "-1"))
        return web.json_response(self._engine.queue.history(int(max_items) if max_items is not None else None, offset))

    async def history_of(self, request: web.Request) -> web.Response:
        return web.json_response(self._engine.queue.history_of(request.match_info["prompt_id"]))

    async def change_history(self, request: web.Request) -> web.Response:
        body: Any = await request.json()
        if body.get("clear"):
            self._engine.queue.forget_all()
        for prompt_id in body.get("delete", ()):
            self._engine.queue.forget(prompt_id)
        return web.Response()

    async def object_info(self, request: web.Request) -> web.Response:
        folders = self._engine.folders
        return web.json_response({name: describe_node(name, node, folders) for name, node in self._engine.classes.items()})

    async def object_info_of(self, request: web.Request) -> web.Response:
        name = request.match_info["node_class"]
        node = self._engine.classes.get(name)
        return web.json_response({} if node is None else {name: describe_node(name, node, self._engine.folders)})

    async def model_folders(self, request: web.Request) -> web.Response:
        return web.json_response(self._engine.folders.kinds())

    async def models(self, request: web.Request) -> web.Response:
        folder = request.match_info["folder"]
        if folder not in self._engine.folders.kinds():
            return web.Response(status=404)
        return web.json_response(self._engine.folders.names(folder))

    async def embeddings(self, request: web.Request) -> web.Response:
        return web.json_response([name.rsplit(".", 1)[0] for name in self._engine.folders.names("embeddings")])

    async def extensions(self, request: web.Request) -> web.Response:
        return web.json_response([])

    async def features(self, request: web.Request) -> web.Response:
        return web.json_response(SERVER_FEATURES)

    async def system_stats(self, request: web.Request) -> web.Response:
        return web.json_response(describe_system())

    def _choose_number(self, body: Any) -> float:
        """Lower runs first; a number of the client's own does not count."""
        if "number" in body:
            return float(body["number"])
        number = -self._number if body.get("front") else self._number
        self._number += 1
        return number


def describe_system() -> dict[str, Any]:
    """ComfyUI's shape, and a field that says what really answers. Memory in bytes."""
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    total, free = (os.sysconf(name) * page_bytes for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    system = {
        "os": os.name,
        "ram_total": total,
        "ram_free": free,
        "comfyui_version": COMFYUI_VERSION,
        "fluxgate_engine": "built-in small model",
        "required_frontend_version": None,
        "python_version": sys.version,
        "pytorch_version": _torch_version(),
        "embedded_python": False,
        "argv": sys.argv,
    }
    memory = {"vram_total": total, "vram_free": free, "torch_vram_total": total, "torch_vram_free": free}
    return {"system": system, "devices": [{"name": "cpu", "type": "cpu", "index": None, **memory}]}


@web.middleware
async def refuse_foreign_origin(request: web.Request, handler: Handler) -> web.StreamResponse:
    """403 for a page of another site that talks to a loopback address through its visitor's browser."""
    host, origin = request.headers.get("Host"), request.headers.get("Origin")
    if host and origin and _is_loopback(urlsplit(f"//{host}").hostname):
        ours, theirs = urlsplit(f"//{host.lower()}"), urlsplit(origin.lower())
        same = ours.hostname == theirs.hostname if None in (ours.port, theirs.port) else ours.netloc == theirs.netloc
        if theirs.hostname and not same:
            return web.Response(status=403)
    return await handler(request)


def _is_loopback(hostname: str | None) -> bool:
    if hostname is None:
        return False
    try:
        return ipaddress.ip_address(hostname).is_loopback
    except ValueError:
        return hostname == "localhost"


def _torch_version() -> str | None:
    try:
        return version("torch")
    except PackageNotFoundError:
        return None
