"""What would happen, told before it does; what it cost, told afterwards; and the same once more, compared pixel by pixel."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
import redis
from PIL import Image
from typer.testing import CliRunner

from fluxgate import Client
from fluxgate.cli import app
from gateway.reproduction import compare_pictures
from local.services import S3Server
from local.tinyflux.install import install_models
from tests.deployment import describe_deployment, make_gateway, running
from tests.journeys.api import Api, Job, wait_until

PRICE = 3.6


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the engine's."""
    folder = tmp_path_factory.mktemp("models")
    install_models(folder)
    return folder


@pytest.fixture(scope="module")
def env(redis_server: str, s3_server: S3Server, engine: str, models_dir: Path) -> dict[str, str]:
    changes = {"PRICE_PER_GPU_HOUR": str(PRICE), "CACHE_TTL_S": "3600", "MODELS_DIR": str(models_dir)}
    return describe_deployment(redis_server, s3_server, engine, **changes)


@pytest.fixture(scope="module")
def api(env: dict[str, str], redis_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with redis.Redis.from_url(redis_server) as connection:
        connection.flushall()
    gateway = make_gateway(tmp_path_factory.mktemp("gateway"), env)
    with running(gateway):
        caller = Api(gateway.url)
        with caller.http:
            yield caller


def preview(api: Api, **body: Any) -> dict[str, Any]:
    answer = api.http.post("/v1/generations/preview", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def run_uncached(api: Api, **body: Any) -> Job:
    return api.run(**body, cache="off")


def test_a_preview_tells_the_job_that_would_be_made_and_makes_none(api: Api) -> None:
    # What an instance has is published every few seconds; until then nobody knows of any.
    wait_until(lambda: preview(api, workflow="trivial")["instance"] is not None, "the instance's facts")
    before = api.http.get("/v1/generations").json()["data"]
    told = preview(api, workflow="trivial", color=0x123456)
    assert told["parameters"] == {"size": 64, "color": 0x123456, "num_images": 1}
    assert (told["cache"], told["cache_job"], told["queue_position"]) == ("miss", None, 0)
    assert told["instance"] in [one["id"] for one in api.http.get("/v1/instances").json()["data"]]
    assert api.http.get("/v1/generations").json()["data"] == before
    made = api.graph(run_uncached(api, workflow="trivial", color=0x123456)["id"])
    assert [node["class_type"] for node in told["graph"].values()] == [node["class_type"] for node in made.values()]
    assert [node["inputs"] | {"filename_prefix": 0} for node in told["graph"].values()] == [
        node["inputs"] | {"filename_prefix": 0} for node in made.values()
    ]


def test_it_says_when_nothing_was_measured_and_estimates_from_medians_when_it_was(api: Api) -> None:
    body = {"workflow": "slow", "steps": 3, "delay_ms": 20}
    told = preview(api, **body)
    assert told["estimate"] == {"seconds": None, "run_s": None, "load_s": None, "basis": "nothing measured yet", "measured": 0}
    assert told["cost"] == {"gpu_seconds": None, "price_per_gpu_hour": PRICE, "amount": None}
    jobs = [run_uncached(api, **body) for _ in range(3)]
    wait_until(lambda: preview(api, **body)["estimate"]["measured"] == 3, "the measurements' arrival")
    told = preview(api, **body)
    ran = sorted(job["metrics"]["execution_ms"] - (job["metrics"]["load_ms"] or 0) for job in jobs)
    assert told["estimate"]["basis"] == "same work on the same device"
    assert told["estimate"]["run_s"] == ran[1] / 1000
    assert told["cost"]["amount"] == pytest.approx(told["cost"]["gpu_seconds"] * PRICE / 3600, abs=1e-6)
    scaled = preview(api, **{**body, "steps": 30})["estimate"]
    assert scaled["basis"] == "scaled from other sizes and steps"
    assert scaled["run_s"] == pytest.approx(10 * sorted(ran)[1] / 1000, rel=0.01)


def test_a_job_carries_its_real_cost_and_a_cached_one_costs_nothing(api: Api) -> None:
    job = api.run(workflow="slow", steps=2, delay_ms=10, color=77)
    gpu_seconds = job["metrics"]["execution_ms"] / 1000
    assert job["cost"] == {"gpu_seconds": gpu_seconds, "price_per_gpu_hour": PRICE, "amount": round(gpu_seconds / 3600 * PRICE, 6)}
    told = preview(api, workflow="slow", steps=2, delay_ms=10, color=77)
    assert (told["cache"], told["cache_job"]) == ("hit", job["id"])
    assert (told["estimate"]["seconds"], told["cost"]["amount"]) == (0.0, 0.0)
    again = api.http.post("/v1/generations", json={"workflow": "slow", "steps": 2, "delay_ms": 10, "color": 77}).json()
    assert again["cached"]
    assert again["cost"]["amount"] == 0.0
    assert again["manifest"] == job["manifest"], "it is the picture of that job"
    assert preview(api, workflow="slow", steps=2, delay_ms=10, color=77, cache="off")["cache"] == "off"
    assert preview(api, workflow="slow", steps=2, delay_ms=10, color=77, cache="refresh")["cache"] == "miss"


def test_it_sees_who_waits_and_who_is_at_it(api: Api) -> None:
    long = [api.create(workflow="slow", steps=200, delay_ms=50, color=color) for color in range(4)]
    api.wait(long[0]["id"], "running")
    told = preview(api, workflow="slow", steps=200, delay_ms=50, color=3)
    assert (told["cache"], told["cache_job"]) == ("in_flight", long[3]["id"])
    assert told["queue_position"] == 2, "two run or wait on the instance, two wait here"
    assert preview(api, workflow="trivial", priority="high")["queue_position"] == 0
    for job in long:
        api.http.post(f"/v1/generations/{job['id']}/cancel")
    for job in long:
        api.wait(job["id"])


def test_a_preview_refuses_what_a_generation_refuses(api: Api) -> None:
    for body in ({"workflow": "trivial", "color": -1}, {"workflow": "none"}, {"workflow": "trivial", "colour": 1}):
        refused, same = (api.http.post(f"/v1/generations{path}", json=body) for path in ("/preview", ""))
        assert (refused.status_code, refused.json()) == (same.status_code, same.json())


# -- reproduction ----------------------------------------------------------------------------------------------------


def compare(api: Api, job: Job) -> dict[str, Any]:
    answer = api.http.get(f"/v1/generations/{job['id']}/comparison")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def reproduce(api: Api, job: Job) -> Job:
    answer = api.http.post(f"/v1/generations/{job['id']}/reproduce")
    assert answer.status_code == 202, answer.text
    again = api.wait(answer.json()["id"])
    assert again["status"] == "succeeded"
    return again


@pytest.fixture
def hashes(api: Api) -> None:
    """The models' files were read, which goes on beside the first jobs."""

    def are_known() -> bool:
        job = api.run(workflow="flux", prompt="a red circle", width=256, height=256, steps=1, cache="off")
        return all(model["sha256"] for model in job["manifest"]["models"])

    wait_until(are_known, "the hashes of the models' files")


@pytest.mark.usefixtures("hashes")
def test_a_manifest_names_everything_that_made_the_picture(api: Api, models_dir: Path) -> None:
    job = api.run(workflow="flux", prompt="a red circle", seed=7, width=256, height=256, steps=2)
    manifest = job["manifest"]
    assert (manifest["seed"], manifest["workflow"], manifest["workflow_version"]) == (7, "flux", job["workflow_version"])
    assert {model["node_class"] for model in manifest["models"]} == {"UNETLoader", "DualCLIPLoader", "VAELoader"}
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in models_dir.rglob("*.safetensors")}
    assert [model["sha256"] for model in manifest["models"]] == [files[model["file"]] for model in manifest["models"]]
    made_on = manifest["made_on"]
    assert made_on["instance"] == job["instance"]
    assert all(made_on[name] for name in ("device", "comfyui_version", "torch_version")), made_on
    other = api.run(workflow="flux", prompt="a red circle", seed=7, width=256, height=256, steps=2, cache="off")
    assert other["manifest"] == manifest
    third = api.run(workflow="flux", prompt="a red circle", seed=8, width=256, height=256, steps=2)
    assert third["manifest"]["graph_sha256"] != manifest["graph_sha256"]


@pytest.mark.usefixtures("hashes")
def test_the_same_graph_makes_the_same_pixels_again(api: Api) -> None:
    job = api.run(workflow="flux", prompt="a red circle", seed=11, width=256, height=256, steps=2, num_images=2)
    again = reproduce(api, job)
    assert (again["reproduces"], again["cached"], again["seed"]) == (job["id"], False, 11)
    found = compare(api, again)
    assert found["same_pixels"], found
    assert found["message"] == "Every pixel of 2 pictures is the same."
    assert [picture["max_difference"] for picture in found["pictures"]] == [0.0, 0.0]
    assert found["changed"] == {}
    assert found["unverified"] == []


def test_a_reproduction_with_a_key_runs_once(api: Api) -> None:
    job = api.run(workflow="trivial", color=5)
    other = api.run(workflow="trivial", color=6)

    def ask(job_id: str) -> httpx.Response:
        return api.http.post(f"/v1/generations/{job_id}/reproduce", headers={"Idempotency-Key": "once"})

    first, second = ask(job["id"]), ask(job["id"])
    assert (first.status_code, first.headers.get("idempotency-replayed")) == (202, None)
    assert (second.status_code, second.headers.get("idempotency-replayed"), second.json()) == (202, "true", first.json())
    reused = ask(other["id"])
    assert (reused.status_code, reused.json()["error"]["code"]) == (422, "idempotency_key_reuse")
    api.wait(first.json()["id"])
    api.http.delete(f"/v1/generations/{job['id']}")
    assert ask(job["id"]).json() == first.json(), "what was answered is answered again, whatever became of the first job"


def test_other_pixels_are_told_with_how_far_off_they_are(api: Api, env: dict[str, str]) -> None:
    """The stored picture is changed behind everybody's back: that is what a comparison is for."""
    job = api.run(workflow="trivial", color=0x808080, size=16)
    again = reproduce(api, job)
    target = io.BytesIO()
    Image.new("RGB", (16, 16), (0x80, 0x80, 0x86)).save(target, "PNG")
    s3 = boto3.client(
        "s3",
        endpoint_url=env["S3_ENDPOINT_URL"],
        aws_access_key_id=env["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=env["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    s3.put_object(Bucket=env["S3_BUCKET"], Key=f"generations/{job['id']}/0.png", Body=target.getvalue())
    found = compare(api, again)
    assert not found["same_pixels"]
    assert found["message"].startswith("The pixels differ: by at most 6 of 255, 2 on average. Nothing that is recorded differs;")


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        (("RGB", (4, 4), (9, 9, 9)), ("RGB", (4, 4), (9, 9, 9)), (True, 0.0, 0.0)),
        (("RGB", (4, 4), (9, 9, 9)), ("RGB", (4, 4), (0, 9, 9)), (False, 9.0, 3.0)),
        (("L", (4, 4), 5), ("L", (4, 4), 7), (False, 2.0, 2.0)),
        (("RGB", (4, 4), (9, 9, 9)), ("RGB", (4, 5), (9, 9, 9)), (False, None, None)),
        (("RGB", (4, 4), (9, 9, 9)), ("L", (4, 4), 9), (False, None, None)),
    ],
)
def test_pictures_are_compared_by_pixels(one: Any, other: Any, found: tuple[bool, float | None, float | None]) -> None:
    files = []
    for number, drawn in enumerate((one, other)):
        target = io.BytesIO()
        # The same pixels in other bytes: compressed less.
        Image.new(*drawn).save(target, "PNG", compress_level=number * 9)
        files.append(target.getvalue())
    difference = compare_pictures(*files)
    assert (difference.same_pixels, difference.max_difference, difference.mean_difference) == found
    assert not compare_pictures(files[0], b"no picture").same_pixels


def test_what_has_no_pictures_is_not_reproduced(api: Api) -> None:
    canceled = api.create(workflow="slow", steps=500, delay_ms=20)
    api.http.post(f"/v1/generations/{canceled['id']}/cancel")
    api.wait(canceled["id"])
    refused = api.http.post(f"/v1/generations/{canceled['id']}/reproduce")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "job_not_succeeded")
    plain = api.run(workflow="trivial", color=1)
    refused = api.http.get(f"/v1/generations/{plain['id']}/comparison")
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "no_reproduction")


def test_the_command_line_reproduces_and_says_so(api: Api) -> None:
    job = api.run(workflow="trivial", color=0x00FF00)
    outcome = CliRunner().invoke(app, ["--url", str(api.http.base_url), "reproduce", job["id"]])
    assert outcome.exit_code == 0, outcome.output
    assert "Every pixel of 1 picture is the same." in outcome.stdout
    with Client(str(api.http.base_url)) as client:
        assert json.dumps(client.preview(workflow="trivial", color=1)["graph"])
