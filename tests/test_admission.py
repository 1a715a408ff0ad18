"""What is decided when a job is accepted, seen before anything runs: no dispatcher is there, so every job waits."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from local.services import Gateway, S3Server
from tests.deployment import describe_deployment, make_dispatcher, make_gateway, running, wait_for_answers

GENERATIONS = "/v1/generations"
PROMPT: dict[str, Any] = {"prompt": "a red circle"}
DRAWN: list[dict[str, Any]] = [{}, {}, {"seed": -1}, {"seed": -1}]


@pytest.fixture(scope="module")
def deployment(redis_server: str, s3_server: S3Server, engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway whose dispatcher has described the engine and died since."""
    with redis.Redis.from_url(redis_server) as connection:
        connection.flushall()
    folder = tmp_path_factory.mktemp("admission")
    env = describe_deployment(redis_server, s3_server, engine, DISPATCHER="off")
    gateway = make_gateway(folder, env)
    dispatcher = make_dispatcher(folder, env, gateway.url)
    gateway.start()
    try:
        wait_for_answers(gateway)
        with running(dispatcher):
            dispatcher.kill()
        yield gateway
    finally:
        gateway.stop()


@pytest.fixture(scope="module")
def http(deployment: Gateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=deployment.url, timeout=30.0) as client:
        yield client


def create(http: httpx.Client, path: str = GENERATIONS, **body: Any) -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code == 202, answer.text
    job = dict(answer.json())
    assert (job["status"], job["attempts"], job["outputs"], job["error"]) == ("queued", 0, [], None)
    return job


