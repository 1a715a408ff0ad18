"""The dispatcher in a process of its own: `python -m gateway.dispatch` beside a gateway with DISPATCHER=off."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from local.child import Child
from tests.journeys.api import SseEvent, fetch, strip_signatures
from tests.journeys.plant import SLOW, Plant, list_statuses, running_plant


@pytest.fixture(scope="module")
def shared_plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    with running_plant(tmp_path_factory.mktemp("plant"), split=True) as plant:
        yield plant


@pytest.fixture
def plant(shared_plant: Plant) -> Iterator[Plant]:
    """Whole at the start of every test."""
    yield shared_plant
    shared_plant.mend()


@pytest.fixture
def dispatcher(plant: Plant) -> Child:
    assert plant.dispatcher is not None
    return plant.dispatcher


def test_it_runs_jobs(plant: Plant) -> None:
    done = plant.api.run(workflow="trivial", color=1)
    assert len(fetch(done["outputs"][0])) == done["outputs"][0]["size_bytes"]
    assert plant.api.http.get("/ready").status_code == 200


def test_killed_it_breaks_no_stream(plant: Plant, dispatcher: Child) -> None:
    job = plant.api.create(**SLOW)
    events: list[SseEvent] = []
    for event in plant.api.follow(job["id"]):
        if event.id is not None:
            events.append(event)
        if event.kind == "progress" and event.data["step"] == 5:
            dispatcher.kill()
            dispatcher.start()
    assert strip_all(events) == strip_all(plant.api.replay(job["id"]))
    assert list_statuses(events) == ["queued", "running", "succeeded"]
    done = plant.api.get(job["id"])
    assert (done["status"], done["attempts"]) == ("succeeded", 1)
    assert plant.saved_files(done) == ["image_00001_.png"]


def strip_all(events: list[SseEvent]) -> list[SseEvent]:
    return [event._replace(data=strip_signatures(event.data)) for event in events]


def test_stopped_it_hands_its_jobs_over(plant: Plant, dispatcher: Child) -> None:
    job = plant.start_until_step(5)
    dispatcher.stop()
    dispatcher.start()
    done = plant.api.wait(job["id"], "succeeded")
    assert done["attempts"] == 1
    assert plant.saved_files(done) == ["image_00001_.png"]


def test_jobs_wait_while_there_is_none(plant: Plant, dispatcher: Child) -> None:
    dispatcher.stop()
    job = plant.api.create(workflow="trivial")
    assert (job["status"], plant.api.get(job["id"])["queue_position"]) == ("queued", 0)
    dispatcher.start()
    assert plant.api.wait(job["id"], "succeeded")["attempts"] == 1
