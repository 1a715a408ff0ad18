"""The routes of the companion extension over real sockets, with its own queue and a folder, without a ComfyUI."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.companion_parts import FINAL, load_part


@asynccontextmanager
async def serve(companion: Any) -> AsyncIterator[aiohttp.ClientSession]:
    app, routes = web.Application(), web.RouteTableDef()
    companion.add_routes(routes)
    app.add_routes(routes)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]  # asyncio's server has them
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as http:
        yield http
    await runner.cleanup()


@pytest.fixture
def companion(tmp_path: Path) -> Iterator[Any]:
    part, queue = load_part, load_part("writes").WriteQueue(workers=1)
    timings = part("timing").PromptTimings()
    yield part("routes").Companion(part("heap").Heap(timings.is_idle), timings, queue, {}, {"output": tmp_path}.get, view_wait_s=10)
    queue.close()


async def ask(http: aiohttp.ClientSession, method: str, path: str, **options: Any) -> tuple[int, Any]:
    async with http.request(method, path, **options) as response:
        body = await response.read()
        return response.status, json.loads(body) if response.content_type == "application/json" else body


async def test_a_view_waits_for_the_picture(companion: Any, tmp_path: Path) -> None:
    go, path = threading.Event(), tmp_path / FINAL

    def write() -> None:
        go.wait(10)
        path.write_bytes(b"picture")

    companion.writes.submit(path, 1, write)
    async with serve(companion) as http:
        left = asyncio.create_task(ask(http, "GET", "/fluxgate/view", params={"filename": FINAL}))
        kept = asyncio.create_task(ask(http, "GET", "/fluxgate/view", params={"filename": FINAL, "type": "output"}))
        await asyncio.sleep(0.05)
        left.cancel()  # who leaves does not take the write away from the other
        assert (await ask(http, "GET", "/fluxgate/status"))[1]["pending_writes"] == 1
        go.set()
        assert await kept == (200, b"picture")


async def test_a_view_says_what_went_wrong(companion: Any, tmp_path: Path) -> None:
    companion.writes.submit(tmp_path / FINAL, 1, lambda: 1 / 0)
    async with serve(companion) as http:
        for _ in range(2):
            status, body = await ask(http, "GET", "/fluxgate/view", params={"filename": FINAL})
            assert (status, body) == (500, {"error": f"{FINAL} was not written: ZeroDivisionError: division by zero"})
        assert (await ask(http, "GET", "/fluxgate/view", params={"filename": "absent.png"}))[0] == 404
        assert (await ask(http, "GET", "/fluxgate/view", params={"filename": "..", "subfolder": "a"}))[0] == 400
        assert (await ask(http, "GET", "/fluxgate/view"))[0] == 400


async def test_a_view_gives_up_on_a_write_that_hangs(companion: Any, tmp_path: Path) -> None:
    go, companion.view_wait_s = threading.Event(), 0.05
    companion.writes.submit(tmp_path / FINAL, 1, lambda: go.wait(10))
    async with serve(companion) as http:
        status, body = await ask(http, "GET", "/fluxgate/view", params={"filename": FINAL})
        go.set()
    assert (status, body) == (504, {"error": f"{FINAL} is not written after 0.05 s"})


@pytest.mark.parametrize(
    ("filename", "content_type"), [("a.png", "image/png"), ("a.svg", "application/octet-stream"), ("a.html", "application/octet-stream")]
)
async def test_only_passive_content_has_a_type(companion: Any, tmp_path: Path, filename: str, content_type: str) -> None:
    (tmp_path / filename).write_bytes(b"x")
    async with serve(companion) as http, http.get("/fluxgate/view", params={"filename": filename}) as response:
        assert (response.content_type, response.headers["X-Content-Type-Options"]) == (content_type, "nosniff")


async def test_files_are_removed_and_absent_ones_counted(companion: Any, tmp_path: Path) -> None:
    for name in ("jobs/j1/a.png", "jobs/j1/b.png", "jobs/j2/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    files = [{"filename": name, "subfolder": "jobs/j1", "type": "output"} for name in ("a.png", "b.png", "c.png")]
    async with serve(companion) as http:
        assert await ask(http, "DELETE", "/fluxgate/outputs", json={"files": files[:1]}) == (200, {"removed": 1, "absent": 0})
        body = {"files": files, "remove_empty_folders": True}
        assert await ask(http, "DELETE", "/fluxgate/outputs", json=body) == (200, {"removed": 1, "absent": 2})
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["j2"]


async def test_a_pending_picture_is_removed_once_it_is_written_and_a_failure_is_forgotten(companion: Any, tmp_path: Path) -> None:
    path, broken = tmp_path / FINAL, tmp_path / "broken.png"
    companion.writes.submit(broken, 1, lambda: 1 / 0)
    companion.writes.submit(path, 1, lambda: path.write_bytes(b"x"))
    files = [{"filename": FINAL}, {"filename": "broken.png"}]
    async with serve(companion) as http:
        assert await ask(http, "DELETE", "/fluxgate/outputs", json={"files": files}) == (200, {"removed": 1, "absent": 1})
        assert (await ask(http, "GET", "/fluxgate/view", params={"filename": "broken.png"}))[0] == 404
    assert not path.exists()


@pytest.mark.parametrize(
    "body", [b"no json", b"[]", b"{}", b'{"files": "a"}', b'{"files": [{"filename": "kept.png"}, {"filename": "../x"}]}', b"\xff"]
)
async def test_a_bad_deletion_removes_nothing(companion: Any, tmp_path: Path, body: bytes) -> None:
    (tmp_path / "kept.png").write_bytes(b"x")
    async with serve(companion) as http:
        status, answer = await ask(http, "DELETE", "/fluxgate/outputs", data=body)
    assert (status, list(answer)) == (400, ["error"])
    assert (tmp_path / "kept.png").exists()


async def test_the_status_stands_where_comfyui_tells_nothing(companion: Any) -> None:
    async with serve(companion) as http:
        status, body = await ask(http, "GET", "/fluxgate/status")
        assert (await ask(http, "GET", "/fluxgate/prompts/unknown"))[0] == 404
    assert status == 200
    assert (body["vram"], body["loaded_models"], body["pending_writes"]) == (None, [], 0)
