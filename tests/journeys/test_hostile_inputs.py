"""Hostile requests through the front door of a whole deployment with keys: each is refused by name, and nothing is made by any."""

from __future__ import annotations

import hashlib
import io
import socket
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import redis

from gateway.jobs.model import now_ms
from local.services import S3Server
from tests.callers import as_caller, make_key
from tests.dataset_files import picture, zip_of
from tests.deployment import describe_deployment, make_gateway, running
from tests.journeys.api import Api, wait_until
from tests.journeys.belongings import write_ticket
from tests.journeys.hostile import TABLE, WORDS, find_rows
from tests.journeys.hostile_heads import WIRE
from tests.journeys.hostile_requests import Row, img2img, to_data_url
from tests.rebinding import ALLOWED

Json = dict[str, Any]
ADMIN_KEY = "an-admin-key-of-the-operator-0123456789"
# What changes by itself: counts of requests, news of instances, keys' last use.
RESTLESS = (
    "usage",
    "rate",
    "LIMITER",
    "instance",
    "keys",
    "feed",
    "fleet",
    "catalog",
    "times",
    "webhooks",
    "lora_used",
    "trainers",
    "batch_feeder",
)
PATIENCE_S = 10.0
REDIRECTS = {
    "/metadata": "http://169.254.169.254/latest/",
    "/loopback": "http://127.0.0.1:6379/",
    "/file": "file:///etc/passwd",
    "/rebound": "https://private.rebound.test/",
    "/decimal": "https://2130706433/",
}


