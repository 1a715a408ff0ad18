"""From a prompt to a picture, as the README tells it, and everything else one does with a job."""

from __future__ import annotations

import hashlib
from typing import Any

import httpx
import pytest
from PIL import Image, ImageChops

from tests.journeys.api import Api, Job, count_saved, fetch, open_picture, read_graph, strip_signatures, wait_until

PROMPT = "a red circle on a blue background"
STEPS = 6
QUICK: dict[str, Any] = {"prompt": PROMPT, "width": 256, "height": 256, "steps": STEPS}


def is_red_circle_on_blue(picture: Image.Image) -> bool:
    """The middle is clearly red, and every corner is clearly blue."""
    width, height = picture.size
    margin = width // 16
    corners = [(x, y) for x in (margin, width - margin) for y in (margin, height - margin)]
    red, green, blue = read_pixel(picture, (width // 2, height // 2))
    is_red = red > 120 and red > 1.6 * max(green, blue)
    return is_red and all(pixel[2] > 100 and pixel[2] > 1.4 * pixel[0] for pixel in (read_pixel(picture, corner) for corner in corners))


def read_pixel(picture: Image.Image, place: tuple[int, int]) -> tuple[int, int, int]:
    pixel = picture.getpixel(place)
    assert isinstance(pixel, tuple)
    red, green, blue = pixel
    return int(red), int(green), int(blue)


def is_same_picture(one: Job, other: Job) -> bool:
    """Pixel for pixel; the files differ in the graph that ComfyUI writes into them."""
    return ImageChops.difference(open_picture(fetch(one["outputs"][0])), open_picture(fetch(other["outputs"][0]))).getbbox() is None


def test_a_prompt_becomes_a_picture_step_by_step(api: Api) -> None:
    job = api.create(prompt=PROMPT, width=512, height=512, seed=7)
    assert job["urls"]["self"] == f"{api.http.base_url}/v1/generations/{job['id']}"
    snapshot, *events = api.follow(job["id"])
    assert (snapshot.id, snapshot.kind, snapshot.data["id"]) == (None, "status", job["id"])
    positions = [event.position for event in events]
    assert positions == sorted(set(positions))
    assert [event.data["status"] for event in events if event.kind == "status"] == ["queued", "running", "succeeded"]
    steps = [event.data["step"] for event in events if event.kind == "progress" and event.data["current_node_class"] == "KSampler"]
    assert [step for step in steps if step is not None] == list(range(1, 21))
    values = [event.data["value"] for event in events if event.kind == "progress"]
    assert values == sorted(values)
    assert [event.kind for event in events[-2:]] == ["output", "status"]
    finished = events[-1].data
    assert strip_signatures(finished["outputs"]) == [strip_signatures(events[-2].data)]
    body = fetch(finished["outputs"][0])
    assert open_picture(body).size == (512, 512)
    assert hashlib.sha256(body).hexdigest() == finished["outputs"][0]["sha256"]
    assert finished["metrics"]["execution_ms"] > 0


def test_the_picture_shows_what_was_asked_for(api: Api) -> None:
    jobs = [api.create(prompt=PROMPT, width=256, height=256, seed=seed) for seed in range(5)]
    pictures = [open_picture(fetch(api.wait(job["id"])["outputs"][0])) for job in jobs]
    assert sum(map(is_red_circle_on_blue, pictures)) >= 4


def test_the_same_seed_gives_the_same_bytes(api: Api) -> None:
    one, same, other = (api.run(**QUICK, seed=seed, output_format="webp") for seed in (11, 11, 12))
    assert one["outputs"][0]["sha256"] == same["outputs"][0]["sha256"] != other["outputs"][0]["sha256"]
    assert one["id"] != same["id"]


def test_a_drawn_seed_is_recorded_and_repeats_the_picture(api: Api) -> None:
    drawn = api.run(**QUICK, output_format="webp")
    assert drawn["seed"] == drawn["parameters"]["seed"] >= 0
    again = api.run(**QUICK, output_format="webp", seed=drawn["seed"])
    assert again["outputs"][0]["sha256"] == drawn["outputs"][0]["sha256"]


def test_a_lora_at_zero_equals_none_and_at_one_differs(api: Api) -> None:
    body = {**QUICK, "prompt": "TOK", "seed": 3}
    none, zero, one = (api.run(**body, **extra) for extra in ({}, use_lora(0), use_lora(1)))
    assert zero["loras"] == [{"name": "tok", "weight": 0.0}]
    assert is_same_picture(none, zero)
    assert not is_same_picture(none, one)


def use_lora(weight: float) -> dict[str, Any]:
    return {"loras": [{"name": "tok", "weight": weight}]}


def test_two_pictures_of_one_job_differ(api: Api) -> None:
    job = api.run(**QUICK, seed=5, num_images=2)
    assert [output["index"] for output in job["outputs"]] == [0, 1]
    first, second = (fetch(output) for output in job["outputs"])
    assert ImageChops.difference(open_picture(first), open_picture(second)).getbbox() is not None


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_the_picture_comes_in_the_format_asked_for(api: Api, output_format: str) -> None:
    job = api.run(workflow="flux", **{**QUICK, "width": 320}, seed=1, output_format=output_format, quality=70)
    output = job["outputs"][0]
    assert output["content_type"] == f"image/{output_format}"
    assert (output["width"], output["height"]) == (320, 256)
    assert open_picture(fetch(output)).size == (320, 256)
    assert f".{output_format}?" in output["url"]


def test_the_graph_is_the_one_that_ran(api: Api, engine: str) -> None:
    job = api.run(**QUICK, seed=9, loras=[{"name": "tok", "weight": 0.5}])
    graph = read_graph(fetch(job["outputs"][0]))
    assert graph == api.graph(job["id"])
    assert count_saved(engine, job["id"]) == 1
    sampler = next(node for node in graph.values() if node["class_type"] == "KSampler")
    assert (sampler["inputs"]["seed"], sampler["inputs"]["steps"]) == (9, STEPS)
    lora = next(node for node in graph.values() if node["class_type"] == "LoraLoaderModelOnly")
    assert (lora["inputs"]["lora_name"], lora["inputs"]["strength_model"]) == ("tok.safetensors", 0.5)


def test_a_job_is_read_listed_and_signed_anew(api: Api) -> None:
    job = api.run(workflow="trivial", color=0x112233, metadata={"order": 17})
    read = api.get(job["id"])
    assert strip_signatures(read) == strip_signatures(job)
    assert (read["metadata"], read["attempts"], read["progress"]["value"]) == ({"order": 17}, 1, 1.0)
    listed = api.http.get("/v1/generations", params={"limit": 1}).json()["data"]
    assert strip_signatures(listed) == [strip_signatures(read)]
    assert read_pixel(open_picture(fetch(read["outputs"][0])), (5, 5)) == (0x11, 0x22, 0x33)


def test_what_waits_is_canceled_at_once_and_what_runs_is_interrupted(api: Api, engine: str) -> None:
    slow = {"workflow": "slow", "steps": 500, "delay_ms": 20}
    running, waiting, behind = (api.create(**slow) for _ in range(3))
    api.wait(running["id"], "running")
    wait_until(lambda: api.get(behind["id"])["queue_position"] == 0, "the second being taken")
    answer = api.http.post(f"/v1/generations/{behind['id']}/cancel").json()
    assert (answer["status"], answer["attempts"]) == ("canceled", 0)
    assert api.http.post(f"/v1/generations/{running['id']}/cancel").json()["status"] in ("canceling", "canceled")
    stopped = api.wait(running["id"], "canceled")
    assert (stopped["outputs"], stopped["error"]) == ([], None)
    # The one behind it was touched by neither: it goes on, and is stopped by its own cancel.
    api.wait(waiting["id"], "running")
    api.http.post(f"/v1/generations/{waiting['id']}/cancel")
    api.wait(waiting["id"], "canceled")
    assert [count_saved(engine, job["id"]) for job in (running, waiting, behind)] == [0, 0, 0]
    assert [event.data["status"] for event in api.replay(behind["id"])] == ["queued", "canceled"]
    again = api.http.post(f"/v1/generations/{running['id']}/cancel")
    assert (again.status_code, again.json()["status"]) == (200, "canceled")


def test_a_failed_node_is_named_without_paths(api: Api) -> None:
    job = api.wait(api.create(workflow="failing", kind="error")["id"])
    assert (job["status"], job["error"]["code"]) == ("failed", "node_error")
    assert "Breaks" in job["error"]["message"]
    assert "FailingImage" in job["error"]["message"]
    assert "/srv" not in str(job)
    *_, error, status = api.replay(job["id"])
    assert (error.kind, error.data, status.data["error"]) == ("error", job["error"], job["error"])


def test_running_out_of_memory_has_its_own_code(api: Api) -> None:
    job = api.wait(api.create(workflow="failing", kind="memory")["id"])
    assert (job["status"], job["error"]["code"]) == ("failed", "out_of_memory")
    assert job["error"]["hint"]


def test_delete_forgets_the_job_and_its_pictures(api: Api) -> None:
    job = api.run(workflow="trivial", num_images=2)
    urls = [output["url"] for output in job["outputs"]]
    assert [httpx.get(url).status_code for url in urls] == [200, 200]
    assert api.http.delete(f"/v1/generations/{job['id']}").json() == {"id": job["id"], "object": "generation.deleted"}
    assert [httpx.get(url).status_code for url in urls] == [404, 404]
    for path in ("", "/events", "/workflow"):
        assert api.http.get(f"/v1/generations/{job['id']}{path}").status_code == 404
    assert job["id"] not in [other["id"] for other in api.http.get("/v1/generations", params={"limit": 100}).json()["data"]]
    alive = api.create(workflow="slow", steps=200, delay_ms=20)
    refused = api.http.delete(f"/v1/generations/{alive['id']}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "job_not_ended")
    api.http.post(f"/v1/generations/{alive['id']}/cancel")
    api.wait(alive["id"], "canceled")


def test_the_deployment_says_what_it_is_and_has_done(api: Api) -> None:
    assert api.http.get("/health").json() == {"status": "ok"}
    ready = api.http.get("/ready")
    assert (ready.status_code, ready.json()) == (200, {"ready": True, "checks": {"redis": "ok", "storage": "ok", "instances": "ok"}})
    api.run(workflow="trivial")
    counted = 'fluxgate_jobs_total{code="",status="succeeded",workflow="trivial"}'
    wait_until(lambda: counted in api.http.get("/metrics").text, "the counting of a job")
    assert "fluxgate_job_queue_seconds_count" in api.http.get("/metrics").text
    (instance,) = api.http.get("/v1/instances").json()["data"]
    assert (instance["state"], instance["kind"]) == ("up", "built-in small model")
    assert [lora["name"] for lora in api.http.get("/v1/loras").json()["data"]] == ["tok"]
    ready_models = {model["id"] for model in api.http.get("/v1/models").json()["data"] if model["ready_on"]}
    assert ready_models == {"tinyflux"}
    assert {"flux", "trivial", "slow", "failing"} <= {entry["name"] for entry in api.http.get("/v1/workflows").json()["data"]}


def test_the_documented_example_of_a_workflow_runs(api: Api) -> None:
    example = api.http.get("/v1/workflows/trivial").json()["example"]
    answer = api.http.post("/v1/workflows/trivial/generations", json=example, headers={"Prefer": "wait=30"})
    assert (answer.status_code, answer.json()["status"]) == (200, "succeeded")
    assert "/v1/workflows/trivial/generations" in api.http.get("/openapi.json").json()["paths"]
    assert api.http.get("/docs").status_code == 200
