"""What is refused at the door: strangers' pages, keys in addresses, heads and bodies that are too large or too slow."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn

from gateway.callers.keys import mint_key
from gateway.edge.guard import Guard
from gateway.edge.protocol import BoundedProtocol
from gateway.settings import Settings
from gateway.telemetry import JsonFormatter
from local.child import pick_free_port
from local.services import Gateway, S3Server
from tests.callers import as_caller, make_key
from tests.conftest import OpenGateway
from tests.deployment import describe_deployment, make_gateway, wait_for_answers

FRIEND = "https://studio.example"


@pytest.fixture(scope="module")
def gateway(open_gateway: OpenGateway) -> Iterator[Gateway]:
    """Open to everybody on this machine, until the last tests make a key."""
    with open_gateway(CORS_ORIGINS=FRIEND, ALLOWED_HOSTS="gpu-box.lan", BODY_TIMEOUT_S="1") as gateway:
        yield gateway


def ask(gateway: Gateway, path: str = "/v1/loras", method: str = "GET", **headers: str) -> httpx.Response:
    return httpx.request(method, f"{gateway.url}{path}", headers={name.replace("_", "-"): value for name, value in headers.items()})


def read_code(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


@pytest.mark.parametrize(
    "host", ["127.0.0.1:1", "localhost", "LOCALHOST:8000", "[::1]:8000", "127.9.9.9", "gpu-box.lan:8000", "app.localhost"]
)
def test_a_name_of_this_machine_is_answered(gateway: Gateway, host: str) -> None:
    assert ask(gateway, Host=host).status_code == 200


def test_the_bare_address_leads_to_the_docs(gateway: Gateway) -> None:
    answer = httpx.get(gateway.url + "/", follow_redirects=True)
    assert (answer.status_code, answer.url.path) == (200, "/docs")
    assert "swagger-ui" in answer.text


@pytest.mark.parametrize(
    "host", ["rebound.example", "127.0.0.1.rebound.example:8000", "localhost.rebound.example", "10.0.0.1", "[::ffff:10.0.0.1]", "[", "a b"]
)
def test_a_rebound_name_is_refused(gateway: Gateway, host: str) -> None:
    answer = ask(gateway, Host=host)
    assert (answer.status_code, read_code(answer)) == (403, "foreign_host")


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "file://", "http://localhost:3000", "https://studio.example.evil", "http://studio.example"]
)
def test_a_page_of_another_origin_is_refused(gateway: Gateway, origin: str) -> None:
    for method, path in (("GET", "/v1/loras"), ("POST", "/v1/generations"), ("POST", "/v1/keys")):
        answer = ask(gateway, path, method, Origin=origin)
        assert (answer.status_code, read_code(answer)) == (403, "foreign_origin")
        assert "access-control-allow-origin" not in answer.headers


def test_our_own_page_and_a_friends_are_answered(gateway: Gateway) -> None:
    assert ask(gateway, Origin=gateway.url).status_code == 200
    answer = ask(gateway, Origin=FRIEND)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, FRIEND)
    preflight = ask(
        gateway,
        "/v1/generations",
        "OPTIONS",
        Origin=FRIEND,
        Access_Control_Request_Method="POST",
        Access_Control_Request_Headers="authorization",
    )
    assert preflight.status_code == 200
    refused = ask(gateway, "/v1/generations", "OPTIONS", Origin="https://evil.example", Access_Control_Request_Method="POST")
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers


@pytest.mark.parametrize("path", ["/v1/loras", "/health", "/nowhere", "/v1/generations/none", "/docs"])
def test_every_answer_tells_browsers_what_to_refuse(gateway: Gateway, path: str) -> None:
    headers = ask(gateway, path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-frame-options"] == "DENY"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert ("script-src" in headers["content-security-policy"]) == (path == "/docs")
    assert "strict-transport-security" not in headers
    assert ask(gateway, path, X_Forwarded_Proto="https").headers["strict-transport-security"]


@pytest.mark.parametrize(
    "query",
    [
        "api_key=x",
        "a=1&access_token=x",
        "apikey=x",
        "Authorization=Bearer%20x",
        "q={key}",
        "q=a%2C{key}",
        "fg%5F{rest}=1",
        "token=hf_abcdefghijklmnopqrstuvwxyz",
    ],
)
def test_a_key_in_an_address_is_refused_and_not_logged(gateway: Gateway, query: str) -> None:
    key = mint_key("k", ("generate",))[1]
    answer = ask(gateway, f"/v1/generations?{query.format(key=key, rest=key[3:])}")
    assert (answer.status_code, read_code(answer)) == (400, "key_in_query")
    assert key not in answer.text
    ask(gateway, f"/v1/keys/{key}", "DELETE")
    assert key.partition("_")[2][13:] not in gateway.log_path.read_text()


def test_a_log_line_keeps_no_key() -> None:
    key, token = mint_key("k", ("generate",))[1], "hf_" + "aB3" * 10
    record = logging.LogRecord("x", logging.INFO, "f", 1, "said %s", (f"{key} and {token}",), None)
    record.__dict__["where"] = {"url": f"https://x?{key}"}
    line = JsonFormatter().format(record)
    assert json.loads(line)["message"] == f"said {key[:16]}… and hf_…"
    assert key not in line
    assert token not in line


def test_a_head_that_is_too_large_is_refused(gateway: Gateway) -> None:
    for headers in ({f"x-{number}": "1" for number in range(120)}, {"x-large": "a" * 40_000}):
        answer = httpx.get(f"{gateway.url}/health", headers=headers)
        assert (answer.status_code, read_code(answer)) == (431, "head_too_large")


def exchange(url: str, *parts: bytes, pause_s: float = 0.0) -> bytes:
    """What is answered to bytes sent one part after another, until the other side closes."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname or "", place.port or 80), timeout=30) as connection:
        answer = b""
        try:
            for part in parts:
                connection.sendall(part)
                if pause_s:
                    threading.Event().wait(pause_s)
            while chunk := connection.recv(65536):
                answer += chunk
        except ConnectionError:
            pass
    return answer


