"""Whether a base model may be read, asked of a server that speaks the hub's routes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from pydantic import SecretStr

from gateway.errors import Unprocessable
from gateway.hub import HubAccess
from local.child import pick_free_port

GATED = "black-forest-labs/FLUX.1-dev"
# As huggingface.co answers /api/models/{repository}/auth-check.
ANSWERS = {
    GATED: (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted."}),
    "nobody/nothing": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "open/model": (200, {}),
    "busy/model": (503, {}),
}


@dataclass
class Hub:
    url: str
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    licensed: set[str] = field(default_factory=set)


@pytest.fixture
def hub() -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            repository = self.path.removeprefix("/api/models/").removesuffix("/auth-check")
            token = self.headers.get("Authorization")
            state.asked.append((repository, token))
            status, headers = ANSWERS[repository]
            if token == "Bearer hf_wrong":
                status, headers = 401, {"X-Error-Message": "Invalid credentials in Authorization header"}
            elif token in state.licensed:
                status, headers = 200, {}
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "0"}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def ask(hub: Hub, token: str | None = "hf_secret") -> HubAccess:
    return HubAccess(hub.url, SecretStr(token) if token else None)


async def test_a_gated_base_is_refused_with_its_licence(hub: Hub) -> None:
    access = ask(hub)
    with pytest.raises(Unprocessable) as refused:
        await access.require(GATED)
    assert refused.value.code == "model_access_denied"
    assert refused.value.details["licence_url"] == f"{hub.url}/{GATED}"
    assert f"{hub.url}/{GATED}" in (refused.value.hint or "")
    assert hub.asked == [(GATED, "Bearer hf_secret")]
    assert "hf_secret" not in str(refused.value.body())


async def test_access_that_was_granted_is_remembered(hub: Hub) -> None:
    hub.licensed.add("Bearer hf_secret")
    access = ask(hub)
    assert [await access.require(GATED) for _ in range(3)] == ["granted"] * 3
    assert await access.require("open/model") == "granted"
    assert [repository for repository, _ in hub.asked] == [GATED, "open/model"]


@pytest.mark.parametrize(
    ("repository", "token", "code"),
    [
        ("nobody/nothing", "hf_secret", "model_not_found"),
        ("open/model", "hf_wrong", "model_access_denied"),
        (GATED, "hf_wrong", "model_access_denied"),
    ],
)
async def test_what_would_fail_late_is_refused(hub: Hub, repository: str, token: str, code: str) -> None:
    with pytest.raises(Unprocessable) as refused:
        await ask(hub, token).require(repository)
    assert refused.value.code == code
    assert token not in str(refused.value.body())


@pytest.mark.parametrize("place", ["/models/flux", "built-in", "./flux", "https://example.com/x/y"])
async def test_a_folder_is_not_asked_for(hub: Hub, place: str) -> None:
    assert await ask(hub).require(place) == "not asked: a folder"
    assert hub.asked == []


async def test_a_hub_that_does_not_answer_refuses_nothing(hub: Hub) -> None:
    assert await ask(hub).require("busy/model") == "not known: the hub answered 503"
    nobody = HubAccess(f"http://127.0.0.1:{pick_free_port()}", None)
    assert await nobody.require(GATED) == "not known: the hub is out of reach"
