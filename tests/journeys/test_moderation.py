"""A deployment with a judge: what it refuses is queued at no door, and a picture that it refuses is nowhere to be seen."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import redis
from PIL import Image

from gateway.loras.registry import Lora
from local.services import S3Server
from local.tinyflux.weights import MODEL_DIR
from tests.deployment import describe_deployment, make_gateway, running, wait_for_answers
from tests.journeys.api import Api, fetch, wait_until
from tests.moderator import WORD, Moderator, running_moderator

Json = dict[str, Any]
RED, BLUE = 0xFF0000, 0x0000FF
SECRET = "the secret of the moderation endpoint"
SIZE: Json = {"width": 256, "height": 256, "steps": 1}
SMALL: Json = {"workflow": "flux", **SIZE}
SMALL_BATCH: Json = {"workflow": "flux", "parameters": SIZE}
BAD = f"a {WORD} cat"
# Looked at, or made by the clock, whatever comes in.
RESTLESS = ("fluxgate:usage", "fluxgate:instance", "fluxgate:loras", "fluxgate:catalog", "fluxgate:warm", "fluxgate:node", "rq:")


@dataclass
class Hall:
    api: Api
    judge: Moderator
    bucket: Path
    redis_url: str
    log_path: Path
    unjudged: Json  # a red picture, drawn before there was a judge
    unjudged_text: Json  # as old, for a text that the judge refuses

    def kept(self) -> tuple[set[str], set[str]]:
        """Names in Redis, and files in the bucket."""
        with redis.Redis.from_url(self.redis_url) as connection:
            names = {name.decode() for name in connection.scan_iter()}
        return {name for name in names if not name.startswith(RESTLESS)}, {str(path) for path in self.bucket.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def hall(redis_server: str, s3_server: S3Server, engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hall]:
    with redis.Redis.from_url(redis_server) as connection:
        connection.flushall()
    folder = tmp_path_factory.mktemp("gateway")
    more = {"TRAINER": "tiny", "BASE_MODEL_PATHS": json.dumps({"tinyflux": str(MODEL_DIR)}), "CACHE_TTL_S": "600"}
    env = describe_deployment(redis_server, s3_server, engine, **more)
    with running(free := make_gateway(folder, env)):
        api = Api(free.url)
        with api.http:
            unjudged = api.run(workflow="trivial", color=RED, cache="refresh")
            unjudged_text = api.run(**SMALL, prompt=BAD)
    with running_moderator() as judge:
        gateway = make_gateway(folder, {**env, "MODERATION": judge.url, "MODERATION_SECRET": SECRET, "MODERATION_TIMEOUT_S": "5"})
        with running(gateway):
            api = Api(gateway.url)
            with api.http:
                yield Hall(api, judge, s3_server.data_dir / env["S3_BUCKET"], redis_server, gateway.log_path, unjudged, unjudged_text)


# -- before ----------------------------------------------------------------------------------------------------


def raw(text: str, *colors: int) -> Json:
    graph: Json = {"9": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["8", 0], "text": text}}} if text else {}
    graph |= {"8": {"class_type": "CLIPLoader", "inputs": {"clip_name": "tinyflux.safetensors", "type": "flux"}}} if text else {}
    for place, color in enumerate(colors):
        size = {"width": 64, "height": 64, "batch_size": 1, "color": color}
        graph[f"1{place}"] = {"class_type": "EmptyImage", "inputs": size}
        graph[f"2{place}"] = {"class_type": "SaveImage", "inputs": {"images": [f"1{place}", 0], "filename_prefix": "x"}}
    return {"workflow": graph}


DOORS: list[tuple[str, str, Json, str]] = [
    ("generation", "/v1/generations", {**SMALL, "prompt": BAD}, "prompt"),
    ("what is not wanted", "/v1/generations", {**SMALL, "prompt": "x", "negative_prompt": BAD}, "negative_prompt"),
    ("generation that waits", "/v1/generations", {**SMALL, "prompt": BAD, "cache": "off"}, "prompt"),
    ("workflow", "/v1/workflows/flux/generations", {"prompt": BAD}, "prompt"),
    ("preview", "/v1/generations/preview", {**SMALL, "prompt": BAD}, "prompt"),
    ("batch", "/v1/batches", {**SMALL_BATCH, "sweep": {"prompt": ["x", BAD, "y"]}}, "prompt"),
    ("raw graph", "/api/v2/jobs", raw(BAD, BLUE), "workflow"),
]


@pytest.mark.parametrize(("path", "body", "parameter"), [door[1:] for door in DOORS], ids=[door[0] for door in DOORS])
def test_a_prompt_is_refused_at_every_door_and_nothing_is_queued(hall: Hall, path: str, body: Json, parameter: str) -> None:
    before = hall.kept()
    answer = hall.api.http.post(path, json=body, headers={"Prefer": "wait=5", "Idempotency-Key": f"moderated {path}"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (422, "moderated"), error
    told = {name: error["details"][name] for name in ("parameter", "stage", "reason", "categories")}
    assert told == {"parameter": parameter, "stage": "prompt", "reason": "that word", "categories": ["words"]}
    assert hall.kept() == before
    assert any(BAD in asked["texts"] and asked["caller"] == "local" for asked in hall.judge.of("prompt"))
    assert hall.judge.headers[-1]["Authorization"] == f"Bearer {SECRET}"


def test_of_a_batch_the_items_that_are_refused_are_named(hall: Hall) -> None:
    body = {**SMALL_BATCH, "sweep": {"prompt": ["x", BAD, "y", f"{BAD} too"]}}
    details = hall.api.http.post("/v1/batches", json=body).json()["error"]["details"]
    assert (details["item"], [(item["item"], item["code"]) for item in details["items"]]) == (1, [(1, "moderated"), (3, "moderated")])


@pytest.mark.parametrize("stream", [False, True])
def test_openais_client_is_told_in_its_own_words(hall: Hall, stream: bool) -> None:
    client = openai.OpenAI(base_url=f"{str(hall.api.http.base_url).rstrip(chr(47))}/v1", api_key="none", max_retries=0)
    before = hall.kept()
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt=BAD, model="flux", size="256x256", stream=stream)
    assert (refused.value.code, refused.value.param, refused.value.type) == ("moderation_blocked", "prompt", "invalid_request_error")
    picture = io.BytesIO()
    Image.new("RGB", (256, 256), "blue").save(picture, "PNG")
    with pytest.raises(openai.BadRequestError, match="moderation"):
        client.images.edit(image=("a.png", picture.getvalue(), "image/png"), prompt=BAD)
    assert hall.kept() == before


@pytest.mark.parametrize(
    ("changes", "parameter"),
    [({"sample_prompts": ["x", BAD]}, "sample_prompts"), ({"trigger_word": WORD}, "trigger_word"), ({}, "dataset")],
)
def test_a_training_is_refused_for_what_it_would_learn_or_draw(hall: Hall, changes: Json, parameter: str) -> None:
    picture = io.BytesIO()
    Image.effect_noise((128, 128), 50).convert("RGB").save(picture, "PNG")
    caption = BAD if parameter == "dataset" else "a TOK cat"
    files = [("files", ("a.png", picture.getvalue(), "image/png")), ("files", ("a.txt", caption.encode(), "text/plain"))]
    dataset = hall.api.http.post("/v1/datasets", data={"name": "set"}, files=files)
    assert dataset.status_code == 201, dataset.text
    body = {"name": "own", "dataset": dataset.json()["id"], "base": "tinyflux", "resolution": 64, "steps": 5, **changes}
    answer = hall.api.http.post("/v1/trainings", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["details"].get("parameter")) == (422, "moderated", parameter), error
    assert hall.api.http.get("/v1/trainings").json()["data"] == []


def test_a_text_that_is_refused_by_now_is_not_run_again(hall: Hall) -> None:
    before = hall.kept()
    answer = hall.api.http.post(f"/v1/generations/{hall.unjudged_text['id']}/reproduce")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["details"]["parameter"]) == (422, "moderated", "workflow"), error
    assert hall.kept() == before


def test_a_lora_whose_words_are_refused_is_kept_without_pictures(hall: Hall) -> None:
    """One that was published before there was a judge; on the instance there is a file of its name."""
    words = f"a {WORD} thing"
    lora = Lora(name="tok", file="tok.safetensors", owner="local", base_model="tinyflux", trigger_word=words)
    before = hall.api.http.get("/v1/generations").json()["data"]
    with redis.Redis.from_url(hall.redis_url) as connection:
        connection.hset("fluxgate:published", lora.file, lora.model_dump_json(exclude={"instances"}))
        try:
            wait_until(lambda: any(words in asked["texts"] for asked in hall.judge.of("prompt")), "the judge to be asked")
            wait_until(lambda: "before and after are refused by moderation" in hall.log_path.read_text(), "what is said of it")
            shown = hall.api.http.get("/v1/loras/tok").json()
            assert (shown["trigger_word"], shown["before"], shown["after"]) == (words, None, None)
        finally:
            connection.hdel("fluxgate:published", lora.file)
            connection.delete(f"fluxgate:pictures:{lora.file}")
    assert [job["id"] for job in hall.api.http.get("/v1/generations").json()["data"]] == [job["id"] for job in before]
    assert words not in hall.log_path.read_text()


def test_while_the_judge_does_not_answer_nothing_is_queued(hall: Hall) -> None:
    hall.judge.answers[:] = [(500, b"", 0.0)]
    before = hall.kept()
    answer = hall.api.http.post("/v1/generations", json={**SMALL, "prompt": "nobody can tell"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "moderation_unavailable")
    assert hall.kept() == before


# -- after -----------------------------------------------------------------------------------------------------


def end(hall: Hall, **body: Any) -> Json:
    return hall.api.wait(hall.api.create(**body)["id"])


def files_of(hall: Hall, job: Json) -> list[Path]:
    return [path for path in hall.bucket.rglob("*") if job["id"] in str(path) and path.is_file()]


def test_a_picture_that_is_refused_is_stored_and_shown_nowhere(hall: Hall) -> None:
    job = end(hall, workflow="trivial", color=RED, metadata={"try": 1})
    assert (job["status"], job["error"]["code"], job["outputs"]) == ("failed", "moderated", [])
    assert job["error"]["details"] == {"stage": "picture", "reason": "too red", "categories": ["red"]}
    asked = hall.judge.of("picture")[-1]
    assert (asked["job"], asked["caller"], asked["workflow"], asked["picture"]["content_type"]) == (
        job["id"],
        "local",
        "trivial",
        "image/png",
    )
    assert files_of(hall, job) == []
    events = hall.api.replay(job["id"])
    assert [event.data["code"] for event in events if event.kind == "error"] == ["moderated"]
    assert not [event for event in events if event.kind in ("output", "preview")]


def test_a_picture_that_is_allowed_is_the_one_that_was_judged(hall: Hall) -> None:
    job = end(hall, workflow="trivial", color=BLUE)
    assert job["status"] == "succeeded"
    asked = hall.judge.of("picture")[-1]
    assert (asked["picture"]["bytes"], asked["picture"]["content_type"]) == (fetch(job["outputs"][0]), "image/png")


def test_one_picture_that_is_refused_takes_the_others_of_its_job_along(hall: Hall) -> None:
    job = hall.api.http.post("/api/v2/jobs", json=raw("", BLUE, RED, BLUE)).json()
    ended: Json = {}
    wait_until(lambda: ended.update(hall.api.http.get(f"/api/v2/jobs/{job['id']}").json()) or ended["status"] == "failed", "its end")
    assert (ended["error"]["code"], ended["outputs"]) == ("moderated", [])
    assert files_of(hall, job) == []


def test_no_preview_is_shown_before_the_picture_is_judged(hall: Hall) -> None:
    job = hall.api.create(workflow="slow", steps=12, delay_ms=40, color=RED)
    with hall.api.http.stream("GET", f"/v1/generations/{job['id']}/events", params={"previews": "1"}) as stream:
        said = stream.read().decode()
    assert "event: progress" in said
    assert "event: preview" not in said
    assert hall.api.get(job["id"])["error"]["code"] == "moderated"


def test_what_was_drawn_before_there_was_a_judge_answers_nobody(hall: Hall) -> None:
    """It was remembered, as a second time shows of what was judged."""
    assert hall.unjudged["status"] == "succeeded"
    again = end(hall, workflow="trivial", color=RED)
    assert (again["status"], again["cached"]) == ("failed", False)
    asked = {"workflow": "trivial", "color": 0x0000EE}
    hall.api.run(**asked)
    assert hall.api.http.post("/v1/generations", json=asked).json()["cached"] is True


def test_a_twin_of_a_refused_picture_is_judged_itself(hall: Hall) -> None:
    slow = {"workflow": "slow", "steps": 10, "delay_ms": 30, "color": RED, "size": 32}
    ended = [hall.api.wait(job["id"]) for job in [hall.api.create(**slow) for _ in range(2)]]
    assert [(job["status"], job["error"]["code"]) for job in ended] == [("failed", "moderated")] * 2


def test_a_job_that_was_good_is_judged_again_when_it_is_run_again(hall: Hall) -> None:
    answer = hall.api.http.post(f"/v1/generations/{hall.unjudged['id']}/reproduce")
    assert answer.status_code == 202, answer.text
    assert hall.api.wait(answer.json()["id"])["error"]["code"] == "moderated"


def test_openais_client_is_told_of_a_refused_picture(hall: Hall) -> None:
    client = openai.OpenAI(base_url=f"{str(hall.api.http.base_url).rstrip(chr(47))}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="x", model="trivial", extra_body={"color": RED})
    assert refused.value.code == "moderation_blocked"


def test_a_picture_that_nobody_judges_is_not_shown(hall: Hall) -> None:
    tries = len(hall.judge.of("picture"))
    job = hall.api.create(workflow="trivial", color=0x0000DD)
    # The texts of a workflow without any are not asked about: these answers are for the picture.
    hall.judge.answers[:] = [(500, b"", 0.0)] * 3
    ended = hall.api.wait(job["id"])
    assert (ended["status"], ended["error"]["code"], ended["outputs"]) == ("failed", "moderation_unavailable", [])
    assert len(hall.judge.of("picture")) == tries + 3, "it was tried more than once"
    assert files_of(hall, ended) == []


# -- a list of words -------------------------------------------------------------------------------------------


def test_a_block_list_needs_nothing_but_a_file(redis_server: str, s3_server: S3Server, engine: str, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text(f"# ours\n{WORD}\n")
    changes = {"MODERATION": "blocklist", "MODERATION_BLOCKLIST": str(words), "DISPATCHER": "off"}
    gateway = make_gateway(tmp_path, describe_deployment(redis_server, s3_server, engine, **changes))
    gateway.start()
    try:
        wait_for_answers(gateway)
        with httpx.Client(base_url=gateway.url) as http:
            refused = http.post("/v1/generations", json={**SMALL, "prompt": "a F.O.R.B.I.D.D.E.N cat"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (422, "moderated")
            assert http.post("/v1/generations", json={**SMALL, "prompt": "a cat"}).status_code == 202
        assert WORD not in gateway.log_path.read_text()
    finally:
        gateway.stop()