def test_a_body_that_does_not_come_is_not_waited_for(gateway: Gateway) -> None:
    head = b"POST /v1/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
    answer = exchange(gateway.url, head, b'{"pro')
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in answer
    assert b"connection: close" in answer.lower()


@pytest.mark.parametrize(
    "body",
    [
        "[" * 100_000,
        '{"a":' * 50_000,
        '{"prompt": ' + "[" * 5000 + "]" * 5000 + "}",
        '{"prompt": 1e999}',
        "{",
        "\ud800".encode("utf-8", "surrogatepass"),
    ],
)
def test_deep_and_broken_json_is_an_answer(gateway: Gateway, body: Any) -> None:
    for path in ("/v1/generations", "/v1/trainings", "/v1/uploads", "/v1/keys", "/v1/batches", "/api/v2/jobs", "/v1/images/generations"):
        answer = httpx.post(f"{gateway.url}{path}", content=body, headers={"Content-Type": "application/json"})
        assert 400 <= answer.status_code < 500, (path, answer.status_code, answer.text)


class _Hasty(BoundedProtocol):
    head_s = 0.3


@pytest.fixture
def hasty() -> Iterator[str]:
    """A server that answers everything, and waits 0.3 s for a head."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await asyncio.sleep(0.5)
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    port = pick_free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, http=_Hasty, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        threading.Event().wait(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def test_a_head_that_does_not_come_is_not_waited_for(hasty: str) -> None:
    assert exchange(hasty) == b""
    assert exchange(hasty, b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ") == b""
    whole = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    assert exchange(hasty, whole, b"GET /", pause_s=0.1).count(b" 204 ") <= 1


def test_an_answer_that_takes_longer_than_a_head_is_waited_for(hasty: str) -> None:
    with httpx.Client(base_url=hasty) as http:
        assert [http.get("/").status_code for _ in range(2)] == [204, 204]


def test_a_head_without_end_is_cut_off(hasty: str) -> None:
    endless = b"GET / HTTP/1.1\r\nHost: x\r\nX-Endless: "
    assert exchange(hasty, endless, *[b"a" * 16384] * 40) == b""


@pytest.fixture(scope="module")
def admin_key(gateway: Gateway) -> str:
    """The first: from now on the gateway asks for one."""
    with as_caller(gateway.url, None) as nobody:
        return str(make_key(nobody, "admin")["key"])


def test_with_keys_any_page_may_ask_for_the_key_is_no_browsers_to_send(gateway: Gateway, admin_key: str) -> None:
    assert ask(gateway, Host="gpu-box.lan").status_code == 401
    assert ask(gateway, Host="gpu-box.lan", Origin="https://evil.example", Authorization=f"Bearer {admin_key}").status_code == 200


@pytest.mark.parametrize("host", ["gpu-box.lan", "GPU-BOX.lan:8000", "10.0.0.1:8000", "[fd00::1]", "localhost:1"])
def test_links_are_made_of_names_that_are_allowed_and_of_addresses(gateway: Gateway, admin_key: str, host: str) -> None:
    body = {"content_type": "image/png", "size_bytes": 1, "sha256": "0" * 64}
    answer = httpx.post(f"{gateway.url}/v1/uploads", json=body, headers={"Host": host, "Authorization": f"Bearer {admin_key}"})
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"].startswith(f"http://{host}/v1/uploads/")
    assert answer.json()["urls"]["self"] == answer.headers["location"]


@pytest.mark.parametrize(
    "host", ["evil.example", "gpu-box.lan.evil.example", "gpu-box.lan@evil.example", "gpu-box.lan/x", "a b", "[", "x:1:2", '"><script>']
)
def test_a_name_that_is_not_allowed_becomes_no_link(gateway: Gateway, admin_key: str, host: str) -> None:
    """With keys too, where ALLOWED_HOSTS names any: an answer could reach somebody else by a cache, and its links lead there."""
    for headers in ({}, {"Authorization": f"Bearer {admin_key}"}):
        answer = httpx.get(f"{gateway.url}/v1/loras", headers={"Host": host, **headers})
        assert (answer.status_code, read_code(answer)) == (403, "foreign_host")


def test_outsiders_are_told_which_part_is_out_of_reach_and_admins_in_what_words(
    redis_server: str, s3_server: S3Server, engine: str, tmp_path: Path
) -> None:
    admin = "an-admin-key-for-a-gateway-without-storage"
    nowhere = {"S3_ENDPOINT_URL": f"http://127.0.0.1:{pick_free_port()}", "ADMIN_KEY": admin}
    gateway = make_gateway(tmp_path, describe_deployment(redis_server, s3_server, engine) | nowhere)
    gateway.start()
    try:
        wait_for_answers(gateway)
        wrong = {"Authorization": "Bearer fg_000000000000_wrong"}
        told = [ask(gateway, "/ready", **headers) for headers in ({}, wrong, {"Authorization": f"Bearer {admin}"})]
    finally:
        gateway.stop()
    assert [answer.status_code for answer in told] == [503] * 3
    assert [answer.json()["checks"]["storage"] for answer in told] == ["storage_unavailable"] * 2 + [
        "S3 did not do it: EndpointConnectionError"
    ]


def test_a_strangers_body_is_not_read(gateway: Gateway, admin_key: str) -> None:
    """It is refused although the rest never comes."""
    line = b"POST /v1/generations HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head = line + b"Content-Type: application/json\r\nContent-Length: 900000\r\n\r\n"
    assert exchange(gateway.url, head, b"{").startswith(b"HTTP/1.1 401 ")


def test_a_public_https_address_is_told_to_stay_one() -> None:
    guard = Guard(Settings(public_url="https://pictures.example"))
    assert b"strict-transport-security" in dict(guard.complete({"path": "/", "scheme": "http"}, []))


def test_a_page_that_says_its_own_policy_keeps_it(tmp_path: Path) -> None:
    own = (b"content-security-policy", b"default-src 'self' https://fonts.example")
    completed = Guard(Settings()).complete({"path": "/", "scheme": "http"}, [(b"content-type", b"text/html"), own])
    assert [value for name, value in completed if name == own[0]] == [own[1]]


@pytest.mark.parametrize("origin", ["*", "studio.example", "https://studio.example/", "https://*.example", "https://a@b"])
def test_what_is_no_origin_is_refused_at_start(origin: str) -> None:
    with pytest.raises(ValueError, match="no origin"):
        Settings.model_validate({"cors_origins": origin})
