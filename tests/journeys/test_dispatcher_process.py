"""The dispatcher in a process of its own: `python -m gateway.dispatch` beside a gateway with DISPATCHER=off."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from local.child import Child, pick_free_port
from tests.deployment import make_dispatcher, running
from tests.journeys.api import SseEvent, fetch, strip_signatures, wait_until
from tests.journeys.plant import SLOW, Plant, list_statuses, restart, running_plant


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


def test_killed_alone_it_finds_its_prompt_again_before_those_that_cannot_ask_its_instance(
    plant: Plant, dispatcher: Child, tmp_path: Path
) -> None:
    """A pod is an instance and its dispatcher: dispatchers of other pods see the lease expire, and have no way to this prompt."""
    with running(make_dispatcher(tmp_path, plant.env | {"COMFYUI_URLS": "http://127.0.0.1:9"}, plant.gateway.url)):
        wait_until(lambda: len(plant.api.http.get("/v1/instances").json()["data"]) == 2, "both instances")
        job = plant.start_until_step(5)
        dispatcher.kill()
        time.sleep(2 * float(plant.env["LEASE_S"]))
        assert plant.api.get(job["id"])["status"] == "running", "nobody has put it back"
        dispatcher.start()
        done = plant.api.wait(job["id"], "succeeded")
    assert (done["attempts"], plant.saved_files(done)) == (1, ["image_00001_.png"])


def test_jobs_wait_while_there_is_none(plant: Plant, dispatcher: Child) -> None:
    dispatcher.stop()
    job = plant.api.create(workflow="trivial")
    assert (job["status"], plant.api.get(job["id"])["queue_position"]) == ("queued", 0)
    dispatcher.start()
    assert plant.api.wait(job["id"], "succeeded")["attempts"] == 1


def read_metrics(url: str) -> dict[str, float]:
    lines = [line.rpartition(" ") for line in httpx.get(f"{url}/metrics").raise_for_status().text.splitlines() if line[0] != "#"]
    return {name: float(value) for name, _, value in lines}


def test_one_that_is_patient_finishes_what_runs_and_takes_nothing_more(plant: Plant, dispatcher: Child, tmp_path: Path) -> None:
    dispatcher.stop()
    port = pick_free_port()
    patient = make_dispatcher(tmp_path, plant.env | {"STOP_AFTER_RUNNING_S": "60", "METRICS_PORT": str(port)}, plant.gateway.url)
    with running(patient):
        name = f'{{instance="127.0.0.1-{plant.engine.url.rpartition(":")[2]}"}}'
        job = plant.start_until_step(5)
        assert read_metrics(f"http://127.0.0.1:{port}")[f"fluxgate_instance_slots_used{name}"] == 1
        os.killpg(patient.pid, signal.SIGTERM)
        wait_until(lambda: "claims nothing more" in patient.log_path.read_text(), "the dispatcher's word that it stops")
        later = plant.api.create(workflow="trivial")
        done = plant.api.wait(job["id"], "succeeded")
        assert (done["attempts"], plant.saved_files(done)) == (1, ["image_00001_.png"])
        wait_until(lambda: not patient.is_alive(), "the end of the dispatcher")
        assert plant.api.get(later["id"])["status"] == "queued"
        # With no dispatcher at all the gateway tells how many wait, and how long.
        told = read_metrics(plant.gateway.url)
        assert told["fluxgate_queue_depth"] == told["fluxgate_redis_up"] == 1
        assert told["fluxgate_queue_oldest_seconds"] > 0
    dispatcher.start()
    assert plant.api.wait(later["id"], "succeeded")["attempts"] == 1


def test_it_serves_its_own_metrics(plant: Plant, dispatcher: Child, tmp_path: Path) -> None:
    dispatcher.stop()
    port = pick_free_port()
    with running(make_dispatcher(tmp_path, plant.env | {"METRICS_PORT": str(port)}, plant.gateway.url)):
        plant.api.run(workflow="trivial", color=3)
        plant.api.run(workflow="trivial", color=4)
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: read_metrics(url).get('fluxgate_jobs_warm_total{warm="true"}', 0) >= 1, "a warm start")
        told = read_metrics(url)
        instance = f"127.0.0.1-{plant.engine.url.rpartition(':')[2]}"
        assert told[f'fluxgate_instance_busy_seconds_total{{instance="{instance}"}}'] >= 0
        assert told['fluxgate_jobs_total{code="",status="succeeded",workflow="trivial"}'] == 2
        assert (told["fluxgate_queue_depth"], told["fluxgate_queue_oldest_seconds"]) == (0, 0)
        assert told[f'fluxgate_instance_up{{instance="{instance}"}}'] == 1
        assert httpx.get(f"{url}/health").json() == {"status": "ok"}
        assert (httpx.get(f"{url}/ready").status_code, httpx.get(f"{url}/v1/keys").status_code) == (200, 404)


def test_one_dispatcher_does_not_forget_what_anothers_instance_has(plant: Plant, tmp_path: Path) -> None:
    """Each may know instances of its own alone, as in a cluster where a pod is one instance and its dispatcher."""
    port = pick_free_port()
    elsewhere = plant.env | {"COMFYUI_URLS": "http://127.0.0.1:9", "METRICS_PORT": str(port)}
    plant.api.run(workflow="trivial")
    other = make_dispatcher(tmp_path, elsewhere, plant.gateway.url)
    with running(other):
        wait_until(lambda: len(plant.api.http.get("/v1/instances").json()["data"]) == 2, "both instances")
        (lora,) = plant.api.http.get("/v1/loras").json()["data"]
        assert lora["name"] == "tok"
        # Its port opens a little after it has told of its instances.
        with httpx.Client(transport=httpx.HTTPTransport(retries=8)) as http:
            assert http.get(f"http://127.0.0.1:{port}/ready").status_code == 503


def test_it_is_ready_once_the_base_model_is_loaded(plant: Plant, dispatcher: Child, tmp_path: Path) -> None:
    dispatcher.stop()
    restart(plant.engine)
    port = pick_free_port()
    warmer = make_dispatcher(tmp_path, plant.env | {"WARM_UP": "true", "METRICS_PORT": str(port), "LOG_LEVEL": "INFO"}, plant.gateway.url)

    def is_warm() -> bool:
        models = {model["id"]: model for model in plant.api.http.get("/v1/models").json()["data"]}
        return bool(models[plant.env["DEFAULT_BASE_MODEL"]]["warm_on"])

    with running(warmer), httpx.Client(transport=httpx.HTTPTransport(retries=8)) as http:
        wait_until(lambda: http.get(f"http://127.0.0.1:{port}/ready").status_code == 200, "the warm-up")
        assert '"warmed up"' in warmer.log_path.read_text(), "not before"
        wait_until(is_warm, "the model, without any caller's job")
        assert not [job for job in plant.api.http.get("/v1/generations").json()["data"] if job["metadata"].get("load")], "nobody's job"
    dispatcher.start()
