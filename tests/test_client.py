"""The client against servers that misbehave on the wire: streams that break, gateways that come and go, answers of strangers."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from fluxgate import ApiError, Client, Lora, Unreachable
from fluxgate.wire import make_request

JOB: dict[str, Any] = {"id": "gen_1", "status": "running", "workflow": "flux", "new_field": 1}


def frame(kind: str, data: dict[str, Any], event_id: str = "") -> bytes:
    head = f"id: {event_id}\n" if event_id else ""
    return f"{head}event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


SNAPSHOT = frame("status", JOB)
DONE = {**JOB, "status": "succeeded"}


class Script(ThreadingHTTPServer):
    """A real HTTP server that gives each connection the next of its answers: a status and a body, or nothing at all."""

    daemon_threads = True

    def __init__(self, *answers: tuple[int, bytes] | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = list(answers)
        self.asked: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Script

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Last-Event-ID")))
        answer = self.server.answers.pop(0)
        if answer is None:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        status, body = answer
        self.send_response(status)
        self.send_header("Content-Type", "text/event-stream" if status == 200 else "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silence: the tests read `asked`."""


@pytest.fixture
def scripted() -> Iterator[Any]:
    """`scripted(answer, ...)` starts a server and answers (server, client)."""
    opened: list[tuple[Script, threading.Thread, Client]] = []

    def start(*answers: tuple[int, bytes] | None) -> tuple[Script, Client]:
        server = Script(*answers)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        opened.append((server, thread, Client(server.url)))
        return server, opened[-1][2]

    yield start
    for server, thread, client in opened:
        client.close()
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_broken_stream_goes_on_behind_the_last_id(scripted: Any) -> None:
    server, client = scripted(
        (200, SNAPSHOT + frame("progress", {"value": 0.1}, "5-0") + frame("progress", {"value": 0.2}, "6-0")),
        None,
        (503, b'{"error": {"code": "redis_unavailable", "message": "Redis is away"}}'),
        (200, SNAPSHOT + frame("progress", {"value": 0.3}, "7-0") + frame("status", DONE, "8-0")),
    )
    events = list(client.events("gen_1"))
    assert [event.id for event in events if event.id] == ["5-0", "6-0", "7-0", "8-0"]
    assert [last_id for _, last_id in server.asked] == [None, "6-0", "6-0", "6-0"]


def test_a_reconnect_event_is_followed_and_not_shown(scripted: Any) -> None:
    server, client = scripted(
        (200, SNAPSHOT + frame("progress", {"value": 0.1}, "5-0") + frame("reconnect", {}) + frame("log", {"message": "never"}, "6-0")),
        (200, frame("status", DONE) + frame("status", DONE, "6-0")),
    )
    assert [event.kind for event in client.events("gen_1")] == ["status", "progress", "status", "status"]
    assert server.asked[1] == ("/v1/generations/gen_1/events", "5-0")


def test_a_finished_job_is_replayed_to_its_end(scripted: Any) -> None:
    """The first status of a late caller is terminal already; what happened still follows it."""
    _, client = scripted((200, frame("status", DONE) + frame("output", {"index": 0}, "5-0") + frame("status", DONE, "6-0")))
    assert [event.kind for event in client.events("gen_1")] == ["status", "output", "status"]


def test_a_stream_that_only_ever_breaks_is_given_up(scripted: Any) -> None:
    _, client = scripted(None, None, None, None)
    with pytest.raises(Unreachable):
        list(client.events("gen_1", give_up_s=0.6))


def test_a_refused_stream_is_not_tried_again(scripted: Any) -> None:
    server, client = scripted((404, b'{"error": {"code": "job_not_found", "message": "There is no generation.", "hint": "Look."}}'))
    with pytest.raises(ApiError, match="There is no generation") as caught:
        list(client.events("gen_1"))
    assert (caught.value.status, caught.value.code, caught.value.hint) == (404, "job_not_found", "Look.")
    assert len(server.asked) == 1


def test_separators_of_other_scripts_do_not_cut_events(scripted: Any) -> None:
    prompt = "one\u2028two\x85three\x0bfour\u2029"
    _, client = scripted((200, frame("status", {**DONE, "parameters": {"prompt": prompt}}, "1-0")))
    assert [event.data["parameters"]["prompt"] for event in client.events("gen_1")] == [prompt]


def test_a_preview_is_asked_for_only_when_wanted(scripted: Any) -> None:
    server, client = scripted((200, frame("status", DONE, "1-0")), (200, frame("status", DONE, "1-0")))
    list(client.events("gen_1", previews=True))
    list(client.events("gen_1", after="0-1"))
    assert server.asked == [("/v1/generations/gen_1/events?previews=1", None), ("/v1/generations/gen_1/events", "0-1")]


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, b"<html>hello", "no JSON of ours: <html>hello"),
        (502, b"Bad Gateway", "answers 502"),
        (200, b"[1]", "no job"),
        (200, b'{"id": "x"}', "no job"),
    ],
)
def test_a_stranger_on_the_port_is_said_to_be_one(scripted: Any, status: int, body: bytes, said: str) -> None:
    _, client = scripted((status, body))
    with pytest.raises(ApiError, match=said) as caught:
        client.get("gen_1")
    assert caught.value.code == "not_the_gateway"
    assert caught.value.hint


def test_nobody_on_the_port_is_unreachable() -> None:
    with Client("http://127.0.0.1:1") as client, pytest.raises(Unreachable, match=r"127\.0\.0\.1:1 does not answer") as caught:
        client.workflows()
    assert caught.value.hint


def test_an_id_stays_one_segment_of_the_path(scripted: Any) -> None:
    server, client = scripted((404, b'{"error": {"code": "job_not_found", "message": "no"}}'))
    with pytest.raises(ApiError):
        client.get("../../health?x")
    assert server.asked[0][0] == "/v1/generations/..%2F..%2Fhealth%3Fx"


def test_a_request_leaves_out_what_was_not_said() -> None:
    body = make_request("a cat", workflow=None, loras=[Lora(name="tok", weight=0.5)], parameters={"seed": 0, "steps": None})
    assert body == {"prompt": "a cat", "seed": 0, "loras": [{"name": "tok", "weight": 0.5}]}
