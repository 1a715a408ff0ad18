"""The companion extension's own parts, loaded by path as ComfyUI loads them, without a ComfyUI."""

import asyncio
import gc
import importlib
import importlib.util
import io
import json
import logging
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from PIL import Image

FOLDER = Path(__file__).parents[1] / "docker" / "comfyui" / "custom_nodes" / "fluxgate"
NAME = "fluxgate_companion"
FINAL = "image_00001_.png"
Part = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def part() -> Iterator[Part]:
    """Gives a module of the extension by its file name."""
    spec = importlib.util.spec_from_file_location(NAME, FOLDER / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = package
    spec.loader.exec_module(package)
    yield lambda name: importlib.import_module(f"{NAME}.{name}")
    for name in [name for name in sys.modules if name.split(".")[0] == NAME]:
        del sys.modules[name]


@pytest.fixture
def queue(part: Part) -> Iterator[Any]:
    queue = part("writes").WriteQueue(workers=1, limit_bytes=100, failures_kept=2)
    yield queue
    queue.close()


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_without_comfyui_every_part_is_off_and_says_so_in_one_line(part: Part, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert part("install").install() == ({}, {})
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 6
    assert "fluxgate: prompt_timing is off: this ComfyUI has no module execution" in lines
    assert all("\n" not in line for line in lines)


def test_a_moved_attribute_is_named(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "folder_paths", ModuleType("folder_paths"))
    with pytest.raises(part("host").HostLacks, match=r"no folder_paths\.get_output_directory"):
        part("host").find_folder("output")


# Names


@pytest.mark.parametrize(
    ("filename", "subfolder", "folder_type"),
    [
        ("../secret", "", "output"),
        ("..", "", "output"),
        ("", "a", "output"),
        (".", "a", "output"),
        ("/etc/passwd", "", "output"),
        ("a\\b", "", "output"),
        ("secret", "..", "output"),
        ("secret", "a/../..", "output"),
        ("passwd", "/etc", "output"),
        ("secret", "../output-twin", "output"),
        ("image.png", "", "models"),
        ("image.png", "link", "output"),
        ("link.png", "", "output"),
        ("a\0.png", "", "output"),
        ("a.png", "\0", "output"),
    ],
)
def test_a_name_that_leaves_its_folder_is_refused(part: Part, tmp_path: Path, filename: str, subfolder: str, folder_type: str) -> None:
    files, output = part("files"), tmp_path / "output"
    output.mkdir()
    (tmp_path / "output-twin").mkdir()
    (tmp_path / "secret").write_text("x")
    (output / "link").symlink_to(tmp_path)
    (output / "link.png").symlink_to(tmp_path / "secret")
    name = files.FileName(filename, subfolder, folder_type)
    for resolve in (files.resolve_file, files.resolve_entry):
        with pytest.raises(files.FileRefused):
            resolve(name, {"output": output}.get)


def test_a_name_inside_resolves_also_where_the_folder_itself_is_a_link(part: Part, tmp_path: Path) -> None:
    files = part("files")
    (tmp_path / "disk" / "jobs").mkdir(parents=True)
    (tmp_path / "output").symlink_to(tmp_path / "disk")
    found = files.resolve_file(files.FileName(FINAL, "jobs"), {"output": tmp_path / "output"}.get)
    assert found == tmp_path / "disk" / "jobs" / FINAL


def test_removing_a_link_leaves_its_target(part: Part, tmp_path: Path) -> None:
    files = part("files")
    (tmp_path / "kept.png").write_bytes(b"kept")
    (tmp_path / "link.png").symlink_to(tmp_path / "kept.png")
    assert files.remove_entry(files.resolve_entry(files.FileName("link.png"), {"output": tmp_path}.get))
    assert [path.name for path in tmp_path.iterdir()] == ["kept.png"]


@pytest.mark.parametrize("item", ["image.png", {"filename": 1}, {"filename": "a", "subfolder": None}, {"filename": "a", "type": []}])
def test_a_malformed_file_is_refused(part: Part, item: Any) -> None:
    with pytest.raises(part("files").FileRefused):
        part("files").parse_file_name(item)


def test_numbers_are_reserved_on_disk_so_that_two_prompts_never_share_one(part: Part, tmp_path: Path) -> None:
    files = part("files")
    assert files.reserve_number(tmp_path, "image", 1, "png") == (1, tmp_path / FINAL)
    assert files.reserve_number(tmp_path, "image", 1, "png")[0] == 2
    files.write_reserved(tmp_path / FINAL, lambda: b"png")
    assert files.reserve_number(tmp_path, "image", 1, "png")[0] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [FINAL, "image_00002_.png.part", "image_00003_.png.part"]


def test_a_failed_write_leaves_nothing(part: Part, tmp_path: Path) -> None:
    files = part("files")
    _, final = files.reserve_number(tmp_path, "image", 1, "png")

    def encode() -> bytes:
        raise ValueError("no encoder")

    with pytest.raises(ValueError, match="no encoder"):
        files.write_reserved(final, encode)
    assert list(tmp_path.iterdir()) == []


# Writes


def test_a_write_is_pending_until_it_is_done(queue: Any) -> None:
    go, path = threading.Event(), Path("/a")
    queue.submit(path, 1, lambda: go.wait(10))
    assert queue.pending == 1
    pending = queue.find_pending(path)
    go.set()
    assert pending.result(10) is None
    assert (queue.pending, queue.find_pending(path), queue.find_failure(path)) == (0, None, None)


def test_a_failure_is_remembered_until_it_is_forgotten_or_mended(queue: Any) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    for path, write in ((Path("/b"), fail), (Path("/c"), fail), (Path("/c"), lambda: None)):
        queue.submit(path, 100, write)
        queue.wait_for_room(100)  # until it is written
    assert queue.find_failure(Path("/c")) is None
    assert queue.find_failure(Path("/b")) == "OSError: [Errno 28] No space left on device"
    queue.forget_failure(Path("/b"))
    assert queue.find_failure(Path("/b")) is None


def test_only_the_last_failures_are_kept(queue: Any) -> None:
    for path in (Path("/a"), Path("/b"), Path("/c")):
        queue.submit(path, 1, lambda: 1 / 0)
    queue.close()
    assert [queue.find_failure(path) is None for path in (Path("/a"), Path("/b"), Path("/c"))] == [True, False, False]


def test_a_full_queue_holds_the_caller_back_until_there_is_room(queue: Any) -> None:
    go, waited = threading.Event(), []
    queue.submit(Path("/a"), 90, lambda: go.wait(10))
    queue.wait_for_room(10)  # fits exactly

    def check_interrupt() -> None:
        waited.append(queue.pending)
        go.set()

    queue.wait_for_room(11, check_interrupt)
    assert waited[0] == 1
    assert queue.pending == 0


def test_a_picture_above_the_limit_passes_alone(queue: Any) -> None:
    queue.wait_for_room(1000)
    queue.submit(Path("/a"), 1000, lambda: None)
    queue.wait_for_room(1000)
    assert queue.pending == 0


def test_an_interrupt_ends_the_waiting(queue: Any) -> None:
    go = threading.Event()
    queue.submit(Path("/a"), 100, lambda: go.wait(10))

    def check_interrupt() -> None:
        raise KeyError("interrupted")

    with pytest.raises(KeyError):
        queue.wait_for_room(1, check_interrupt)
    go.set()


# Pictures


@pytest.mark.parametrize(("picture_format", "channels"), [("png", 3), ("png", 4), ("webp", 3), ("webp", 4), ("jpeg", 3), ("jpeg", 4)])
def test_pixels_become_a_picture_of_that_format(part: Part, picture_format: str, channels: int) -> None:
    pixels = np.full((4, 6, channels), 200, np.uint8)
    data = part("encoding").encode(pixels, picture_format, quality=90, compress_level=1, text={})
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == (picture_format.upper(), (6, 4))
        assert image.mode == ("RGB" if picture_format == "jpeg" or channels == 3 else "RGBA")
        if picture_format == "png":
            assert np.array_equal(np.asarray(image), pixels)


def test_quality_and_compression_count(part: Part) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8) // 32 * 32

    def measure(picture_format: str, **options: int) -> int:
        return len(part("encoding").encode(pixels, picture_format, **{"quality": 90, "compress_level": 4, **options}, text={}))

    assert measure("webp", quality=20) < measure("webp", quality=95)
    assert measure("jpeg", quality=20) < measure("jpeg", quality=95)
    assert measure("png", compress_level=9) < measure("png", compress_level=0)


def test_a_png_carries_the_graph_and_each_extra_key(part: Part) -> None:
    text = part("encoding").collect_text({"1": {}}, {"workflow": {"a": 1}, "job": "j1"})
    data = part("encoding").encode(np.zeros((2, 2, 3), np.uint8), "png", quality=90, compress_level=4, text=text)
    with Image.open(io.BytesIO(data)) as image:
        assert {name: json.loads(value) for name, value in image.info.items()} == {"prompt": {"1": {}}, "workflow": {"a": 1}, "job": "j1"}
    assert part("encoding").collect_text(None, None) == {}


# Timings


def test_load_and_execution_add_up_to_the_whole(part: Part) -> None:
    clock = Clock()
    timings = part("timing").PromptTimings(read_clock_s=clock)
    assert timings.is_idle()
    with timings.time_prompt("p"):
        assert not timings.is_idle()
        with timings.time_node("1", "UNETLoader"), timings.time_load():
            clock.now_s += 2
            with timings.time_load():  # a loader that moves its weights at once is not counted twice
                clock.now_s += 1
        with timings.time_node("2", "KSampler"):
            with timings.time_load():
                clock.now_s += 0.5
            clock.now_s += 4
            assert timings.describe("p")["done"] is False
        clock.now_s += 0.25
    clock.now_s += 100
    assert timings.is_idle()
    assert timings.describe("p") == {
        "prompt_id": "p", "done": True, "load_ms": 3500.0, "execution_ms": 4250.0,
        "nodes": [
            {"id": "1", "class": "UNETLoader", "ms": 3000.0, "load_ms": 3000.0},
            {"id": "2", "class": "KSampler", "ms": 4500.0, "load_ms": 500.0},
        ],
    }  # fmt: skip


def test_a_failing_prompt_is_timed_and_the_next_one_starts_clean(part: Part) -> None:
    clock = Clock()
    timings = part("timing").PromptTimings(read_clock_s=clock)

    def load() -> None:
        clock.now_s += 1
        raise KeyError

    with pytest.raises(KeyError), timings.time_prompt("p"), timings.time_node("1", "Loader"), timings.time_load():
        load()
    assert timings.describe("p")["load_ms"] == 1000
    with timings.time_prompt("q"), timings.time_load():
        clock.now_s += 2
    assert timings.describe("q")["load_ms"] == 2000


def test_loading_outside_a_prompt_or_on_another_thread_is_not_the_prompts(part: Part) -> None:
    clock = Clock()
    timings = part("timing").PromptTimings(read_clock_s=clock)
    with timings.time_load():
        clock.now_s += 1

    def load() -> None:
        with timings.time_load():
            clock.now_s += 1

    with timings.time_prompt("p"):
        other = threading.Thread(target=load)
        other.start()
        other.join()
    assert timings.describe("p")["load_ms"] == 0


def test_only_the_last_prompts_are_kept_and_a_repeated_id_counts_as_new(part: Part) -> None:
    timings = part("timing").PromptTimings(kept=2)
    for prompt_id in ("a", "b", "a", "c"):
        with timings.time_prompt(prompt_id):
            pass
    assert [timings.describe(prompt_id) is None for prompt_id in "abc"] == [False, True, False]


def test_the_nodes_of_one_prompt_are_bounded(part: Part) -> None:
    timings = part("timing").PromptTimings()
    with timings.time_prompt("p"):
        for number in range(part("timing").NODES_KEPT + 1):
            with timings.time_node(str(number), "Loop"):
                pass
    assert len(timings.describe("p")["nodes"]) == part("timing").NODES_KEPT


# Heap


class Cycle:
    """Garbage that only a collection frees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def heap(part: Part) -> Iterator[Any]:
    clock = Clock()
    heap = part("heap").Heap(lambda: True, read_cpu_s=clock)
    heap.clock = clock
    yield heap
    heap.stop()


def collect_for(heap: Any, seconds: float, generation: int = 2) -> None:
    heap.observe("start", {"generation": generation})
    heap.clock.now_s += seconds
    heap.observe("stop", {"generation": generation})


def test_the_start_freezes_what_is_there(heap: Any) -> None:
    heap.start()
    assert gc.get_freeze_count() > 10_000
    gc.collect()
    assert (heap.report()["full_collections"], heap.report()["freezes"]) == (1, 1)


def test_slow_full_collections_freeze_what_survives_and_quick_ones_do_not(heap: Any) -> None:
    collect_for(heap, 0.001)
    collect_for(heap, 1, generation=1)
    assert (heap.report()["freezes"], gc.get_freeze_count()) == (0, 0)
    collect_for(heap, 0.5)
    assert heap.report()["freezes"] == 1
    assert gc.get_freeze_count() > 10_000


def test_nothing_is_frozen_while_a_prompt_runs_or_where_models_could_not_be_thawed(part: Part) -> None:
    for is_idle, may_refreeze in ((False, True), (True, False)):
        heap = part("heap").Heap(lambda is_idle=is_idle: is_idle, read_cpu_s=Clock())
        heap.may_refreeze, heap.clock = may_refreeze, heap._read_cpu_s
        collect_for(heap, 1)
        assert heap.report()["freezes"] == 0


def test_a_thaw_lets_dead_cycles_go(heap: Any) -> None:
    cycle = Cycle()
    seen = weakref.ref(cycle)
    heap.start()
    del cycle
    gc.collect()
    assert seen() is not None
    heap.thaw()
    gc.collect()
    assert seen() is None


def test_every_so_many_freezes_the_whole_heap_is_walked_once(heap: Any, part: Part) -> None:
    for _ in range(part("heap").FREEZES_BEFORE_THAW):
        collect_for(heap, 1)
    assert (heap.report()["thaws"], gc.get_freeze_count() > 0) == (0, True)
    collect_for(heap, 1)
    assert (heap.report()["thaws"], gc.get_freeze_count()) == (1, 0)
    collect_for(heap, 1)
    assert gc.get_freeze_count() > 0


# Routes


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
def companion(part: Part, queue: Any, tmp_path: Path) -> Any:
    timings = part("timing").PromptTimings()
    return part("routes").Companion(part("heap").Heap(timings.is_idle), timings, queue, {}, {"output": tmp_path}.get, view_wait_s=10)


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
