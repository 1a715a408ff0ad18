"""Secrets are planted wherever a deployment takes one; then everything it said and kept is searched for them. All of its processes log
as much as they can. What is found is mended where it leaks: the few places that must hold a secret are named here, each with its reason."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from local.child import pick_free_port
from local.services import Engine, Gateway, RedisServer, S3Server, TrainerWorker
from local.tinyflux.weights import MODEL_DIR
from tests.callers import make_key
from tests.conftest import choose_engine_flags
from tests.deployment import describe_deployment, make_dispatcher, make_gateway, running, wait_for_answers
from tests.hub_accounts import account
from tests.hub_server import running_hub
from tests.journeys.api import TERMINAL, Api, wait_until
from tests.journeys.belongings import RAW
from tests.journeys.planted import Heard, Planted, read_files, read_redis
from tests.journeys.studio import draw_png, zip_pictures
from tests.webhook_receiver import Receiver

Json = dict[str, Any]
LORA = next((MODEL_DIR.parent / "loras").glob("*tok*.safetensors"))
SMALL: Json = {"workflow": "flux", "width": 256, "height": 256, "steps": 1, "seed": 1}
# Where a secret must be, by what it is and the Redis value that holds it.
KEPT = {
    (
        "the secret of a webhook",
        r"fluxgate:job:\S+ webhook",
    ): "the job's end is signed with it, maybe a day from now",
    ("the secret of a webhook", r"fluxgate:batch:\S+ webhook"): "the same for the jobs of a batch that are none yet",
    ("the token in a webhook's URL", r"fluxgate:job:\S+ webhook"): "the job's end is told there",
    ("the token in a webhook's URL", r"fluxgate:batch:\S+ webhook"): "the same for the jobs of a batch that are none yet",
    ("the secret of tickets", r"fluxgate:ticket_secret"): "every process of the deployment signs and checks tickets with it",
}
# Who is told a secret: whoever made it, or asked for it, in the one answer that is for that.
TOLD = {
    ("an API key", r"POST /v1/keys 201 "): "shown once",
    ("a ticket", r"POST /v1/(generations|trainings)/\S+/ticket 201 "): "it is what was asked for",
    ("the signature of an upload", r"POST /v1/uploads 201 "): "the file is sent with it",
}


@dataclass
class Deployment:
    folder: Path
    planted: Planted
    heard: Heard
    redis_url: str
    s3: S3Server
    env: dict[str, str]
    said: dict[str, bytes] = field(default_factory=dict)  # by commands


@contextmanager
def running_site() -> Iterator[str]:
    """Serves a picture, a LoRA and nothing else, whatever the query."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            body = {"/picture.png": draw_png(3), "/tok.safetensors": LORA.read_bytes()}.get(path, b"")
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "image/png" if path.endswith("png") else "application/octet-stream")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextmanager
def running_redis(folder: Path, password: str) -> Iterator[str]:
    """With a password; its URL."""
    server = RedisServer(folder, pick_free_port())
    with running(server):
        with redis.Redis.from_url(server.url) as connection:
            connection.config_set("requirepass", password)
        yield server.url.replace("redis://", f"redis://:{password}@")


