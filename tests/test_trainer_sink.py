"""The webhook's server, spoken to over real sockets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import httpx
import pytest

from trainer_worker import sink as sink_module
from trainer_worker.sink import MOST_WAITING, WebhookSink

STEP = {"type": "training.status", "n": 1}


@pytest.fixture
def sink() -> Iterator[WebhookSink]:
    with WebhookSink() as sink:
        yield sink


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False) as client:
        yield client


def test_payloads_are_kept_in_order_and_given_once(sink: WebhookSink, client: httpx.Client) -> None:
    for number in range(5):
        assert client.post(sink.url, json={**STEP, "n": number}).status_code == 204
    assert [payload["n"] for payload in sink.drain()] == [0, 1, 2, 3, 4]
    assert sink.drain() == []


def test_log_messages_are_answered_and_dropped(sink: WebhookSink, client: httpx.Client) -> None:
    assert client.post(sink.url, json={"type": "log.message", "message": "x"}).status_code == 204
    assert sink.drain() == []


def test_only_the_secret_path_is_heard(sink: WebhookSink, client: httpx.Client) -> None:
    root = sink.url.removesuffix(sink.path)
    for path in ("/", "/hook/", "/hook/guess", sink.path + "x", sink.path[:-1], "/höök"):
        assert client.post(root + path, json=STEP).status_code == 404
    assert client.get(sink.url).status_code == 501
    assert sink.drain() == []


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_object_is_refused(sink: WebhookSink, client: httpx.Client, body: bytes) -> None:
    assert client.post(sink.url, content=body).status_code == 400
    assert client.post(sink.url, json=STEP).status_code == 204
    assert sink.drain() == [STEP]


def test_too_large_and_unmeasured_bodies_are_refused_unread(sink: WebhookSink) -> None:
    port = int(sink.url.rpartition(":")[2].partition("/")[0])
    for length, status in ((b"99999999999", b"413"), (b"-1", b"411"), ("²".encode(), b"411")):
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            connection.sendall(b"POST %s HTTP/1.1\r\nContent-Length: %s\r\n\r\n" % (sink.path.encode(), length))
            assert connection.recv(100).split()[1] == status


def test_a_caller_that_hangs_does_not_hold_up_others(sink: WebhookSink, client: httpx.Client) -> None:
    port = int(sink.url.rpartition(":")[2].partition("/")[0])
    with socket.create_connection(("127.0.0.1", port), 10) as silent:
        silent.sendall(b"POST %s HTTP/1.1\r\nContent-Length: 100\r\n\r\n{" % sink.path.encode())
        assert client.post(sink.url, json=STEP).status_code == 204
        assert sink.drain() == [STEP]


def test_a_full_queue_counts_what_it_drops(sink: WebhookSink, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(MOST_WAITING + 3):
        sink.keep(STEP, 10)
    assert (len(sink.drain()), sink.dropped) == (MOST_WAITING, 3)
    sink.keep(STEP, 10)
    assert sink.drain() == [STEP]
    sink.keep(STEP, sink_module.MOST_WAITING_BYTES + 1)
    assert (sink.drain(), sink.dropped) == ([], 4)


def test_many_callers_at_once_are_all_heard(sink: WebhookSink) -> None:
    def call() -> None:
        with httpx.Client(trust_env=False) as client:
            for _ in range(10):
                client.post(sink.url, json=STEP)

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sink.drain()) == 80
