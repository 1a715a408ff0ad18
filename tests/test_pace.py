"""How many prompts an instance is given: two, and more only of what it is known to finish before the next could come."""

from __future__ import annotations

import aiohttp
import pytest

from gateway.dispatch.fleet import Candidate
from gateway.dispatch.instance import Instance
from gateway.dispatch.pace import Pace, name_work
from gateway.jobs.model import Needs
from gateway.jobs.records import Load
from tests.job_specs import make_spec


def test_what_was_never_measured_takes_for_ever() -> None:
    pace = Pace()
    pace.record_refill(10.0)
    assert not pace.runs_dry(["new"])
    pace.record_run("new", 0.001)
    assert pace.runs_dry(["new"])
    assert not pace.runs_dry(["new", "other"])


def test_held_prompts_must_last_for_two_refills() -> None:
    pace = Pace()
    pace.record_run("quick", 0.003)
    pace.record_refill(0.010)
    assert [count for count in range(1, 10) if pace.runs_dry(["quick"] * count)] == [1, 2, 3, 4, 5, 6]


def test_one_slow_run_ends_it() -> None:
    pace = Pace()
    pace.record_refill(0.010)
    for _ in range(20):
        pace.record_run("quick", 0.003)
    pace.record_run("quick", 5.0)
    assert not pace.runs_dry(["quick"])


def test_work_is_named_by_what_decides_its_time() -> None:
    spec = make_spec("job", parameters={"prompt": "a", "width": 64, "steps": 4})
    assert name_work(spec) == name_work(make_spec("job", parameters={"prompt": "b", "width": 64, "steps": 4}))
    assert name_work(spec) != name_work(make_spec("job", parameters={"prompt": "a", "width": 64, "steps": 40}))
    assert name_work(spec.model_copy(update={"base_model": "other"})) != name_work(spec)


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


async def test_an_instance_takes_two_until_it_is_known_to_be_quick(instance: Instance) -> None:
    assert hold(instance, 2) == [2, 2]
    assert instance.view().free_slots == 0
    instance.learn("quick0", 0.002, instance.held["quick0"].placed_s + 0.02)
    assert instance.view().free_slots == 1
    assert hold(instance, 4)[2:] == [3, 4]
    assert instance.view().free_slots == 0, "never more than quick_slots"


async def test_a_slow_one_among_them_keeps_it_busy(instance: Instance) -> None:
    hold(instance, 2)
    instance.learn("quick0", 0.002, instance.held["quick0"].placed_s + 0.02)
    del instance.held["quick1"]
    hold(instance, 1, "slow")
    assert instance.view().free_slots == 0


async def test_beside_another_dispatcher_two_are_the_most(instance: Instance) -> None:
    hold(instance, 1)
    instance.learn("quick0", 0.002, instance.held["quick0"].placed_s + 0.02)
    instance.look(Load(2, "model", frozenset()))
    assert instance.view().free_slots == 0
