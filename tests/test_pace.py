"""How many prompts an instance is given: two, and more only of what it is known to finish before the next could come."""

from __future__ import annotations

import math
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway.dispatch.fleet import Candidate
from gateway.dispatch.instance import Instance
from gateway.dispatch.pace import Pace, name_work
from gateway.jobs.model import Needs
from gateway.jobs.records import Load
from tests.job_specs import make_spec


def practised(runs: dict[str, list[float]], refill_s: float = 0.010) -> Pace:
    """A pace that has seen these runs."""
    pace = Pace()
    pace.record_refill(refill_s)
    for work, times in runs.items():
        for run_s in times:
            pace.record_run(work, run_s)
    return pace


def test_what_was_never_measured_takes_for_ever() -> None:
    pace = practised({"known": [0.001]})
    assert pace.spare_prompts(["new"], 0.0) == 0
    assert pace.spare_prompts(["known"], 0.0) == 1
    assert pace.spare_prompts(["known", "new"], 0.0) == 0
    assert pace.spare_prompts([], 0.0) == 0


def test_held_prompts_must_last_for_two_refills() -> None:
    pace = practised({"quick": [0.003] * 20})
    assert [count for count in range(1, 10) if pace.spare_prompts(["quick"] * count, 0.0)] == [1, 2, 3, 4, 5, 6]


def test_each_spare_prompt_is_paid_for_by_a_quick_run() -> None:
    assert [practised({"quick": [0.001] * runs}).spare_prompts(["quick"], 0.0) for runs in (1, 2, 3, 16)] == [1, 2, 3, 16]
    assert practised({"quick": [0.001] * 9, "other": [0.001] * 2}).spare_prompts(["quick", "other"], 0.0) == 2


def test_one_slow_run_ends_it() -> None:
    assert practised({"quick": [0.003] * 20 + [5.0]}).spare_prompts(["quick"], 0.0) == 0
    assert practised({"quick": [0.003] * 20 + [0.021]}).spare_prompts(["quick"], 0.0) == 0, "a hiccup, and it starts again"
    assert practised({"quick": [0.003] * 20 + [0.021] + [0.003] * 2}).spare_prompts(["quick"], 0.0) == 2


def test_what_runs_longer_than_quick_work_would_is_not_believed_to_be_quick() -> None:
    pace = practised({"quick": [0.003] * 20})
    assert pace.spare_prompts(["quick", "quick"], 0.039) > 0
    assert pace.spare_prompts(["quick", "quick"], 0.040) == 0


def named(**parameters: Any) -> str:
    return name_work(make_spec("job", parameters=parameters))


def test_work_is_named_by_all_that_may_decide_its_time() -> None:
    plain: dict[str, Any] = {"prompt": "a", "seed": 1, "width": 64, "seconds": 0.0, "sampler": "euler", "upscale": False}
    assert named(**plain) == named(**plain | {"prompt": "b", "seed": 2})
    for other in ({"width": 128}, {"seconds": 2.0}, {"sampler": "dpm_adaptive"}, {"upscale": True}, {"frames": 81}, {"image": "upl_1"}):
        assert named(**plain) != named(**plain | other), other
    spec = make_spec("job", parameters=plain)
    assert name_work(spec.model_copy(update={"base_model": "other"})) != name_work(spec)
    assert name_work(spec.model_copy(update={"raw": True})) == ""


def hold(instance: Instance, count: int, work: str = "quick") -> list[int]:
    """Place so many jobs; the slots that each may use."""
    return [instance.place(Candidate(f"{work}{number}", "model", frozenset(), Needs(), work=work)) for number in range(count)]


@pytest.fixture
async def instance() -> Instance:
    async with aiohttp.ClientSession() as session:
        instance = Instance("http://127.0.0.1:1", session, slots=2, quick_slots=4)
    # Otherwise it counts as down.
    instance.socket._connected.set()
    instance.catalog = {}
    return instance


def teach(instance: Instance, job_id: str, runs: int) -> None:
    for _ in range(runs):
        instance.learn(job_id, 0.002, instance.held[job_id].placed_s + 0.05)


async def test_an_instance_takes_two_until_it_is_known_to_be_quick(instance: Instance) -> None:
    assert hold(instance, 2) == [2, 2]
    assert instance.view().free_slots == 0
    teach(instance, "quick0", 1)
    assert instance.view().free_slots == 1
    assert hold(instance, 3)[2:] == [3]
    assert instance.view().free_slots == 0, "no more than was proven"
    teach(instance, "quick0", 5)
    assert instance.view().free_slots == 1
    assert hold(instance, 4)[3:] == [4]
    assert instance.view().free_slots == 0, "never more than quick_slots"


async def test_a_slow_one_among_them_keeps_it_busy(instance: Instance) -> None:
    hold(instance, 2)
    teach(instance, "quick0", 2)
    del instance.held["quick1"]
    hold(instance, 1, "slow")
    assert instance.view().free_slots == 0


async def test_two_are_the_most_once_what_runs_takes_too_long(instance: Instance) -> None:
    hold(instance, 2)
    teach(instance, "quick0", 2)
    oldest = instance.held["quick0"]
    instance.held["quick0"] = oldest._replace(placed_s=oldest.placed_s - 1.0)
    assert instance.view().free_slots == 0


async def test_beside_another_dispatcher_two_are_the_most(instance: Instance) -> None:
    hold(instance, 1)
    teach(instance, "quick0", 2)
    instance.look(Load(2, "model", frozenset()))
    assert instance.view().free_slots == 0


def test_what_is_held_is_done_when_its_kinds_would_be() -> None:
    pace = practised({"short": [2.0] * 3, "long": [10.0]})
    assert pace.expect_rest_s(["short"], 0.5) == 1.5
    assert pace.expect_rest_s(["short", "long"], 0.5) == 11.5
    assert pace.expect_rest_s(["short"], 2.5) == math.inf, "it was misjudged"
    assert pace.expect_rest_s(["short", "new"], 0.5) == math.inf


async def test_the_rest_counts_from_when_the_one_before_was_done(instance: Instance) -> None:
    assert instance.view().rest_s == math.inf
    instance._pace.record_run("minute", 60.0)
    hold(instance, 1, "minute")
    job_id = next(iter(instance.held))
    held = instance.held[job_id]
    instance.held[job_id] = held._replace(placed_s=held.placed_s - 50.0)
    assert 0 < instance.view().rest_s <= 10.0
    instance.held["before"] = held
    instance.let_go("before")
    instance.let_go("before")
    assert 50.0 < instance.view().rest_s <= 60.0
    instance.look(Load(2, "model", frozenset()))
    assert instance.view().rest_s == math.inf, "another dispatcher's job is there too"


async def test_it_remembers_as_many_jobs_loras_as_its_cache_holds() -> None:
    async def say_flags(request: web.Request) -> web.Response:
        return web.json_response({"system": {"argv": ["main.py", "--cache-lru", "20"]}, "devices": []})

    app = web.Application()
    app.router.add_get("/system_stats", say_flags)
    async with TestServer(app) as server, aiohttp.ClientSession() as session:
        instance = Instance(str(server.make_url("")), session, slots=2)
        for known in (False, True):
            for name in "abc":
                instance.place(Candidate(name, "model", frozenset({name}), Needs()))
            assert instance.view().lora_files == {"c"}
            assert instance.view().kept_files == ({"b", "c"} if known else {"c"})
            await instance._refresh_stats()
