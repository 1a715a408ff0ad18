"""`python -m bench.simulated --ports 20001,20002,...`: many cheap instances in one process, each on a port of its own.

They speak ComfyUI's wire as far as a dispatcher listens to it, and run the workflow `ticking`: a prompt sleeps. A progress message
carries the time it was sent at as its `value`, so that whoever gets it at the other end of a gateway knows how long it took.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import random
import time
from collections import OrderedDict, deque
from typing import Any

from aiohttp import web
from PIL import Image

# Progress values are microseconds of the monotonic clock, modulo this: a whole number that any JSON reader keeps exact.
WRAP_US = 1_000_000_000
HISTORY = 1000
CLASSES = ("EmptyImage", "BenchTicks", "SaveImage")
OBJECT_INFO = {name: {"input": {"required": {}}, "output_node": name == "SaveImage"} for name in CLASSES}


def stamp_us() -> int:
    """Now, as progress messages tell it."""
    return time.monotonic_ns() // 1000 % WRAP_US


def make_picture() -> bytes:
    """What every prompt makes."""
    target = io.BytesIO()
    Image.new("RGB", (64, 64)).save(target, "PNG")
    return target.getvalue()


class Gate:
    """Ticks wait behind it until it opens."""

    def __init__(self, *, held: bool) -> None:
        self.open = asyncio.Event()
        if not held:
            self.open.set()


class SimulatedInstance:
    """One ComfyUI: a queue, a history, one socket per client. Runs `at_once` prompts at a time; a real one runs one."""

    def __init__(self, gate: Gate, at_once: int) -> None:
        self._gate, self._at_once = gate, at_once
        self.pending: deque[tuple[str, str, dict[str, Any]]] = deque()
        self.running: dict[str, asyncio.Task[None]] = {}
        self.history: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self.sockets: dict[str, web.WebSocketResponse] = {}
        self._number = 0

    def submit(self, body: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        self.pending.append((body["prompt_id"], body["client_id"], body["prompt"]))
        self._start_next()
        return {"prompt_id": body["prompt_id"], "number": self._number, "node_errors": {}}

    def describe_queue(self) -> dict[str, Any]:
        return {
            "queue_running": [[0, prompt_id] for prompt_id in self.running],
            "queue_pending": [[0, prompt_id] for prompt_id, *_ in self.pending],
        }

    def drop(self, prompt_ids: list[str]) -> None:
        self.pending = deque(item for item in self.pending if item[0] not in prompt_ids)

    def interrupt(self, prompt_id: str) -> None:
        if task := self.running.get(prompt_id):
            task.cancel()

    def _start_next(self) -> None:
        while self.pending and len(self.running) < self._at_once:
            prompt_id, client_id, graph = self.pending.popleft()
            self.running[prompt_id] = asyncio.create_task(self._run(prompt_id, client_id, graph))

    async def _run(self, prompt_id: str, client_id: str, graph: dict[str, Any]) -> None:
        async def tell(kind: str, **data: Any) -> None:
            if socket := self.sockets.get(client_id):
                with contextlib.suppress(ConnectionError):
                    await socket.send_str(json.dumps({"type": kind, "data": {**data, "prompt_id": prompt_id}}))

        outputs: dict[str, Any] = {}
        ending = "execution_interrupted"
        try:
            await tell("execution_start", timestamp=time.time_ns() // 1_000_000)
            await tell("execution_cached", nodes=[])
            for node, inputs in ((name, graph[name]["inputs"]) for name in sorted(graph)):
                await tell("executing", node=node)
                if "ticks" in inputs:
                    await self._tick(tell, node, inputs["seconds"], inputs["ticks"])
                elif "filename_prefix" in inputs:
                    image = {"filename": "image_00001_.png", "subfolder": inputs["filename_prefix"].rpartition("/")[0], "type": "output"}
                    outputs[node] = {"images": [image]}
                    await tell("executed", node=node, output=outputs[node])
            ending = "execution_success"
        except asyncio.CancelledError:
            pass
        await tell(ending)
        status = {"status_str": "success" if ending == "execution_success" else "error", "completed": True, "messages": [[ending, {}]]}
        self.history[prompt_id] = {"outputs": outputs, "status": status}
        while len(self.history) > HISTORY:
            self.history.popitem(last=False)
        del self.running[prompt_id]
        self._start_next()
        await tell("executing", node=None)

    async def _tick(self, tell: Any, node: str, seconds: float, ticks: int) -> None:
        if not ticks:
            await asyncio.sleep(seconds)
            return
        await self._gate.open.wait()
        every_s, loop = seconds / ticks, asyncio.get_running_loop()
        # Prompts do not tick in step.
        due = loop.time() + random.uniform(0, every_s)
        for number in range(1, ticks + 1):
            await asyncio.sleep(max(0.0, due - loop.time()))
            due += every_s
            await tell("progress_state", nodes={node: {"value": number, "max": ticks, "state": "running", "node_id": node}})
            await tell("progress", value=stamp_us(), max=WRAP_US, node=node)
        # All have ticked before the first of them ends.
        await asyncio.sleep(2 * every_s)


class Wire:
    """The routes; which instance is meant is told by the port."""

    def __init__(self, ports: list[int], at_once: int, *, held: bool) -> None:
        self._gate, self._picture = Gate(held=held), make_picture()
        self._instances = {port: SimulatedInstance(self._gate, at_once) for port in ports}

    def _instance(self, request: web.Request) -> SimulatedInstance:
        assert request.transport is not None
        return self._instances[request.transport.get_extra_info("sockname")[1]]

    def make_app(self) -> web.Application:
        app = web.Application()
        for method, path, handler in (
            ("GET", "/ws", self.socket),
            ("POST", "/prompt", self.submit),
            ("GET", "/queue", self.queue),
            ("POST", "/queue", self.change_queue),
            ("POST", "/interrupt", self.interrupt),
            ("POST", "/free", self.say_nothing),
            ("GET", "/history/{prompt_id}", self.history_of),
            ("POST", "/history", self.change_history),
            ("GET", "/view", self.view),
            ("GET", "/object_info", self.object_info),
            ("GET", "/system_stats", self.system_stats),
            ("GET", "/models/{folder}", self.models),
            ("POST", "/bench/start", self.start),
        ):
            app.router.add_route(method, path, handler)
        return app

    async def socket(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(compress=False)
        await socket.prepare(request)
        sockets, client_id = self._instance(request).sockets, request.query["clientId"]
        sockets[client_id] = socket
        await socket.send_json({"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 0}}, "sid": client_id}})
        try:
            async for _ in socket:
                continue
        finally:
            sockets.pop(client_id, None)
        return socket

    async def submit(self, request: web.Request) -> web.Response:
        return web.json_response(self._instance(request).submit(json.loads(await request.read())))

    async def queue(self, request: web.Request) -> web.Response:
        return web.json_response(self._instance(request).describe_queue())

    async def change_queue(self, request: web.Request) -> web.Response:
        self._instance(request).drop(json.loads(await request.read()).get("delete", []))
        return web.Response()

    async def interrupt(self, request: web.Request) -> web.Response:
        self._instance(request).interrupt(json.loads(await request.read()).get("prompt_id", ""))
        return web.Response()

    async def say_nothing(self, request: web.Request) -> web.Response:
        return web.Response()

    async def history_of(self, request: web.Request) -> web.Response:
        prompt_id, history = request.match_info["prompt_id"], self._instance(request).history
        return web.json_response({prompt_id: history[prompt_id]} if prompt_id in history else {})

    async def change_history(self, request: web.Request) -> web.Response:
        history = self._instance(request).history
        for prompt_id in json.loads(await request.read()).get("delete", []):
            history.pop(prompt_id, None)
        return web.Response()

    async def view(self, request: web.Request) -> web.Response:
        return web.Response(body=self._picture, content_type="image/png")

    async def object_info(self, request: web.Request) -> web.Response:
        return web.json_response(OBJECT_INFO)

    async def system_stats(self, request: web.Request) -> web.Response:
        system = {"comfyui_version": "0.3.64", "fluxgate_engine": "simulated"}
        return web.json_response({"system": system, "devices": [{"name": "none", "vram_total": 0, "vram_free": 0}]})

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response([])

    async def start(self, request: web.Request) -> web.Response:
        """Let the ticks begin."""
        self._gate.open.set()
        return web.Response()


async def serve(ports: list[int], at_once: int, *, held: bool) -> None:
    """Until killed."""
    runner = web.AppRunner(Wire(ports, at_once, held=held).make_app(), access_log=None)
    await runner.setup()
    for port in ports:
        await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.simulated", description="Simulated instances on ComfyUI's wire.")
    parser.add_argument("--ports", required=True, help="one instance on each, comma separated")
    parser.add_argument("--at-once", type=int, default=1, help="prompts an instance runs at a time (default 1, as ComfyUI does)")
    parser.add_argument("--held", action="store_true", help="no ticks until POST /bench/start")
    arguments = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve([int(port) for port in arguments.ports.split(",")], arguments.at_once, held=arguments.held))


if __name__ == "__main__":
    main()
