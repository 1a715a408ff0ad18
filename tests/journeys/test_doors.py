"""The other ways to a job's events: page by page with `?wait=`, and over a WebSocket. All tell what the SSE stream tells."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlencode

import pytest
from websockets.exceptions import ConnectionClosedOK, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.journeys.api import PATIENCE_S, Api, SseEvent, strip_signatures

Message = dict[str, Any]


def strip(events: list[SseEvent]) -> list[tuple[str | None, str, Any]]:
    return [(event.id, event.kind, strip_signatures(event.data)) for event in events]


def strip_messages(messages: list[Message]) -> list[tuple[str | None, str, Any]]:
    return [(message["id"], message["event"], strip_signatures(message["data"])) for message in messages]


@contextmanager
def open_socket(api: Api, path: str, **query: str) -> Iterator[ClientConnection]:
    url = f"{str(api.http.base_url).replace('http', 'ws', 1).rstrip('/')}{path}?{urlencode(query)}"
    with connect(url, open_timeout=PATIENCE_S, close_timeout=5) as socket:
        yield socket


def read(socket: ClientConnection) -> Message:
    return dict(json.loads(socket.recv(timeout=PATIENCE_S)))


def read_to_end(socket: ClientConnection) -> list[Message]:
    """Every message until the gateway closes, which it must do with 1000."""
    messages = []
    with suppress(ConnectionClosedOK):
        while True:
            messages.append(read(socket))
    assert socket.close_code == 1000
    return messages


def poll(api: Api, job_id: str, after: str = "0", wait: int = 30) -> dict[str, Any]:
    answer = api.http.get(f"/v1/generations/{job_id}/events", params={"after": after, "wait": wait})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def poll_to_end(api: Api, job_id: str) -> tuple[list[Message], int]:
    """(every event, pages it took)"""
    events: list[Message] = []
    pages, after, ended = 0, "0", False
    while not ended:
        page = poll(api, job_id, after)
        pages, after, ended = pages + 1, page["last_event_id"], page["ended"]
        events += page["data"]
    return events, pages


def test_every_door_tells_the_same_of_a_running_job(api: Api) -> None:
    job = api.create(workflow="slow", steps=20, delay_ms=30)
    with open_socket(api, f"/v1/generations/{job['id']}/ws") as socket:
        heard = list[Message]()
        listener = threading.Thread(target=lambda: heard.extend(read_to_end(socket)))
        listener.start()
        polled, pages = poll_to_end(api, job["id"])
        listener.join(PATIENCE_S)
    told = strip(api.replay(job["id"]))
    assert strip_messages(polled) == told
    assert pages > 3, "the events came in one go, not while the job ran"
    assert (heard[0]["id"], heard[0]["event"]) == (None, "status"), "the job as it stands comes first"
    assert strip_messages(heard[1:]) == told
    assert told[-1][1] == "status"
    assert told[-1][2]["status"] == "succeeded"


def test_both_go_on_after_an_event_and_tell_the_end_of_a_job_that_is_over(api: Api) -> None:
    job = api.run(workflow="trivial", color=3)
    told = strip(api.replay(job["id"]))
    for place in range(len(told)):
        after = told[place][0] or ""
        page = poll(api, job["id"], after)
        assert strip_messages(page["data"]) == told[place + 1 :]
        assert page["ended"]
        with open_socket(api, f"/v1/generations/{job['id']}/ws", after=after) as socket:
            assert strip_messages(read_to_end(socket)[1:]) == told[place + 1 :]


def test_a_poll_waits_no_longer_than_it_was_told_to(api: Api) -> None:
    job = api.create(workflow="slow", steps=1, delay_ms=8000)
    api.wait(job["id"], "running")
    after = "0"
    while (page := poll(api, job["id"], after, wait=1))["data"]:
        after = page["last_event_id"]
    assert page == {"data": [], "last_event_id": after, "ended": False}
    late = list[dict[str, Any]]()
    waiting = threading.Thread(target=lambda: late.append(poll(api, job["id"], after, wait=60)))
    waiting.start()
    time.sleep(0.2)
    api.http.post(f"/v1/generations/{job['id']}/cancel")
    waiting.join(PATIENCE_S)
    assert late[0]["data"][0]["data"]["status"] == "canceling", "it came while somebody waited for it"


def test_a_socket_shows_previews_when_asked_and_answers_a_ping(api: Api) -> None:
    job = api.create(workflow="slow", steps=15, delay_ms=40)
    with open_socket(api, f"/v1/generations/{job['id']}/ws", previews="1") as socket:
        socket.send("ping")
        messages = read_to_end(socket)
    assert {"event": "pong"} in messages
    previews = [message for message in messages if message["event"] == "preview"]
    assert previews
    assert all(message["id"] is None and message["data"]["mime"].startswith("image/") for message in previews)


def test_a_deleted_job_closes_its_sockets_at_the_next_sign_of_life(api: Api) -> None:
    """Sockets of jobs that ended are closed already: there is nobody left whom a deletion could leave waiting."""
    job = api.run(workflow="trivial", color=4)
    api.http.delete(f"/v1/generations/{job['id']}")
    with pytest.raises(InvalidStatus) as refused, open_socket(api, f"/v1/generations/{job['id']}/ws"):
        pass
    assert refused.value.response.status_code == 404


@pytest.mark.parametrize(
    ("path", "query", "headers", "status", "code"),
    [
        ("/v1/generations/gen_none/ws", "", {}, 404, "job_not_found"),
        ("/v1/trainings/JOB/ws", "", {}, 404, "job_not_found"),
        ("/v1/generations/JOB/ws", "after=now", {}, 400, "bad_request"),
        ("/v1/generations/JOB/ws", "previews=maybe", {}, 400, "invalid_parameter"),
        ("/v1/generations/JOB/ws", "", {"Origin": "https://evil.example"}, 403, "foreign_origin"),
        ("/v1/generations/JOB/ws", "", {"Origin": "null"}, 403, "foreign_origin"),
    ],
)
def test_a_socket_is_refused_in_the_words_of_every_other_answer(
    api: Api, path: str, query: str, headers: dict[str, str], status: int, code: str
) -> None:
    job = api.create(workflow="trivial", color=5)
    url = f"{str(api.http.base_url).replace('http', 'ws', 1).rstrip('/')}{path.replace('JOB', job['id'])}?{query}"
    with pytest.raises(InvalidStatus) as refused, connect(url, additional_headers=headers):
        pass
    response = refused.value.response
    assert response.status_code == status
    assert json.loads(response.body)["error"]["code"] == code


def test_a_page_of_the_gateway_itself_may_open_a_socket(api: Api) -> None:
    job = api.run(workflow="trivial", color=6)
    url = f"{str(api.http.base_url).replace('http', 'ws', 1).rstrip('/')}/v1/generations/{job['id']}/ws"
    with connect(url, additional_headers={"Origin": str(api.http.base_url).rstrip("/")}) as socket:
        assert read_to_end(socket)


@pytest.mark.parametrize("wait", ["-1", "61", "soon", "1.5"])
def test_a_wait_that_is_none_is_refused(api: Api, wait: str) -> None:
    job = api.create(workflow="trivial", color=7)
    answer = api.http.get(f"/v1/generations/{job['id']}/events", params={"wait": wait})
    assert answer.status_code == 400
    assert answer.json()["error"]["details"]["parameter"] == "wait"
