"""The client against servers that misbehave on the wire: streams that break, gateways that come and go, answers of strangers."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from fluxgate import ApiError, Client, Event, Lora, Silent, Unreachable
from fluxgate.following import FIRST_EVENT_S, POLL_S, STREAM_SILENCE_S, Following
from fluxgate.wire import make_request
from tests.either_client import KINDS, opened

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
        self.sent: list[tuple[str | None, bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Script

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.sent.append((self.headers.get("Idempotency-Key"), body))
        self.do_GET()

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
        opened.append((server, thread, Client(server.url, patience_s=0)))
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
    events = list(client.stream("gen_1"))
    assert [event.id for event in events if event.id] == ["5-0", "6-0", "7-0", "8-0"]
    assert [last_id for _, last_id in server.asked] == [None, "6-0", "6-0", "6-0"]


def test_a_reconnect_event_is_followed_and_not_shown(scripted: Any) -> None:
    server, client = scripted(
        (200, SNAPSHOT + frame("progress", {"value": 0.1}, "5-0") + frame("reconnect", {}) + frame("log", {"message": "never"}, "6-0")),
        (200, frame("status", DONE) + frame("status", DONE, "6-0")),
    )
    assert [event.kind for event in client.stream("gen_1")] == ["status", "progress", "status", "status"]
    assert server.asked[1] == ("/v1/generations/gen_1/events", "5-0")


def test_a_finished_job_is_replayed_to_its_end(scripted: Any) -> None:
    """The first status of a late caller is terminal already; what happened still follows it."""
    _, client = scripted((200, frame("status", DONE) + frame("output", {"index": 0}, "5-0") + frame("status", DONE, "6-0")))
    assert [event.kind for event in client.stream("gen_1")] == ["status", "output", "status"]


def test_a_stream_that_only_ever_breaks_is_given_up(scripted: Any) -> None:
    _, client = scripted(None, None, None, None)
    with pytest.raises(Unreachable):
        list(client.stream("gen_1", give_up_s=0.6))


def test_a_refused_stream_is_not_tried_again(scripted: Any) -> None:
    server, client = scripted((404, b'{"error": {"code": "job_not_found", "message": "There is no generation.", "hint": "Look."}}'))
    with pytest.raises(ApiError, match="There is no generation") as caught:
        list(client.stream("gen_1"))
    assert (caught.value.status, caught.value.code, caught.value.hint) == (404, "job_not_found", "Look.")
    assert len(server.asked) == 1


def test_separators_of_other_scripts_do_not_cut_events(scripted: Any) -> None:
    prompt = "one\u2028two\x85three\x0bfour\u2029"
    _, client = scripted((200, frame("status", {**DONE, "parameters": {"prompt": prompt}}, "1-0")))
    assert [event.data["parameters"]["prompt"] for event in client.stream("gen_1")] == [prompt]


def test_a_preview_is_asked_for_only_when_wanted(scripted: Any) -> None:
    server, client = scripted((200, frame("status", DONE, "1-0")), (200, frame("status", DONE, "1-0")))
    list(client.stream("gen_1", previews=True))
    list(client.stream("gen_1", after="0-1"))
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
    with (
        Client("http://127.0.0.1:1", patience_s=0) as client,
        pytest.raises(Unreachable, match=r"127\.0\.0\.1:1 does not answer") as caught,
    ):
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


# -- what is sent again ------------------------------------------------------------------------------------------

BUSY = (503, b'{"error": {"code": "redis_unavailable", "message": "Redis is away"}}')
MADE = (202, json.dumps(JOB).encode())


@pytest.fixture(params=KINDS)
def patient(request: pytest.FixtureRequest, scripted: Any) -> Iterator[Any]:
    """`patient(answer, ...)` answers (server, a client that tries again)."""
    with ExitStack() as stack:

        def start(*answers: tuple[int, bytes] | None) -> tuple[Script, Any]:
            server, _ = scripted(*answers)
            return server, stack.enter_context(opened(request.param, server.url))

        yield start


def test_what_makes_a_job_is_sent_again_with_the_same_key(patient: Any) -> None:
    server, client = patient(None, BUSY, (502, b"Bad Gateway"), MADE, MADE)
    assert client.generate("a cat", loras=["tok"], seed=3).id == "gen_1"
    client.generate("a cat")
    keys = [key for key, _ in server.sent]
    assert keys[0]
    assert keys[:4] == [keys[0]] * 4, "one job, one key"
    assert keys[4] not in (None, keys[0])
    assert {body for _, body in server.sent[:4]} == {b'{"seed":3,"prompt":"a cat","loras":[{"name":"tok","weight":1.0}]}'}


def test_a_key_of_ones_own_is_used(patient: Any) -> None:
    server, client = patient(MADE)
    client.generate("a cat", idempotency_key="mine")
    assert server.sent == [("mine", b'{"prompt":"a cat"}')]


@pytest.mark.parametrize(
    "answer",
    [
        (503, b'{"error": {"code": "no_instance", "message": "no"}}'),
        (429, b'{"error": {"code": "queue_full", "message": "no"}}'),
        (422, b'{"error": {"code": "invalid_parameter", "message": "no"}}'),
        (500, b'{"error": {"code": "internal_error", "message": "no"}}'),
    ],
)
def test_an_answer_is_not_asked_for_twice(patient: Any, answer: tuple[int, bytes]) -> None:
    server, client = patient(answer)
    with pytest.raises(ApiError, match="no"):
        client.generate("a cat")
    assert len(server.asked) == 1


def test_what_could_be_done_twice_is_sent_once(patient: Any) -> None:
    server, client = patient(None)
    with pytest.raises(Unreachable):
        client.create_key(name="things")
    assert len(server.asked) == 1


def test_a_data_set_is_sent_again_with_its_key(patient: Any) -> None:
    server, client = patient(None, (422, b'{"error": {"code": "invalid_parameter", "message": "no"}}'))
    with pytest.raises(ApiError, match="no"):
        client.create_dataset([("a.png", b"x")], name="things")
    keys = [key for key, _ in server.sent]
    assert len(keys) == 2
    assert keys[0] == keys[1]
    assert keys[0]


def test_a_failure_on_the_way_is_told_when_patience_ends(scripted: Any) -> None:
    server, _ = scripted(*[None] * 9)
    with Client(server.url, patience_s=0.9) as client, pytest.raises(Unreachable):
        client.get("gen_1")
    assert len(server.asked) == 3, "at once, after 0.25 and after another 0.5 s"


# -- where one is in a stream ------------------------------------------------------------------------------------


def follow(**changes: Any) -> Following:
    return Following("http://x", "gen_1", clock=lambda: 0.0, **changes)


def test_a_way_that_says_nothing_is_left_for_the_next() -> None:
    place = follow()
    asked = []
    for _ in range(4):
        ask = place.ask()
        asked.append((ask.method, ask.query.get("wait"), ask.timeout_s))
        place.lose(Silent("http://x", "nothing"))
    assert asked == [("GET", None, FIRST_EVENT_S), ("POST", None, FIRST_EVENT_S), *[("GET", POLL_S, POLL_S + STREAM_SILENCE_S)] * 2]


def test_a_way_that_was_heard_stays_and_may_be_quiet() -> None:
    place = follow()
    assert place.ask().timeout_s == FIRST_EVENT_S
    assert place.take(Event("5-0", "progress", {}))
    place.lose(Silent("http://x", "quiet"))
    again = place.ask()
    assert (again.method, again.timeout_s, again.headers["Last-Event-ID"], place.pause_s) == ("GET", STREAM_SILENCE_S, "5-0", 0.0)


def test_a_training_is_followed_at_its_own_place() -> None:
    assert Following("http://x", "trn_1").ask().path == "/v1/trainings/trn_1/events"
    assert Following("http://x", "gen_1", way="poll", last_id="7-1").ask().query == {"wait": POLL_S, "after": "7-1"}


def test_an_end_without_an_id_is_followed_by_the_history() -> None:
    place = follow()
    ended, last = Event("", "status", DONE), Event("6-0", "status", DONE)
    place.ask()
    assert (place.take(ended), place.is_last(ended), place.is_last(last)) == (True, False, True)
    place.lose(Unreachable("http://x", "broken"))
    assert not place.has_ended, "the history was not whole"
    place.ask()
    place.take(last)
    place.lose(None)
    assert place.has_ended


@pytest.mark.parametrize("kind", KINDS)
def test_pages_are_read_to_the_end(scripted: Any, kind: str) -> None:
    def page(ended: bool, *events: tuple[str, str, dict[str, Any]]) -> tuple[int, bytes]:
        data = [{"id": event_id, "event": name, "data": content} for event_id, name, content in events]
        return 201, json.dumps({"data": data, "last_event_id": "x", "ended": ended}).encode()

    server, _ = scripted(page(False, ("5-0", "progress", {"value": 0.1})), page(False), page(True, ("6-0", "status", DONE)))
    with opened(kind, server.url, way="poll") as client:
        assert [event.id for event in client.stream("gen_1")] == ["5-0", "6-0"]
    assert [path.partition("?")[2] for path, _ in server.asked] == [f"wait={POLL_S}&after={after}" for after in ("0", "5-0", "5-0")]
