"""An instance whose socket, self-description or life goes wrong. What its messages say is a speed-up: no job depends on them."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import pytest

from gateway.admission import Wish
from gateway.auth import LOCAL
from gateway.jobs.model import Job
from tests.conftest import EngineFactory, S3Access
from tests.journeys import faulty_proxy as faults
from tests.journeys.fault_bench import Bench, open_bench, wait_until
from tests.journeys.faulty_proxy import FaultyProxy, Frame, Relay, Twist

BenchFactory = Callable[..., AbstractAsyncContextManager[Bench]]


@pytest.fixture
def make_bench(redis_url: str, s3: S3Access, engine: str) -> BenchFactory:
    """`make_bench(engine_url=None, prepare=None, **settings)`"""

    def make(*, engine_url: str = engine, **changes: Any) -> AbstractAsyncContextManager[Bench]:
        return open_bench(redis_url, s3, engine_url, **changes)

    return make


@pytest.fixture
async def bench(make_bench: BenchFactory) -> AsyncIterator[Bench]:
    async with make_bench() as bench:
        yield bench


# -- the socket goes wrong ---------------------------------------------------------------------------------------


def _frame_of(size_bytes: int) -> bytes:
    """A picture of work in progress in the older frame, this large."""
    return struct.pack(">II", 1, 2) + bytes(size_bytes)


def _nonsense(prompt_id: str) -> Iterable[Frame]:
    """What no ComfyUI of ours says, and an extension or a newer one may."""
    odd: tuple[object, ...] = (None, [], {}, {"prompt_id": prompt_id, "node": 7, "nodes": 3}, {"prompt_id": {"a": 1}}, "x")
    for kind in ("progress", "executing", "executed", "progress_state", "execution_cached", "execution_error", "execution_start"):
        for data in odd:
            yield json.dumps({"type": kind, "data": data})
    for value, most in (("NaN", "1"), ("1", "NaN"), ("Infinity", "1"), ("1e999", "1"), ("-5", "0"), ('"a"', "1")):
        yield f'{{"type": "progress", "data": {{"value": {value}, "max": {most}, "node": "2", "prompt_id": "{prompt_id}"}}}}'
    state = {"7": {"state": "finished", "value": 1, "max": 1}}
    yield json.dumps({"type": "progress_state", "data": {"prompt_id": prompt_id, "nodes": state}})
    yield json.dumps({"type": "of an extension", "data": {"prompt_id": prompt_id}})
    yield from ("", "null", "[]", "{", '{"type": 5}', "\x00", "\ud7ff", '"' * 10_000)
    yield from (b"", b"\x00", b"\x00\x00\x00\x01", struct.pack(">II", 4, 1 << 31) + b"{}", struct.pack(">II", 4, 2) + b"[]", bytes(64))


MESSAGES: dict[str, Callable[[], Relay]] = {
    "none": lambda: faults.lose_all,
    "no end marker": lambda: faults.lose_kinds("executing"),
    "no start": lambda: faults.lose_kinds("execution_start"),
    "no ends of any kind": lambda: faults.lose_kinds("execution_success", "executing", "executed"),
    "each twice": lambda: faults.double,
    "pairs in the wrong order": lambda: faults.reverse_in_groups(2),
    "fives in the wrong order": lambda: faults.reverse_in_groups(5),
    "cut in half": lambda: faults.truncate_messages,
    "the end before the beginning": lambda: faults.add_after("execution_start", lambda prompt_id: [faults.end_marker(prompt_id)]),
    "nonsense": lambda: faults.add_after("execution_start", _nonsense),
    "a frame of 7 MB": lambda: faults.add_after("execution_start", lambda _: [_frame_of(7 << 20)]),
    "somebody else's messages": lambda: faults.add_after(
        "execution_start", lambda _: [faults.end_marker("another"), '{"type": "execution_error", "data": {}}']
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
async def test_messages_that_go_wrong_change_nothing(bench: Bench, name: str) -> None:
    bench.proxy.relay = MESSAGES[name]()
    first, second = await bench.submit(), await bench.submit(steps=3)
    for job in (first, second):
        done = await bench.wait(job)
        await bench.check_stream(done)
        await bench.check_picture(done)
        assert (done.attempts, await bench.count_runs(done)) == (1, 1)
    assert bench.proxy.sockets_opened == 1


@pytest.mark.parametrize("break_off", [FaultyProxy.cut_sockets, FaultyProxy.half_close_sockets], ids=["cut", "half closed"])
async def test_a_socket_that_breaks_in_the_middle_is_opened_again(bench: Bench, break_off: Callable[[FaultyProxy], None]) -> None:
    job = await bench.submit()
    await bench.wait_step(job, 3)
    break_off(bench.proxy)
    done = await bench.wait(job)
    await bench.check_stream(done)
    await bench.check_picture(done)
    assert (done.attempts, await bench.count_runs(done)) == (1, 1)
    following = await bench.run()
    assert bench.proxy.sockets_opened == 2
    assert following.progress.value == 1.0


async def test_a_socket_that_breaks_again_and_again_lets_jobs_end(bench: Bench) -> None:
    jobs = [await bench.submit(steps=4) for _ in range(4)]
    for _ in range(12):
        bench.proxy.cut_sockets()
        await asyncio.sleep(0.15)
    for job in jobs:
        done = await bench.wait(job)
        await bench.check_stream(done)
        await bench.check_picture(done)
        assert (done.attempts, await bench.count_runs(done)) == (1, 1)


HANDSHAKES: dict[str, Twist] = {
    "refused": faults.answer_with(503),
    "forbidden": faults.answer_with(403),
    "answered as a page": faults.answer_with(200),
    "cut": faults.drop_request,
    "silence with an open connection": faults.keep_silent,
    "a drop now and then": faults.drip,
}


@pytest.mark.parametrize("name", HANDSHAKES)
async def test_a_socket_that_opens_badly_is_opened_again(make_bench: BenchFactory, name: str) -> None:
    def prepare(proxy: FaultyProxy) -> None:
        if name == "a drop now and then":
            proxy.add("GET", "/ws", _drip_without_forwarding)
        else:
            proxy.add("GET", "/ws", HANDSHAKES[name])

    async with make_bench(prepare=prepare) as bench:
        await bench.check_picture(await bench.run())


async def _drip_without_forwarding(request: Any, forward: faults.Forward) -> Any:
    async def nothing() -> faults.Answer:
        return faults.Answer(200, "text/plain", b"")

    return await faults.drip(request, nothing)


DESCRIPTIONS: tuple[Twist, ...] = (
    faults.drop_request,
    faults.keep_silent,
    faults.truncate,
    faults.truncate_unseen,
    faults.answer_with(500),
    faults.answer_with(200, b"<html>please wait</html>"),
    faults.answer_with(200, b"", "application/json"),
    faults.answer_with(200, b"null", "application/json"),
    faults.answer_with(200, b'"loading"', "application/json"),
)


# An instance whose figures alone are missing is used meanwhile, and asked for them every three seconds.
@pytest.mark.parametrize(("path", "count"), [("/object_info", 9), ("/models/loras", 9), ("/system_stats", 3)])
async def test_an_instance_that_describes_itself_badly_is_asked_until_it_does_well(make_bench: BenchFactory, path: str, count: int) -> None:
    def prepare(proxy: FaultyProxy) -> None:
        for twist in DESCRIPTIONS[-count:]:
            proxy.add("GET", path, twist)

    async with make_bench(prepare=prepare) as bench:

        async def is_through() -> bool:
            return all(rule.used for rule in bench.proxy.rules)

        await bench.check_picture(await bench.run())
        await wait_until(is_through)
        await bench.check_picture(await bench.run())


# -- the instance itself goes wrong ------------------------------------------------------------------------------


async def test_an_instance_that_restarts_with_an_empty_history_runs_the_job_again(
    make_bench: BenchFactory, engine_factory: EngineFactory
) -> None:
    child = engine_factory()
    # However long it takes to start.
    async with make_bench(engine_url=child.url, instance_lost_s=child.ready_timeout_s, stall_timeout_s=child.ready_timeout_s) as bench:
        job = await bench.submit()
        await bench.wait_step(job, 3)
        child.kill()
        child.start()
        await asyncio.to_thread(child.wait_ready)
        done = await bench.wait(job)
        await bench.check_stream(done)
        await bench.check_picture(done)
        assert (done.attempts, await bench.count_runs(done)) == (2, 1)


async def test_an_instance_that_forgets_what_it_finished_runs_the_job_again(bench: Bench) -> None:
    job = await bench.submit()
    await bench.wait_step(job, 3)
    bench.proxy.relay = faults.lose_all
    for path, body in (("/queue", b'{"queue_running": [], "queue_pending": []}'), ("/history", b"{}")):
        bench.proxy.add("GET", path, faults.answer_with(200, body, "application/json"))
    done = await bench.wait(job)
    await bench.check_stream(done)
    await bench.check_picture(done)
    assert done.attempts == 2


async def test_a_node_that_never_ends_is_stopped_when_it_shows_no_progress(make_bench: BenchFactory, engine_factory: EngineFactory) -> None:
    child = engine_factory()
    async with make_bench(engine_url=child.url, stall_timeout_s=1.0) as bench:
        done = await bench.run(steps=2, delay_ms=3000)
        assert done.error is not None
        assert (done.status, done.error.code) == ("failed", "no_progress")
        assert await bench.is_idle()
        assert not done.outputs


async def test_a_cancel_whose_messages_are_lost_is_told_as_it_is(bench: Bench) -> None:
    bench.proxy.relay = faults.lose_all
    for method, path in (("POST", "/interrupt"), ("GET", "/queue"), ("GET", "/history")):
        bench.proxy.add(method, path, faults.drop_request, times=2, skip=1)
    job = await bench.submit(steps=400)
    await asyncio.sleep(0.5)
    await bench.runtime.store.cancel(job.id)
    done = await bench.wait(job)
    await bench.check_stream(done)
    assert (done.status, done.outputs) == ("canceled", ())
    assert await bench.is_idle()


async def test_what_is_loaded_is_known_over_a_cut_and_forgotten_with_the_process(
    make_bench: BenchFactory, engine_factory: EngineFactory
) -> None:
    engine = engine_factory()
    async with make_bench(engine_url=engine.url) as bench:

        async def knows(base_model: str | None) -> bool:
            return [facts.base_model for facts in await bench.runtime.registry.all()] == [base_model]

        async def is_cleared_away(job: Job) -> bool:
            return await bench.count_runs(job) == 0

        async def draw(prompt: str) -> Job:
            wish = Wish("flux", {"prompt": prompt, "width": 256, "height": 256, "steps": 1}, cache="off")
            done = await bench.wait((await bench.runtime.admission.admit(wish, LOCAL))[0])
            assert done.status == "succeeded", done.error
            return done

        first, _ = await draw("a"), await draw("b")
        # The instance's history keeps the newest alone.
        await wait_until(lambda: is_cleared_away(first))
        for _ in range(2):
            looked = bench.proxy.add("GET", "/history", faults.pass_on)
            bench.proxy.cut_sockets()
            await wait_until(partial(has_come, looked))
            assert await knows("tinyflux")
        engine.kill()
        engine.start()
        await asyncio.to_thread(engine.wait_ready)
        await wait_until(lambda: knows(None))


async def has_come(rule: faults.Rule) -> bool:
    return rule.used > 0
