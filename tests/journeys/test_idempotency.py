"""The same Idempotency-Key and body again, sent to POSTs that make no job: nothing runs twice, whatever becomes of the process between."""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx
import pytest
import redis

from gateway.app import create_app
from gateway.routes.deps import OnceRoute
from gateway.settings import Settings
from local.services import Gateway, S3Server
from tests.callers import as_caller, make_key
from tests.deployment import describe_deployment, make_gateway, running
from tests.journeys.api import Api, wait_until
from tests.journeys.belongings import describe_training
from tests.journeys.studio import draw_png, zip_pictures
from tests.test_scopes import walk

Json = dict[str, Any]
ADMIN_KEY = "the-operators-own-key-of-the-idempotency-test"
PICTURE = draw_png(1)
# They read, whatever their method: a key changes nothing.
READING = {"/v1/generations/preview", "/v1/generations/{job_id}/events", "/v1/trainings/{job_id}/events", "/health/stream"}


@dataclass
class Site:
    """A gateway, its admin, and another caller."""

    gateway: Gateway
    s3: S3Server
    redis_url: str
    admin: httpx.Client
    other: httpx.Client

    def records(self, key: str) -> list[dict[bytes, bytes]]:
        with redis.Redis.from_url(self.redis_url) as connection:
            return [connection.hgetall(name) for name in connection.scan_iter(f"fluxgate:idempotency:*:{key}")]


