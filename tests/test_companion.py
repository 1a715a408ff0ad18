"""The companion extension's own parts, loaded by path as ComfyUI loads them, without a ComfyUI."""

import gc
import io
import json
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.companion_parts import FINAL, load_part

Part = Callable[[str], ModuleType]


@pytest.fixture
def part() -> Part:
    return load_part


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
    module = part("install")
    caplog.clear()  # loading it has installed it once already
    with caplog.at_level(logging.WARNING):
        assert module.install() == ({}, {})
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
    collect_for(heap, 1)
    del cycle
    gc.collect()
    assert seen() is not None
    heap.thaw()
    gc.collect()
    assert seen() is None


def test_the_start_up_heap_alone_stays_frozen(heap: Any) -> None:
    heap.start()
    heap.thaw()
    assert (gc.get_freeze_count() > 10_000, heap.report()["thaws"]) == (True, 0)


def test_every_so_many_freezes_the_whole_heap_is_walked_once(heap: Any, part: Part) -> None:
    for _ in range(part("heap").FREEZES_BEFORE_THAW):
        collect_for(heap, 1)
    assert (heap.report()["thaws"], gc.get_freeze_count() > 0) == (0, True)
    collect_for(heap, 1)
    assert (heap.report()["thaws"], gc.get_freeze_count()) == (1, 0)
    collect_for(heap, 1)
    assert gc.get_freeze_count() > 0