def read_graph(http: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    """The job's graph by title, the job's own id taken out of it."""
    text = http.get(f"{GENERATIONS}/{job['id']}/workflow").text
    assert text.count(job["id"]) == 1
    return {node["_meta"]["title"]: node for node in httpx.Response(200, text=text.replace(job["id"], "ID")).json().values()}


def test_everything_left_out_gets_the_value_that_the_base_model_asks_for(http: httpx.Client) -> None:
    job = create(http, **PROMPT)
    seed = job["parameters"].pop("seed")
    assert (job["workflow"], job["base_model"], job["seed"]) == ("flux", "tinyflux", seed)
    assert job["parameters"] == {
        "prompt": "a red circle",
        "negative_prompt": "",
        "width": 1024,
        "height": 1024,
        "steps": 20,
        "guidance_scale": 3.5,
        "true_cfg_scale": 1.0,
        "num_images": 1,
        "sampler": "euler",
        "scheduler": "simple",
        "output_format": "png",
        "quality": 90,
    }
    graph = read_graph(http, job)
    assert graph["Sampler"]["inputs"] | {"seed": seed, "steps": 20, "cfg": 1.0} == graph["Sampler"]["inputs"]
    assert graph["Base model"]["inputs"]["unet_name"] == "tinyflux.safetensors"
    assert graph["Save"]["inputs"]["filename_prefix"] == "ID/image"


def test_a_seed_is_drawn_anew_unless_it_is_given(http: httpx.Client) -> None:
    drawn = [create(http, **PROMPT, **extra)["seed"] for extra in DRAWN]
    assert len(set(drawn)) == 4
    assert all(0 <= seed < 2**63 for seed in drawn)
    assert [create(http, **PROMPT, seed=seed)["seed"] for seed in (0, 2**63 - 1)] == [0, 2**63 - 1]


def test_what_a_job_may_ask_for_is_its_workflows_own(http: httpx.Client) -> None:
    refused = http.post(GENERATIONS, json={"workflow": "trivial", **PROMPT})
    assert (refused.status_code, refused.json()["error"]["details"]["parameter"]) == (422, "prompt")
    assert create(http, workflow="trivial")["parameters"] == {"size": 64, "color": 255, "num_images": 1}


def test_loras_are_chained_in_the_order_asked_for(http: httpx.Client) -> None:
    none, one = read_graph(http, create(http, **PROMPT)), read_graph(http, create(http, **PROMPT, loras=[{"name": "tok", "weight": -0.5}]))
    assert "LoRA" not in none
    assert one["LoRA"]["inputs"] | {"lora_name": "tok.safetensors", "strength_model": -0.5} == one["LoRA"]["inputs"]
    assert none.keys() | {"LoRA"} == one.keys()
    assert none["Sampler"]["inputs"]["model"] != one["Sampler"]["inputs"]["model"]


def test_the_typed_route_admits_the_same_job(http: httpx.Client) -> None:
    body = {**PROMPT, "seed": 4, "steps": 3, "priority": "low", "metadata": {"a": [1]}}
    general, typed = create(http, workflow="flux", **body), create(http, "/v1/workflows/flux/generations", **body)
    assert read_graph(http, general) == read_graph(http, typed)
    for name in ("parameters", "priority", "metadata", "workflow", "workflow_version", "base_model"):
        assert general[name] == typed[name]


def test_a_refusal_stores_nothing(http: httpx.Client, redis_server: str) -> None:
    with redis.Redis.from_url(redis_server) as connection:
        before = connection.zcard("fluxgate:jobs")
        for body in ({}, {**PROMPT, "steps": 0}, {**PROMPT, "base_model": "flux1-dev"}, {**PROMPT, "loras": [{"name": "nothing"}]}):
            assert http.post(GENERATIONS, json=body).status_code in (404, 422, 503)
        assert connection.zcard("fluxgate:jobs") == before


def test_higher_priorities_wait_in_front_and_a_cancel_moves_the_rest_up(http: httpx.Client) -> None:
    def place(job: dict[str, Any]) -> int:
        return int(http.get(f"{GENERATIONS}/{job['id']}").json()["queue_position"])

    low, normal, high, higher = (create(http, workflow="trivial", priority=name) for name in ("low", "normal", "high", "high"))
    assert (place(high), place(higher)) == (0, 1)
    assert place(higher) < place(normal) < place(low)
    behind = place(low)
    canceled = http.post(f"{GENERATIONS}/{high['id']}/cancel").json()
    assert (canceled["status"], canceled["queue_position"]) == ("canceled", None)
    assert (place(higher), place(low)) == (0, behind - 1)


def test_a_restart_leaves_jobs_and_graphs_as_they_were(http: httpx.Client, deployment: Gateway) -> None:
    job = create(http, **PROMPT, metadata={"kept": True})
    graph = http.get(f"{GENERATIONS}/{job['id']}/workflow").content
    deployment.kill()
    deployment.start()
    wait_for_answers(deployment)
    # A new client: the old one's connections died with the process.
    with httpx.Client(base_url=deployment.url) as later:
        assert later.get(f"{GENERATIONS}/{job['id']}/workflow").content == graph
        now = later.get(f"{GENERATIONS}/{job['id']}").json()
    assert {name: now[name] for name in ("id", "seed", "parameters", "metadata", "status", "created_at")} == {
        name: job[name] for name in ("id", "seed", "parameters", "metadata", "status", "created_at")
    }


def test_the_same_key_and_body_make_one_job_however_many_come_at_once(http: httpx.Client) -> None:
    def send(body: dict[str, Any]) -> httpx.Response:
        return http.post(GENERATIONS, json=body, headers={"Idempotency-Key": "order-17"})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(send, [PROMPT] * 16))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum(answer.headers.get("idempotency-replayed") != "true" for answer in answers) == 1
    other = send({**PROMPT, "seed": 1})
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reuse")
    for key in ("", "x" * 256):
        refused = http.post(GENERATIONS, json=PROMPT, headers={"Idempotency-Key": key})
        assert (refused.status_code, refused.json()["error"]["details"]["parameter"]) == (400, "Idempotency-Key")


@pytest.mark.parametrize(("setting", "code"), [("MAX_JOBS_PER_CALLER", "too_many_jobs"), ("MAX_QUEUE_DEPTH", "queue_full")])
def test_above_a_limit_new_jobs_are_put_off(
    redis_url: str, s3_server: S3Server, engine: str, tmp_path: Path, setting: str, code: str
) -> None:
    gateway = make_gateway(tmp_path, describe_deployment(redis_url, s3_server, engine, DISPATCHER="off", **{setting: "2"}))
    gateway.start()
    try:
        wait_for_answers(gateway)
        with httpx.Client(base_url=gateway.url) as http:
            first, _ = create(http, workflow="trivial"), create(http, workflow="trivial")
            refused = http.post(GENERATIONS, json={"workflow": "trivial"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, code)
            assert int(refused.headers["retry-after"]) > 0
            http.post(f"{GENERATIONS}/{first['id']}/cancel")
            create(http, workflow="trivial")
    finally:
        gateway.stop()
