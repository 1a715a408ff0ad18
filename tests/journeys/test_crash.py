"""Every part is killed in the middle of a job and comes back. The job ends, once, and its stream shows no seam."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.journeys.api import TERMINAL, SseEvent, fetch, wait_until
from tests.journeys.plant import SLOW, STEPS, Plant, is_strictly_rising, list_statuses, list_steps, restart, running_plant

PICTURE = Path(__file__).parents[1] / "data" / "tinyflux" / "red_circle.png"


@pytest.fixture(scope="module")
def shared_plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    with running_plant(tmp_path_factory.mktemp("plant"), split=False) as plant:
        yield plant


@pytest.fixture
def plant(shared_plant: Plant) -> Iterator[Plant]:
    """Whole at the start of every test."""
    yield shared_plant
    shared_plant.mend()


def read_until_killed(plant: Plant, job_id: str, at_step: int) -> list[SseEvent]:
    """What a caller has seen when the gateway is killed at this step and the stream breaks."""
    seen: list[SseEvent] = []
    try:
        for event in plant.api.follow(job_id):
            if event.id is not None:
                seen.append(event)
            if event.kind == "progress" and event.data["step"] == at_step:
                plant.gateway.kill()
    except httpx.HTTPError:
        return seen
    raise AssertionError(f"the stream ended as if nothing had happened: {seen}")


def test_a_killed_gateway_finishes_the_job_once_and_its_stream_shows_no_seam(plant: Plant) -> None:
    job = plant.api.create(**SLOW)
    seen = read_until_killed(plant, job["id"], at_step=5)
    plant.gateway.start()
    plant.gateway.wait_ready()
    seen += plant.api.replay(job["id"], after=seen[-1].id)
    done = plant.api.get(job["id"])
    assert (done["status"], done["attempts"]) == ("succeeded", 1)
    assert plant.saved_files(done) == ["image_00001_.png"]
    assert len(fetch(done["outputs"][0])) == done["outputs"][0]["size_bytes"]
    assert is_strictly_rising(seen)
    assert [event.id for event in seen] == [event.id for event in plant.api.replay(job["id"])]
    assert list_statuses(seen) == ["queued", "running", "succeeded"]


def test_a_gateway_killed_just_after_accepting_loses_nothing(plant: Plant) -> None:
    jobs = [plant.api.create(**{**SLOW, "steps": 5}) for _ in range(4)]
    restart(plant.gateway)
    for job in jobs:
        done = plant.api.wait(job["id"], "succeeded")
        assert plant.saved_files(done) == ["image_00001_.png"]


def test_a_killed_engine_runs_the_job_again_when_it_is_back(plant: Plant) -> None:
    job = plant.start_until_step(5)
    restart(plant.engine)
    done = plant.api.wait(job["id"], "succeeded")
    assert done["attempts"] == 2
    assert plant.saved_files(done) == ["image_00001_.png"]
    events = plant.api.replay(job["id"])
    assert is_strictly_rising(events)
    assert list_statuses(events) == ["queued", "running", "queued", "running", "succeeded"]


def test_a_picture_that_was_given_is_brought_again_for_the_next_attempt(plant: Plant) -> None:
    upload = plant.api.http.post("/v1/uploads", files={"file": ("a.png", PICTURE.read_bytes())}).json()["id"]
    shape = {"width": 256, "height": 256, "steps": 25, "strength": 1.0}
    job = plant.api.create(workflow="flux-img2img", prompt="a green star", image=upload, **shape)
    wait_until(lambda: (plant.api.get(job["id"])["progress"]["step"] or 0) > 1, "a few steps")
    plant.engine.kill()
    shutil.rmtree(plant.engine.base_dir / "input" / "fluxgate")
    restart(plant.engine)
    done = plant.api.wait(job["id"], "succeeded")
    assert (done["attempts"], plant.saved_files(done)) == (2, ["image_00001_.png"])


def test_pictures_wait_for_s3_to_come_back(plant: Plant) -> None:
    plant.s3.kill()
    job = plant.api.create(workflow="trivial")
    wait_until(lambda: bool(plant.saved_files(job)), "the picture on the engine")
    wait_until(lambda: "ingest tried again" in plant.gateway.log_path.read_text(), "a failed upload")
    assert plant.api.get(job["id"])["status"] not in TERMINAL
    assert plant.api.http.get("/ready").json()["checks"]["storage"] != "ok"
    plant.s3.start()
    plant.s3.wait_ready()
    done = plant.api.wait(job["id"], "succeeded")
    assert (done["attempts"], len(fetch(done["outputs"][0]))) == (1, done["outputs"][0]["size_bytes"])


def test_a_redis_that_restarts_has_forgotten_nothing(plant: Plant) -> None:
    job = plant.start_until_step(5)
    waiting = plant.api.create(workflow="trivial")
    restart(plant.redis)
    done = plant.api.wait(job["id"], "succeeded")
    assert done["attempts"] == 1
    assert plant.saved_files(done) == ["image_00001_.png"]
    assert plant.api.wait(waiting["id"])["status"] == "succeeded"
    events = plant.api.replay(job["id"])
    assert is_strictly_rising(events)
    assert list_statuses(events) == ["queued", "running", "succeeded"]
    # What could not be written while Redis was away waited: no step is missing.
    assert list_steps(events) == list(range(1, STEPS + 1))


def test_without_redis_a_request_is_refused_and_the_answer_says_so(plant: Plant) -> None:
    plant.redis.kill()
    refused = plant.api.http.post("/v1/generations", json={"workflow": "trivial"})
    checks = plant.api.http.get("/ready")
    plant.redis.start()
    plant.redis.wait_ready()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "redis_unavailable")
    assert (checks.status_code, checks.json()["ready"]) == (503, False)
    plant.gateway.wait_ready()
    wait_until(lambda: plant.api.http.post("/v1/generations", json={"workflow": "trivial"}).status_code == 202, "an accepted job")