@dataclass
class Hall:
    """Callers of one deployment, and what stands in the places of a row."""

    url: str
    callers: dict[str, httpx.Client]
    places: dict[str, str]
    redis_url: str
    bucket: Path

    def fill(self, value: Any) -> Any:
        if isinstance(value, str):
            for name, text in self.places.items():
                value = value.replace(f"{{{name}}}", text)
            return value
        if isinstance(value, dict):
            return {name: self.fill(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.fill(part) for part in value)
        return value

    def send(self, row: Row) -> httpx.Response:
        return self.callers[row.who].request(row.method, self.fill(row.path), **self.fill(row.options))

    def look(self) -> tuple[set[bytes], set[str]]:
        """All that is kept: names in Redis, files in the bucket."""
        with redis.Redis.from_url(self.redis_url) as connection:
            names = {name for name in connection.scan_iter() if not name.decode().removeprefix("fluxgate:").startswith(RESTLESS)}
        return names, {str(path) for path in self.bucket.rglob("*") if path.is_file()}

    def require(self, before: tuple[set[bytes], set[str]]) -> None:
        """Nothing was made and nothing was taken away. What comes and goes by itself is waited for; what a request made stays."""
        deadline = time.monotonic() + PATIENCE_S
        while (now := self.look()) != before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert now == before


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """A site of somebody's, where callers' URLs may lead, and which leads on."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Nothing but a rebound name leads to other places of it.
            self.send_response(302 if self.path in REDIRECTS else 200)
            self.send_header("Location", REDIRECTS.get(self.path, ""))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def hall(redis_server: str, s3_server: S3Server, engine: str, site: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hall]:
    with redis.Redis.from_url(redis_server) as connection:
        connection.flushall()
    changes = {
        "ADMIN_KEY": ADMIN_KEY,
        "TRAINER": "tiny",
        "MAX_BODY_BYTES": "65536",
        "ALLOW_PRIVATE_URLS": f"{site.removeprefix('http://')},{ALLOWED}/32",
    }
    env = describe_deployment(redis_server, s3_server, engine, **changes)
    gateway = make_gateway(tmp_path_factory.mktemp("gateway"), env)
    gateway.command = [sys.executable, "-m", "tests.rebinding"]
    with running(gateway), as_caller(gateway.url, ADMIN_KEY) as admin, as_caller(gateway.url, None) as nobody:
        key = make_key(admin, "generate", "train")
        with as_caller(gateway.url, key["key"]) as user:
            places = {
                "site": site,
                "port": site.rpartition(":")[2],
                "key": key["key"],
                "prefix": key["prefix"],
                "hash": hashlib.sha256(key["key"].encode()).hexdigest(),
                "foreign": Api.of(admin).run(workflow="trivial", color=1)["id"],
                "job": Api.of(user).run(workflow="trivial", color=2)["id"],
                "upload": user.post("/v1/uploads", files={"file": ("a.png", picture(1))}).json()["id"],
                "dataset": user.post("/v1/datasets", files=[("files", ("a.png", picture(2)))], data={"trigger_word": "TOK"}).json()["id"],
            }
            places |= make_tickets(redis_server, gateway.url, key["caller"], places["job"], places["foreign"], admin)
            callers = {"admin": admin, "user": user, "nobody": nobody}
            # The dispatcher says a moment later how long jobs took.
            wait_until(lambda: is_measured(redis_server), "the news of the jobs above")
            yield Hall(gateway.url, callers, places, redis_server, s3_server.data_dir / env["S3_BUCKET"])
        with redis.Redis.from_url(redis_server) as connection:
            connection.flushall()


def is_measured(redis_url: str) -> bool:
    with redis.Redis.from_url(redis_url) as connection:
        return any(connection.scan_iter("fluxgate:measured:trivial:*", count=1000))


def make_tickets(redis_url: str, url: str, caller: str, job: str, foreign: str, admin: httpx.Client) -> dict[str, str]:
    """What stands in the places of rows about tickets."""
    later = now_ms() + 600_000
    good, expired = write_ticket(redis_url, job, caller, None, later), write_ticket(redis_url, job, caller, None, now_ms() - 1)
    revoked = make_key(admin, "generate", caller="revoked")
    with as_caller(url, revoked["key"]) as client:
        orphan = Api.of(client).run(workflow="trivial", color=3)["id"]
        orphan_ticket = client.post(f"/v1/generations/{orphan}/ticket").json()["ticket"]
    admin.delete(f"/v1/keys/{revoked['id']}")
    return {
        "ticket": good,
        "payload": good.partition(".")[0],
        "signature": good.partition(".")[2],
        "expired": expired,
        "expired_signature": expired.partition(".")[2],
        "foreign_ticket": write_ticket(redis_url, foreign, "admin", None, later),
        "orphan": orphan,
        "orphan_ticket": orphan_ticket,
    }


@pytest.mark.parametrize(("section", "row"), TABLE, ids=[f"{section}: {row.title}" for section, row in TABLE])
def test_it_is_refused_by_name_and_nothing_is_made(hall: Hall, section: str, row: Row) -> None:
    before = hall.look()
    answer = hall.send(row)
    said = answer.json().get("error") or {}
    assert (answer.status_code, said.get("code", "")) == (row.status, row.code), answer.text[:1000]
    assert "set-cookie" not in answer.headers
    assert row.status < 400 or len(answer.content) < 3000, "what is refused is not sent back whole"
    assert not {"passwd:", "Traceback", "/site-packages/", ADMIN_KEY, hall.places["key"]} & set(answer.text.split('"'))
    hall.require(before)


@pytest.mark.parametrize("title", WIRE)
def test_what_is_no_request_is_refused_and_nothing_is_made(hall: Hall, title: str) -> None:
    """And the connection is closed: nothing that follows on it is taken for a request of its own."""
    sent, statuses = WIRE[title]
    before, place = hall.look(), urlsplit(hall.url)
    with socket.create_connection((place.hostname, place.port), timeout=20) as connection:
        try:
            connection.sendall(sent.replace(b"{key}", hall.places["key"].encode()))
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        except ConnectionError:
            # It was closed while we still spoke.
            answer = b""
    assert answer.count(b"HTTP/1.1 ") <= 1, answer
    assert not answer or int(answer.split()[1]) in statuses, answer[:500]
    hall.require(before)


def test_a_slow_body_holds_nobody_up(hall: Hall) -> None:
    place, before = urlsplit(hall.url), hall.look()
    head = f"POST /v1/generations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {hall.places['key']}\r\nContent-Type: application/json\r\n"
    slow = [socket.create_connection((place.hostname, place.port)) for _ in range(50)]
    for connection in slow:
        connection.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
    assert hall.callers["user"].get("/v1/usage").status_code == 200
    for connection in slow:
        connection.close()
    hall.require(before)


# -- what is taken, and made harmless --------------------------------------------------------------------------


def test_a_polyglot_reaches_comfyui_as_a_picture_alone(hall: Hall) -> None:
    """A picture with a zip, a jar or a page behind it, or in its texts: all but the pixels stays here."""
    tail = zip_of({"META-INF/MANIFEST.MF": b"Main-Class: Evil"}) + b"<script>alert(1)</script>"
    polyglot = picture(3) + tail
    assert zipfile.is_zipfile(io.BytesIO(polyglot))
    user = Api.of(hall.callers["user"])
    job = user.wait(user.http.post("/v1/generations", json=img2img(to_data_url(polyglot))["json"] | QUICK).json()["id"])
    assert job["status"] == "succeeded", job["error"]
    made = user.http.post(
        "/v1/datasets", files=[("files", ("../../evil.png", polyglot))], data={"trigger_word": "TOK", "name": TEMPLATE}
    ).json()
    (file,) = made["files"]
    kept = httpx.get(file["url"])
    assert b"script" not in kept.content
    assert b"MANIFEST" not in kept.content
    assert kept.headers["content-type"] == "image/png"
    assert (file["name"], made["name"]) == ("evil.png", TEMPLATE), "a name is its last part, and nobody fills in its templates"
    stored = {path for path in hall.look()[1] if made["id"] in path}
    assert stored
    assert not [path for path in stored if "evil" in path]


TEMPLATE = "{{ 7*7 }} ${x} {% raw %} <b>"
QUICK: Json = {"width": 256, "height": 256, "steps": 1, "seed": 1, "base_model": "tinyflux"}


def test_a_key_that_comes_twice_counts_by_its_last_value(hall: Hall) -> None:
    """As everywhere in Python; what is recorded and shown is what runs."""
    body = b'{"workflow":"trivial","color":1,"metadata":{"a":1,"a":2},"color":3}'
    job = hall.callers["user"].post("/v1/generations", content=body, headers={"Content-Type": "application/json"}).json()
    assert (job["parameters"]["color"], job["metadata"]) == (3, {"a": 2})


def test_no_text_of_a_caller_becomes_a_header(hall: Hall) -> None:
    """Nor does a name that the request claims: links lead where the gateway is, ids of requests have one form."""
    user = hall.callers["user"]
    odd = "a\r\nSet-Cookie: x=1\r\n\u2028"
    answers = [
        user.post("/v1/generations", json={"workflow": "trivial", "metadata": {odd: odd}}, headers={"X-Request-Id": "a b;c"}),
        user.post("/v1/uploads", files={"file": (odd, picture(4))}),
        user.get("/v1/generations", params={"workflow": odd}),
        user.get("/v1/generations/" + "a%0d%0aSet-Cookie:%20x=1"),
    ]
    for answer in answers:
        assert "set-cookie" not in answer.headers
        assert not {"\r", "\n"} & set("".join(answer.headers.values()))
        assert answer.headers["x-request-id"].isalnum()


@pytest.mark.parametrize(
    "headers", [{"Range": "bytes=0-0," * 500 + "1-1"}, {"Accept-Encoding": "gzip;q=1e999, *;q=-1"}, {"TE": "trailers"}]
)
def test_what_asks_for_odd_transfer_gets_the_plain_answer(hall: Hall, headers: dict[str, str]) -> None:
    answer = hall.callers["user"].get(f"/v1/uploads/{hall.places['upload']}", headers=headers)
    assert answer.status_code == 200
    assert not {"content-encoding", "content-range"} & set(answer.headers)
    assert answer.json()["id"] == hall.places["upload"]


def test_a_refused_method_is_told_which_there_are(hall: Hall) -> None:
    answer = hall.callers["user"].put("/v1/generations")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, POST")


def test_the_table_has_rows_for_every_word() -> None:
    assert len(TABLE) + len(WIRE) >= 60
    assert len({(section, row.title) for section, row in TABLE}) == len(TABLE)
    for word, patterns in WORDS.items():
        for pattern in patterns:
            assert find_rows(pattern), (word, pattern)
