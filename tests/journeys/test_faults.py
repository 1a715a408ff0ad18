"""Requests between the dispatcher and an instance that go wrong in every way we know of: each job ends rightly, once, in bounded time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.jobs.events import read_events
from tests.conftest import S3Access
from tests.journeys import faulty_proxy as faults
from tests.journeys.fault_bench import Bench, open_bench, wait_until
from tests.journeys.faulty_proxy import Twist


@pytest.fixture
async def bench(redis_url: str, s3: S3Access, engine: str) -> AsyncIterator[Bench]:
    async with open_bench(redis_url, s3, engine) as bench:
        yield bench


async def test_without_a_fault_the_proxy_is_not_noticed(bench: Bench) -> None:
    done = await bench.run()
    await bench.check_picture(done)
    assert (done.attempts, bench.proxy.sockets_opened, await bench.count_runs(done)) == (1, 1, 1)
    steps = [json.loads(event.data)["step"] for event in await read_events(bench.runtime.redis, done.id) if event.kind == "progress"]
    assert [step for step in steps if step is not None] == list(range(1, 13))


# -- one request goes wrong --------------------------------------------------------------------------------------

SUBMITS: dict[str, tuple[Twist, int]] = {
    "cut before the instance hears": (faults.drop_request, 2),
    "cut after the instance heard": (faults.drop_answer, 1),
    "late": (faults.delay(0.7), 1),
    "silence with an open connection": (faults.keep_silent, 1),
    "a drop now and then": (faults.drip, 1),
    "half an answer": (faults.truncate, 1),
    "half an answer that looks whole": (faults.truncate_unseen, 1),
    "500 and not queued": (faults.answer_with(500), 2),
    "500 and queued": (faults.answer_with(500, forwarded=True), 1),
    "502 of a proxy": (faults.answer_with(502, b"<html>bad gateway</html>"), 2),
    "200 with a page": (faults.answer_with(200, b"<html>please wait</html>"), 2),
    "200 with nothing": (faults.answer_with(200, b"", "application/json", forwarded=True), 1),
}


@pytest.mark.parametrize("name", SUBMITS)
async def test_a_submission_that_goes_wrong_runs_once(bench: Bench, name: str) -> None:
    twist, attempts = SUBMITS[name]
    rule = bench.proxy.add("POST", "/prompt", twist)
    done = await bench.run()
    assert rule.used == 1
    await bench.check_picture(done)
    assert (done.attempts, await bench.count_runs(done)) == (attempts, 1)


LOOKS: dict[str, tuple[Twist, int]] = {
    "cut": (faults.drop_request, 4),
    "late": (faults.delay(0.5), 2),
    "silence with an open connection": (faults.keep_silent, 1),
    "half an answer": (faults.truncate, 4),
    "half an answer that looks whole": (faults.truncate_unseen, 4),
    "500": (faults.answer_with(500), 4),
    "503 of a proxy": (faults.answer_with(503, b"<html>busy</html>"), 4),
    "200 with a page": (faults.answer_with(200, b"<html>please wait</html>"), 4),
    "200 with nothing": (faults.answer_with(200, b"", "application/json"), 4),
    "200 with null": (faults.answer_with(200, b"null", "application/json"), 4),
    "200 with a list": (faults.answer_with(200, b"[]", "application/json"), 4),
    "200 with another object": (faults.answer_with(200, b'{"error": "try later"}', "application/json"), 4),
}


# An object without the prompt is history's own way to say that it has not ended: no fault there.
@pytest.mark.parametrize(("path", "name"), [(path, name) for path in ("/queue", "/history") for name in LOOKS][:-1])
async def test_a_look_that_goes_wrong_changes_nothing(bench: Bench, path: str, name: str) -> None:
    twist, times = LOOKS[name]
    # The queue is asked while the socket is silent, history where it did not tell everything.
    bench.proxy.relay = faults.lose_kinds("executed") if path == "/history" else faults.lose_all
    rule = bench.proxy.add("GET", path, twist, times=times)
    done = await bench.run()
    assert rule.used >= 1
    await bench.check_picture(done)
    assert (done.attempts, await bench.count_runs(done)) == (1, 1)


FETCHES: dict[str, tuple[Twist, int]] = {
    "cut": (faults.drop_request, 2),
    "late": (faults.delay(0.5), 1),
    "silence with an open connection": (faults.keep_silent, 1),
    "a drop now and then": (faults.drip, 1),
    "half a picture": (faults.truncate, 2),
    "half a picture that looks whole": (faults.truncate_unseen, 2),
    "404": (faults.answer_with(404), 2),
    "500": (faults.answer_with(500), 2),
    "200 with a page": (faults.answer_with(200, b"<html>please wait</html>"), 2),
    "200 with nothing": (faults.answer_with(200, b""), 2),
}


@pytest.mark.parametrize("name", FETCHES)
async def test_a_picture_that_comes_badly_is_fetched_again(bench: Bench, name: str) -> None:
    twist, times = FETCHES[name]
    rule = bench.proxy.add("GET", "/view", twist, times=times)
    done = await bench.run()
    assert rule.used == times
    await bench.check_picture(done)
    assert (done.attempts, await bench.count_runs(done)) == (1, 1)


async def test_a_picture_is_fetched_when_its_node_tells_of_it_and_counts_when_the_prompt_succeeds(bench: Bench) -> None:
    may_answer = asyncio.Event()

    async def hold(request: Any, forward: faults.Forward) -> Any:
        await may_answer.wait()
        return (await forward()).respond()

    views = bench.proxy.add("GET", "/view", faults.delay(0), times=None)
    bench.proxy.relay = faults.lose_kinds("execution_success")
    bench.proxy.add("GET", "/history", hold, times=None)
    job = await bench.submit()

    async def is_fetched() -> bool:
        return views.used == 1

    await wait_until(is_fetched)
    assert not (await bench.load(job)).is_terminal
    may_answer.set()
    done = await bench.wait(job)
    await bench.check_picture(done)
    assert views.used == 1


# -- requests go wrong for good ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cut", "half a picture", "half a picture that looks whole", "404", "200 with a page"])
async def test_a_picture_that_never_comes_fails_the_job(bench: Bench, name: str) -> None:
    bench.proxy.add("GET", "/view", FETCHES[name][0], times=None)
    done = await bench.run()
    assert (done.status, done.outputs) == ("failed", ())
    assert done.error is not None
    assert (done.error.code, done.attempts) == ("upload_failed", 1)


@pytest.mark.parametrize("name", ["cut before the instance hears", "500 and not queued", "200 with a page"])
async def test_an_instance_that_takes_nothing_is_given_up(bench: Bench, name: str) -> None:
    bench.proxy.add("POST", "/prompt", SUBMITS[name][0], times=None)
    done = await bench.run()
    assert done.error is not None
    assert (done.status, done.error.code, done.attempts) == ("failed", "instance_lost", 3)
    assert await bench.count_runs(done) == 0


async def test_an_instance_that_stops_answering_loses_the_job_to_a_second_attempt(bench: Bench) -> None:
    job = await bench.submit()
    await bench.wait_step(job, 2)
    rules = [bench.proxy.add("GET", path, faults.drip, times=None) for path in ("/queue", "/history")]
    bench.proxy.relay = faults.lose_all
    await bench.wait(job, lambda job: job.status == "queued")
    for rule in rules:
        rule.times = 0
    done = await bench.wait(job)
    await bench.check_picture(done)
    await bench.check_stream(done)
    assert done.attempts == 2


async def test_a_200_with_node_errors_fails_the_job_and_leaves_nothing_running(bench: Bench) -> None:
    report = {"2": {"class_type": "SlowImage", "dependent_outputs": ["9"], "errors": [{"type": "value_not_in_list", "details": "steps"}]}}
    bench.proxy.add("POST", "/prompt", faults.change_json(lambda said: said.update(node_errors=report)))
    done = await bench.run(steps=10_000)
    assert done.error is not None
    assert (done.status, done.error.code, done.attempts) == ("failed", "graph_rejected", 1)
    # The instance took the rest of the graph: it must not spend its GPU on it.
    await wait_until(bench.is_idle)


async def test_a_history_that_says_error_and_not_why_fails_the_job(bench: Bench) -> None:
    def blame_nobody(said: dict[str, Any]) -> None:
        for entry in said.values():
            entry.update(outputs={}, status={"status_str": "error", "completed": False, "messages": []})

    bench.proxy.relay = faults.lose_kinds("executed")
    bench.proxy.add("GET", "/history", faults.change_json(blame_nobody), times=None)
    done = await bench.run()
    assert done.error is not None
    assert (done.status, done.error.code, done.attempts) == ("failed", "prompt_failed", 1)


async def test_an_empty_history_while_the_queue_holds_the_prompt_is_no_loss(bench: Bench) -> None:
    empty = bench.proxy.add("GET", "/history", faults.answer_with(200, b"{}", "application/json"), times=None)
    # Each step is followed by the marker of an end that has not come.
    bench.proxy.relay = faults.add_after("progress", lambda prompt_id: [faults.end_marker(prompt_id)])
    job = await bench.submit(steps=100)
    await bench.wait(job, lambda _: empty.used >= 3)
    empty.times = 0
    done = await bench.wait(job)
    await bench.check_picture(done)
    assert (done.attempts, await bench.count_runs(done)) == (1, 1)