@pytest.fixture(scope="module")
def deployment(s3_server: S3Server, receiver: Receiver, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """One that has been used in every way that takes a secret, well and badly."""
    folder, planted = tmp_path_factory.mktemp("planted"), Planted()
    engine = Engine(folder, pick_free_port(), flags=choose_engine_flags())
    planted.keep("the S3 secret", s3_server.credentials.secret_access_key)
    with running_redis(folder, planted.draw("the password of Redis")) as redis_url, running_hub() as hub, running_site() as site:
        env = describe_deployment(redis_url, s3_server, engine.url) | {
            "LOG_LEVEL": "DEBUG",
            "DISPATCHER": "off",
            "ADMIN_KEY": planted.draw("the admin key"),
            "AUTH": "hf",
            "HF_TOKEN": planted.draw("the Hugging Face token", "hf_"),
            "HF_ENDPOINT": hub.url,
            "WEBHOOK_SECRET": planted.draw("the deployment's webhook secret", "whsec_"),
            "TRAINER": "tiny",
            "TRAINING_DIR": str(folder / "training"),
            "LORA_DIR": str(engine.base_dir / "models" / "loras"),
            "BASE_MODEL_PATHS": json.dumps({"tinyflux": str(MODEL_DIR)}),
            "ALLOW_PRIVATE_URLS": "127.0.0.0/8",
            "CACHE_TTL_S": "600",
        }
        guest = planted.draw("a caller's Hugging Face token", "hf_")
        hub.accounts |= {guest: account("guest"), env["HF_TOKEN"]: account("ours")}
        found = Deployment(folder, planted, Heard(), redis_url, s3_server, env)
        gateway, worker = make_gateway(folder, env), TrainerWorker(folder, redis_url, env)
        with running(engine, worker), booted(gateway), running(make_dispatcher(folder, env, gateway.url)):
            use(found, gateway.url, site, receiver)
            visit(found, gateway.url, guest)
            yield found


@contextmanager
def booted(gateway: Gateway) -> Iterator[None]:
    """It answers; without a dispatcher it is never ready."""
    gateway.start()
    try:
        wait_for_answers(gateway)
        yield
    finally:
        gateway.stop()


# -- using it --------------------------------------------------------------------------------------------------


def use(deployment: Deployment, url: str, site: str, receiver: Receiver) -> None:
    planted, heard, env = deployment.planted, deployment.heard, deployment.env
    with heard.client(url, env["ADMIN_KEY"]) as admin:
        key = make_key(admin, "generate", "train", "admin")["key"]
        planted.keep("an API key", key[16:])
        look_around(admin)
    with heard.client(url, key) as caller:
        api = Api.of(caller)
        done = [generate(api, planted, site, receiver), train(api, planted, receiver), *import_loras(api, planted, site)]
        run_batch(api, planted, receiver)
        run_raw(api, planted)
        upload(api, planted)
        watch(api, planted, url, done)
        ask_badly(api, planted, site)
    wrong = planted.draw("a wrong key", "fg_0123456789ab_")
    with heard.client(url, wrong) as stranger:
        for path in ("/v1/generations", f"/v1/generations/{wrong}", "/metrics"):
            stranger.get(path)
    with redis.Redis.from_url(deployment.redis_url) as connection:
        planted.keep_bytes("the secret of tickets", connection.get("fluxgate:ticket_secret") or b"")
    deployment.said |= run_commands(env)


def visit(deployment: Deployment, url: str, token: str) -> None:
    """By a token of Hugging Face's, and by one that it does not know."""
    for text in (token, deployment.planted.draw("a wrong Hugging Face token", "hf_")):
        with deployment.heard.client(url, text) as guest:
            for path in ("/v1/usage", "/v1/keys", "/ready?full=true", f"/v1/generations/{text}"):
                guest.get(path)
            guest.post("/v1/generations", json={"workflow": "trivial", "color": 99})


def look_around(admin: httpx.Client) -> None:
    for path in (
        "/health",
        "/ready",
        "/ready?full=true",
        "/metrics",
        "/openapi.json",
        "/docs",
        "/",
        "/v1/keys",
        "/v1/instances",
        "/v1/usage",
    ):
        admin.get(path)


def hook(planted: Planted, receiver: Receiver, *, own: bool) -> Json | str:
    """With a secret of its own, or signed with the deployment's."""
    url = f"{receiver.url()}?token=" + planted.draw("the token in a webhook's URL")
    return {"url": url, "secret": planted.draw("the secret of a webhook", "whsec_")} if own else url


def generate(api: Api, planted: Planted, site: str, receiver: Receiver) -> tuple[str, str]:
    """Jobs that succeed, are answered from the cache, and fail; whose pictures and webhooks have secrets in their URLs."""
    token, webhook = planted.draw("the token in a picture's URL"), hook(planted, receiver, own=True)
    body = {**SMALL, "workflow": "flux-img2img", "prompt": "x", "image": f"{site}/picture.png?token={token}", "webhook": webhook}
    headers = {"Idempotency-Key": "once", "Prefer": "wait=60"}
    jobs = [api.http.post("/v1/generations", json={**body, "output_format": kind}, headers=headers) for kind in ("png", "png")]
    jobs += [api.http.post("/v1/generations", json={**body, "output_format": kind}) for kind in ("png", "webp", "jpeg")]
    failing = api.create(workflow="failing", webhook=hook(planted, receiver, own=False))
    for job in [*(answer.json() for answer in jobs), failing]:
        api.wait(job["id"])
        wait_until(partial(has_told, api, job["id"]), "a delivery")
        for path in ("workflow", "events"):
            api.http.get(f"/v1/generations/{job['id']}/{path}")
    api.http.post("/v1/generations/preview", json=body)
    return "generations", jobs[0].json()["id"]


def has_told(api: Api, job_id: str) -> bool:
    return bool(api.get(job_id)["webhook_deliveries"])


def train(api: Api, planted: Planted, receiver: Receiver) -> tuple[str, str]:
    pictures = {"files": ("pictures.zip", zip_pictures(5), "application/zip")}
    dataset = api.http.post("/v1/datasets", data={"name": "things", "trigger_word": "TOK"}, files=pictures).json()
    body = {"name": "thing", "dataset": dataset["id"], "trigger_word": "TOK", "steps": 2, "rank": 4, "batch_size": 5, "resolution": 128}
    body |= {"checkpoint_every": 1, "sample_every": 1, "sample_prompts": ["TOK"], "webhook": hook(planted, receiver, own=True)}
    return end_training(api, api.http.post("/v1/trainings", json=body).json()["id"])


def end_training(api: Api, job_id: str) -> tuple[str, str]:
    wait_until(lambda: api.http.get(f"/v1/trainings/{job_id}").json()["status"] in TERMINAL, f"the end of {job_id}")
    api.http.get(f"/v1/trainings/{job_id}/events")
    return "trainings", job_id


def import_loras(api: Api, planted: Planted, site: str) -> list[tuple[str, str]]:
    """One that is taken, one that is not there."""
    token, digest = planted.draw("the token in a LoRA's URL"), hashlib.sha256(LORA.read_bytes()).hexdigest()
    jobs = list[tuple[str, str]]()
    for name, file in (("tok", "tok.safetensors"), ("gone", "gone.safetensors")):
        body = {"name": name, "url": f"{site}/{file}?token={token}", "base_model": "tinyflux", "sha256": digest}
        jobs.append(end_training(api, api.http.post("/v1/loras", json=body).json()["import"]["id"]))
    api.http.get("/v1/loras")
    return jobs


def run_batch(api: Api, planted: Planted, receiver: Receiver) -> None:
    body = {"workflow": "trivial", "sweep": {"color": [1, 2]}, "webhook": hook(planted, receiver, own=True)}
    batch = api.http.post("/v1/batches", json=body).json()["id"]
    wait_until(lambda: api.http.get(f"/v1/batches/{batch}").json()["status"] == "succeeded", "the end of the batch")


def run_raw(api: Api, planted: Planted) -> None:
    paid = planted.draw("a key for paid nodes")
    job = api.http.post("/api/v2/jobs", json={"workflow": RAW, "extra_data": {"api_key_comfy_org": paid}}).json()["id"]
    wait_until(lambda: api.http.get(f"/api/v2/jobs/{job}").json()["status"] in TERMINAL, "the end of a raw job")
    for extra in ({"api_key_comfy_org": paid, "other": 1}, {"api_key_comfy_org": [paid]}, {"auth_token_comfy_org": paid}):
        api.http.post("/api/v2/jobs", json={"workflow": RAW, "extra_data": extra})


def upload(api: Api, planted: Planted) -> None:
    body = draw_png(8)
    wanted = {"content_type": "image/png", "size_bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    promise = api.http.post("/v1/uploads", json=wanted).json()
    signed = re.search("X-Amz-Signature=([0-9a-f]{64})", promise["url"])
    assert signed
    planted.keep("the signature of an upload", signed[1])
    assert httpx.put(promise["url"], content=body, headers=promise["headers"]).status_code == 200
    api.http.post("/v1/generations", json={**SMALL, "workflow": "flux-img2img", "prompt": "x", "image": promise["id"]})


def watch(api: Api, planted: Planted, url: str, jobs: list[tuple[str, str]]) -> None:
    """By tickets, and by what is none."""
    for kind, job_id in jobs[:2]:
        ticket = planted.keep("a ticket", api.http.post(f"/v1/{kind}/{job_id}/ticket").json()["ticket"])
        api.http.get(f"/v1/{kind}/{job_id}/events", params={"ticket": ticket}, headers={"Authorization": ""})
        for path in (f"{kind}/{job_id}", f"{kind}/{job_id}0"):
            with suppress(WebSocketException), connect(f"{url.replace('http', 'ws', 1)}/v1/{path}/ws?ticket={ticket}") as socket:
                for _ in socket:
                    pass


def ask_badly(api: Api, planted: Planted, site: str) -> None:
    """Requests that are refused with what is wrong with them, which is not the secret."""
    token = planted.draw("the token of a URL that is refused")
    secret = planted.draw("a webhook secret that is refused", "whsec_") + "!"
    for address in (f"https://user:{token}@example.com/x.png", f"https://10.0.0.1/x?token={token}", f"ftp://example.com/?token={token}"):
        for webhook in (address, {"url": address}, {"url": address, "secret": secret}, {"url": [address], "secret": [secret]}):
            api.http.post("/v1/generations", json={"workflow": "trivial", "webhook": webhook})
            api.http.post("/v1/trainings", json={"name": "x", "dataset": "none", "webhook": webhook})
        picture = {**SMALL, "workflow": "flux-img2img", "prompt": "x", "image": address}
        for body in (picture, {**picture, "steps": 0}, {**picture, "image": [address]}, {**picture, "mask": address}):
            api.http.post("/v1/generations", json=body)
            api.http.post("/v1/workflows/flux-img2img/generations", json={**body, "workflow": address})
        api.http.post("/v1/batches", json={"workflow": "flux-img2img", "parameters": {"prompt": "x"}, "sweep": {"image": [address]}})
        for body in ({"name": "x", "url": address}, {"name": "x", "url": address, "upload": "y"}, {"name": "/", "url": address}):
            api.http.post("/v1/loras", json=body)
        api.http.post("/v1/images/generations", json={"prompt": "x", "model": "flux-img2img", "image": address})
        load = {"class_type": "LoadImage", "inputs": {"image": address}}
        api.http.post("/api/v2/jobs", json={"workflow": {**RAW, "1": load}})

    lost = {**SMALL, "workflow": "flux-img2img", "prompt": "x", "image": f"{site}/none.png?token={token}"}
    api.http.post("/v1/generations", json=lost)


def run_commands(env: dict[str, str]) -> dict[str, bytes]:
    """What the command line says, also of a deployment that is set up wrongly."""
    broken = {
        **env,
        "REDIS_URL": env["REDIS_URL"].replace("@", "0@"),
        "S3_ENDPOINT_URL": "http://127.0.0.1:1",
        "HF_ENDPOINT": "http://127.0.0.1:1",
    }
    wrong = {"REDIS_URL": env["REDIS_URL"].replace("redis:", "http:"), "WEBHOOK_SECRET": env["WEBHOOK_SECRET"] + "!", "TIMEOUT_S": "-1"}
    return {
        "doctor": run(env, "doctor", "--json"),
        "doctor, wrong places": run(broken, "doctor"),
        "start, wrong password": run({**broken, "HOST": "0.0.0.0", "ADMIN_KEY": ""}),
        "start, wrong settings": run({**env, **wrong}),
    }


def run(env: dict[str, str], *arguments: str) -> bytes:
    command = [sys.executable, "-m", "gateway", *arguments]
    ended = subprocess.run(command, env={**os.environ, **env}, capture_output=True, check=False, timeout=60)
    return ended.stdout + ended.stderr


# -- looking ---------------------------------------------------------------------------------------------------


def is_allowed(trace: tuple[str, str], allowed: Mapping[tuple[str, str], str]) -> bool:
    return any(trace[0] == what and re.match(where, trace[1]) for what, where in allowed)


def test_every_secret_was_planted_and_used(deployment: Deployment) -> None:
    """Else the other tests would find nothing because there is nothing."""
    statuses = {place.split()[2] for place in deployment.heard.answers}
    assert {"200", "201", "202", "401", "404", "422"} <= statuses
    assert len({what for what, _ in deployment.planted.secrets}) == 19
    for log in ("gateway", "dispatcher", "trainer"):
        assert b'"level": "debug"' in (deployment.folder / "logs" / f"{log}.log").read_bytes(), log
    assert all(deployment.said.values()), deployment.said


def test_no_answer_and_no_event_tells_one(deployment: Deployment) -> None:
    traces = deployment.planted.find(deployment.heard.answers)
    assert {trace for trace in traces if not is_allowed(trace, TOLD)} == set()
    assert {what for what, _ in traces} == {what for what, _ in TOLD}, "what is told is told"


def test_no_process_writes_one_into_a_log_or_another_file(deployment: Deployment) -> None:
    """Redis's own file holds what Redis does."""
    assert deployment.planted.find(read_files(deployment.folder, "redis/")) == set()
    assert deployment.planted.find({"the log of S3": deployment.s3.log_path.read_bytes()}) == set()


def test_no_command_says_one(deployment: Deployment) -> None:
    assert deployment.planted.find(deployment.said) == set()


def test_redis_keeps_one_only_where_it_is_needed(deployment: Deployment) -> None:
    traces = deployment.planted.find(read_redis(deployment.redis_url))
    assert {trace for trace in traces if not is_allowed(trace, KEPT)} == set()
    used = {(what, where) for what, where in KEPT if any(is_allowed(trace, {(what, where): ""}) for trace in traces)}
    assert used == set(KEPT), "what is allowed is needed"


def test_no_object_holds_one_and_no_picture_tells_one(deployment: Deployment) -> None:
    bucket = deployment.s3.data_dir / deployment.env["S3_BUCKET"]
    objects = dict(read_files(bucket))
    assert {Path(place).suffix for place in objects} >= {".png", ".webp", ".jpeg", ".safetensors"}
    assert any(b"class_type" in body for place, body in objects.items() if place.endswith(".png")), "pictures tell their graph"
    assert deployment.planted.find(objects) == set()