@pytest.fixture(scope="module")
def site(redis_server: str, s3_server: S3Server, engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with redis.Redis.from_url(redis_server) as connection:
        connection.flushall()
        env = describe_deployment(redis_server, s3_server, engine, ADMIN_KEY=ADMIN_KEY, TRAINER="tiny")
        gateway = make_gateway(tmp_path_factory.mktemp("gateway"), env)
        with running(gateway), as_caller(gateway.url, ADMIN_KEY) as admin:
            with as_caller(gateway.url, make_key(admin, "generate", "train")["key"]) as other:
                yield Site(gateway, s3_server, redis_server, admin, other)
        connection.flushall()


@pytest.fixture
def key() -> str:
    return uuid4().hex


def send(client: httpx.Client, path: str, key: str, **body: Any) -> httpx.Response:
    return client.post(path, headers={"Idempotency-Key": key}, **body)


def read_code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def ended_job(client: httpx.Client) -> str:
    return str(Api.of(client).run(workflow="trivial")["id"])


def waiting_job(client: httpx.Client) -> str:
    return str(client.post("/v1/generations", json={"workflow": "slow", "steps": 400, "delay_ms": 50}).json()["id"])


def ended_batch(client: httpx.Client) -> str:
    made = client.post("/v1/batches", json={"workflow": "trivial", "items": [{"color": 3}]}).json()["id"]
    wait_until(lambda: client.get(f"/v1/batches/{made}").json()["finished_at"] is not None, "the batch's end")
    return str(made)


def asset_hash(client: httpx.Client) -> str:
    return str(client.post("/api/v2/assets", files={"file": ("a.png", draw_png(5))}).json()["hash"])


NOBODY = {"url": "http://127.0.0.1:9"}


def instance(client: httpx.Client) -> str:
    """One that nothing runs on."""
    return str(client.post("/v1/instances", json=NOBODY).json()["id"])


Prepared = Callable[[httpx.Client], tuple[str, Json]]
ASKED: dict[str, Prepared] = {
    "a file": lambda _: ("/v1/uploads", {"files": {"file": ("a.png", PICTURE)}}),
    "a data set": lambda _: ("/v1/datasets?resolution=128", {"data": {"name": "a"}, "files": [("files", ("b.png", PICTURE))]}),
    "a cancel": lambda client: (f"/v1/generations/{waiting_job(client)}/cancel", {}),
    "a batch's cancel": lambda client: (f"/v1/batches/{ended_batch(client)}/cancel", {}),
    "an archive": lambda client: (f"/v1/batches/{ended_batch(client)}/archive", {}),
    "a load": lambda _: ("/v1/models/load", {"json": {"base_model": "tinyflux"}}),
    "an unload": lambda _: ("/v1/models/unload", {"json": {}}),
    "an instance": lambda _: ("/v1/instances", {"json": NOBODY}),
    "a drain": lambda client: (f"/v1/instances/{instance(client)}/drain", {}),
    "an instance's resume": lambda client: (f"/v1/instances/{instance(client)}/resume", {}),
    "a cancel by Comfy's API": lambda client: (f"/api/v2/jobs/{waiting_job(client)}/cancel", {}),
    "an asset": lambda _: ("/api/v2/assets", {"files": {"file": ("c.png", PICTURE)}, "data": {"tags": "a"}}),
    "an asset by its hash": lambda client: ("/api/v2/assets/from-hash", {"json": {"hash": asset_hash(client), "file_path": "d.png"}}),
}


@pytest.mark.parametrize("asked", ASKED)
def test_the_first_answer_is_given_again(site: Site, key: str, asked: str) -> None:
    path, body = ASKED[asked](site.admin)
    first, again = (send(site.admin, path, key, **body) for _ in range(2))
    assert first.is_success, first.text
    assert "Idempotency-Replayed" not in first.headers
    assert (again.status_code, again.content, again.headers["Idempotency-Replayed"]) == (first.status_code, first.content, "true")
    assert again.headers.get("Location") == first.headers.get("Location")
    assert again.headers["Content-Type"] == first.headers["Content-Type"]


@pytest.mark.parametrize(
    ("path", "body", "secret"),
    [
        ("/v1/keys", {"name": "once"}, "key"),
        ("/v1/generations/{job}/ticket", {"ttl_s": 600}, "ticket"),
        ("/v1/uploads", {"content_type": "image/png", "size_bytes": 5, "sha256": "0" * 64}, "url"),
    ],
)
def test_an_answer_with_a_secret_is_kept_without_it_and_not_given_again(site: Site, key: str, path: str, body: Json, secret: str) -> None:
    path = path.format(job=ended_job(site.admin))
    first, again = (send(site.admin, path, key, json=body) for _ in range(2))
    assert first.status_code == 201, first.text
    assert read_code(again) == (409, "answer_not_kept")
    told = first.json()
    rest = again.json()["error"]["details"]["answer"]
    assert rest
    assert rest.items() <= told.items()
    assert secret not in rest
    (record,) = site.records(key)
    for kept in (*record.values(), zlib.decompress(record[b"body"]), again.content):
        assert told[secret].encode() not in kept
    if secret == "key":
        assert sum(known["name"] == "once" for known in site.admin.get("/v1/keys").json()["data"]) == 1


def test_a_key_is_for_one_body_on_one_route(site: Site, key: str) -> None:
    assert send(site.admin, "/v1/models/unload", key, json={"instance": None}).status_code == 202
    for path, body in (
        ("/v1/models/unload", {"json": {}}),
        ("/v1/uploads", {"files": {"file": ("a.png", PICTURE)}}),
        ("/v1/generations", {"json": {"workflow": "trivial"}}),
        ("/v1/batches", {"json": {"workflow": "trivial", "items": [{}]}}),
    ):
        assert read_code(send(site.admin, path, key, **body)) == (422, "idempotency_key_reuse"), path
    # Spaces and order are no part of what a body says.
    same = site.admin.post(
        "/v1/models/unload", content=b' {"instance" : null}', headers={"Idempotency-Key": key, "Content-Type": "application/json"}
    )
    assert same.headers["Idempotency-Replayed"] == "true"


def test_a_key_that_came_with_a_job_is_no_others(site: Site, key: str) -> None:
    assert send(site.admin, "/v1/generations", key, json={"workflow": "trivial"}).status_code == 202
    assert read_code(send(site.admin, "/v1/models/unload", key, json={})) == (422, "idempotency_key_reuse")


@pytest.mark.parametrize("given", [b"", b"x" * 256, b"\xc2\x85"])
def test_what_is_no_key_is_refused(site: Site, given: bytes) -> None:
    answer = site.admin.post("/v1/models/unload", json={}, headers=[(b"Idempotency-Key", given)])
    assert read_code(answer) == (400, "bad_request")


def test_a_form_is_its_parts_whatever_stands_between_them(site: Site, key: str) -> None:
    """Files larger than what is kept in memory, and a boundary that is drawn anew for each try."""
    large = os.urandom(3 << 20)
    first, again = (send(site.admin, "/v1/uploads", key, files={"file": ("a.bin", large)}) for _ in range(2))
    assert first.request.headers["Content-Type"] != again.request.headers["Content-Type"]
    assert first.json()["size_bytes"] == len(large)
    assert (again.json()["id"], again.headers["Idempotency-Replayed"]) == (first.json()["id"], "true")
    for name, content in (("a.bin", large[:-1] + b"x"), ("b.bin", large)):
        assert read_code(send(site.admin, "/v1/uploads", key, files={"file": (name, content)})) == (422, "idempotency_key_reuse")


@pytest.mark.parametrize("content", [b"--x\r\nbroken", b"", b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\nb"])
def test_a_refusal_leaves_the_key_free(site: Site, key: str, content: bytes) -> None:
    headers = {"Idempotency-Key": key, "Content-Type": "multipart/form-data; boundary=x"}
    refused = [site.admin.post("/v1/uploads", content=content, headers=headers) for _ in range(2)]
    assert {answer.status_code for answer in refused} <= {400, 422}
    assert refused[0].json() == refused[1].json()
    assert site.records(key) == []
    assert send(site.admin, "/v1/uploads", key, files={"file": ("a.png", PICTURE)}).status_code == 201


def test_a_key_is_its_callers_own(site: Site, key: str) -> None:
    answers = [send(client, "/v1/uploads", key, files={"file": ("a.png", PICTURE)}) for client in (site.admin, site.other, site.other)]
    assert [answer.headers.get("Idempotency-Replayed") for answer in answers] == [None, None, "true"]
    assert answers[0].json()["id"] != answers[1].json()["id"] == answers[2].json()["id"]
    # What a caller may not do it is not told of either.
    send(site.admin, "/v1/keys", key + "k", json={"name": "for admins"})
    assert read_code(send(site.other, "/v1/keys", key + "k", json={"name": "for admins"})) == (403, "scope_missing")
    job = ended_job(site.admin)
    path = f"/v1/generations/{job}/cancel"
    assert send(site.admin, path, key + "c").status_code == 200
    assert read_code(send(site.other, path, key + "c")) == (404, "job_not_found")


def test_twins_at_one_moment_are_one(site: Site, key: str) -> None:
    name, packed = uuid4().hex, zip_pictures(6)

    def ask(_: int) -> httpx.Response:
        with as_caller(site.gateway.url, ADMIN_KEY) as client:
            return send(client, "/v1/datasets?resolution=128", key, data={"name": name}, files={"files": ("a.zip", packed)})

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(6)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert sorted(answer.headers.get("Idempotency-Replayed", "") for answer in answers) == [""] + ["true"] * 5
    assert sum(made["name"] == name for made in site.admin.get("/v1/datasets?limit=100").json()["data"]) == 1


def make_dataset(client: httpx.Client) -> str:
    made = client.post("/v1/datasets?resolution=128", files={"files": ("a.zip", zip_pictures(3))})
    return str(made.json()["id"])


TWINS: dict[str, Prepared] = {
    "a batch": lambda _: ("/v1/batches", {"workflow": "trivial", "items": [{"color": 9}]}),
    "a training": lambda client: ("/v1/trainings", {**describe_training(make_dataset(client)), "name": "twins"}),
    "an import": lambda client: ("/v1/loras", {"name": "twins", "upload": make_upload(client)}),
    "an OpenAI picture": lambda _: ("/v1/images/generations", {"prompt": "a red circle", "size": "256x256", "response_format": "url"}),
}


def make_upload(client: httpx.Client) -> str:
    return str(client.post("/v1/uploads", files={"file": ("a.safetensors", os.urandom(100))}).json()["id"])


@pytest.mark.parametrize("made", TWINS)
def test_twins_that_make_a_job_are_told_so(site: Site, key: str, made: str) -> None:
    """One of them is the first; all others say that they are not, whichever way the job is stored."""
    path, body = TWINS[made](site.admin)

    def ask(_: int) -> httpx.Response:
        with as_caller(site.gateway.url, ADMIN_KEY) as client:
            return send(client, path, key, json=body)

    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(ask, range(5)))
    assert {answer.is_success for answer in answers} == {True}, answers[0].text
    assert sorted(answer.headers.get("Idempotency-Replayed", "") for answer in answers) == [""] + ["true"] * 4
    names = {answer.headers.get("X-Generation-Id") or answer.content for answer in answers}
    assert len(names) == 1


def test_twins_wait_for_the_first_and_a_death_frees_the_key(site: Site, key: str) -> None:
    # Bytes that are stored already would not be sent to S3.
    content = os.urandom(1000)
    os.killpg(site.s3.pid, signal.SIGSTOP)
    with ThreadPoolExecutor(2) as pool:
        try:

            def ask(_: int) -> httpx.Response | None:
                try:
                    with as_caller(site.gateway.url, ADMIN_KEY) as client:
                        return send(client, "/v1/uploads", key, files={"file": ("a.bin", content)})
                except httpx.TransportError:
                    return None

            asked = [pool.submit(ask, number) for number in range(2)]
            wait_until(lambda: bool(site.records(key)), "the first's record")
            (record,) = site.records(key)
            assert b"lease" in record
            assert b"status" not in record
            assert not any(one.done() for one in asked)
            site.gateway.kill()
        finally:
            os.killpg(site.s3.pid, signal.SIGCONT)
        assert [one.result() for one in asked] == [None, None]
    with redis.Redis.from_url(site.redis_url) as connection:
        (name,) = connection.scan_iter(f"fluxgate:idempotency:*:{key}")
        assert 0 < connection.pttl(name) <= 10_000
        # As if the rest of it had passed.
        connection.pexpire(name, 1500)
    site.gateway.start()
    site.gateway.wait_ready()
    answers = [send(site.admin, "/v1/uploads", key, files={"file": ("a.bin", content)}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 201]
    assert [answer.headers.get("Idempotency-Replayed") for answer in answers] == [None, "true"]


def test_every_post_takes_a_key_but_those_that_only_read() -> None:
    app = create_app(Settings(workflows_dir=None))
    for path, operations in app.openapi()["paths"].items():
        if "post" in operations:
            told = [parameter["name"].lower() for parameter in operations["post"].get("parameters", ())]
            assert ("idempotency-key" in told) is (path not in READING), path
    heeding = [route for route in walk(app.routes) if isinstance(route, OnceRoute)]
    said = [route for route in walk(app.routes) if route_says_once(route)]
    assert said
    assert all(route in heeding for route in said)


def route_says_once(route: Any) -> bool:
    return any(type(part.call).__name__ == "Once" for part in getattr(getattr(route, "dependant", None), "dependencies", ()))
